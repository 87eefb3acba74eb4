"""The command that serves: its messages, and one server on Ray."""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, free_port
from trained_adapters import DIGITS, trained

from iconformer_mm import extras
from iconformer_mm.cli.serve import check_port, main
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.inference.ray_cluster import connected

CONFIG = str(ROOT / DIGITS)


@pytest.fixture(autouse=True)
def _extra(monkeypatch, request):
    """What is wrong is said whether the extra is installed or not, except by its own test."""
    if 'without_ray' not in request.node.name:
        monkeypatch.setattr('iconformer_mm.cli.serve.require_extra', lambda *_: None)


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return str(end.value.code)


def test_without_ray(monkeypatch):
    monkeypatch.setattr(extras, 'find_spec', lambda name: None if name == 'ray' else name)
    message = refused('--config', CONFIG, '--adapters', 'none')
    assert message == (
        "error: serving needs ray, which is not installed; install the extra 'ray': pip install 'iconformer_mm[ray]'"
    )


def test_mistakes(tmp_path):
    assert 'the folder of adapters none does not exist' in refused('--config', CONFIG, '--adapters', 'none')
    message = refused('--config', CONFIG, '--adapters', tmp_path)
    assert 'holds no adapter file (*.safetensors)' in message and '--allow-empty' in message
    shutil.copy(__file__, tmp_path / 'a.safetensors')
    given = ['--config', CONFIG, '--adapters', tmp_path]
    assert 'none of the adapter files in' in refused(*given)
    given.append('--allow-empty')
    assert 'the base none.pth does not exist' in refused(*given, '--base', 'none.pth')
    assert '--port must be from 1 to 65535, got 70000' in refused(*given, '--port', 70000)
    assert 'max_batch must be above 0, got 0' in refused(*given, '--max-batch', 0)
    assert 'the token file none cannot be read' in refused(*given, '--token-file', 'none')
    (tmp_path / 'token').write_text('\n')
    assert 'holds no token' in refused(*given, '--token-file', tmp_path / 'token')
    assert 'none.py' in refused('--config', 'none.py', '--adapters', tmp_path, '--allow-empty')


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused('--config', CONFIG, '--adapters', tmp_path, '--allow-empty', '--port', port)
        assert message.startswith(f'error: cannot listen on 127.0.0.1:{port} (Address already in use)')
    check_port('127.0.0.1', port)


@pytest.mark.parametrize(
    ('address', 'message'),
    [
        ('127.0.0.1:{port}', "no Ray cluster answers at '127.0.0.1:.*Connection refused"),
        ('ray://127.0.0.1:{port}', "no Ray cluster answers at 'ray://127.0.0.1:"),
        ('somewhere', "must be HOST:PORT, ray://HOST:PORT or auto, got 'somewhere'"),
        ('host:port', 'must be HOST:PORT'),
    ],
)
def test_a_cluster_that_is_not_there(address, message):
    pytest.importorskip('ray', reason='the extra [ray] is not installed')
    with pytest.raises(ValueError, match=message), connected(address.format(port=free_port())):
        pass


@pytest.mark.filterwarnings('ignore')
def test_a_server(tmp_path):
    """It listens on the loopback interface, survives the death of a replica, and ends when it is told."""
    pytest.importorskip('ray', reason='the extra [ray] is not installed')
    import requests

    adapters = tmp_path / 'adapters'
    trained(ROOT, DIGITS, adapters / 'a.safetensors')
    image = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    (truth,) = AdapterInferencer(CONFIG, adapters / 'a.safetensors', device='cpu')([image])
    port = free_port()
    command = [sys.executable, '-m', 'iconformer_mm', 'serve', '--config', CONFIG, '--adapters', adapters]
    command += ['--port', port, '--device', 'cpu', '--cpus', '0.5']
    process = subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if 'serving ' in line:
                break
        assert f'on http://127.0.0.1:{port}' in ''.join(lines), lines
        client = runpy.run_path(str(ROOT / 'examples' / 'predict_client.py'))
        cv2.imwrite(str(tmp_path / 'image.png'), image)
        server = f'http://127.0.0.1:{port}'
        for _ in range(2):
            answer = client['predict'](server, 'a', tmp_path / 'image.png', top_k=10)
        found = {each['label']: each['score'] for each in answer['labels']}
        torch.testing.assert_close(torch.tensor([found[label] for label in range(10)]), truth.pred_score)
        with pytest.raises(RuntimeError, match="unknown_adapter: there is no adapter 'b'"):
            client['predict'](server, 'b', tmp_path / 'image.png')
        metrics = requests.get(f'http://127.0.0.1:{port}/metrics', timeout=60).text
        assert 'iconformer_requests_total{adapter="a",code="ok"} 2.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f'http://127.0.0.1:{port}/healthz', timeout=5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
