"""Prediction on many images: in several processes, after an early end, and on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from conftest import ROOT, free_port
from trained_adapters import DIGITS, trained

from iconformer_mm.cli.predict import main
from iconformer_mm.inference.image_files import FilePredictor

pytestmark = pytest.mark.filterwarnings('ignore')


def make_images(folder, number):
    folder.mkdir()
    for index in range(number):
        image = np.random.default_rng(index).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{index:03d}.png'), image)
    return folder


@pytest.fixture
def arguments(tmp_path):
    trained(ROOT, DIGITS, tmp_path / 'a.safetensors')
    return ['--config', str(ROOT / DIGITS), '--adapter', str(tmp_path / 'a.safetensors'), '--device', 'cpu']


def predict(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def results(out):
    """The content of the one file of results, after a look at what else is there."""
    assert not (out / '.predictions').exists()
    content = json.loads((out / 'predictions.json').read_text())
    for image in content['predictions']:
        assert (out / f'{Path(image).stem}.png').is_file()
    return content


@pytest.fixture
def interrupted(monkeypatch):
    """Images that were predicted on; the run ends at the third."""
    seen = []
    predict_one = FilePredictor.__call__

    def stop_at_third(self, path, target):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(Path(path).name)
        return predict_one(self, path, target)

    monkeypatch.setattr(FilePredictor, '__call__', stop_at_third)
    yield seen


def run_on(images, out, arguments, seen, monkeypatch):
    """Begin a run, which is interrupted; then let one go to its end, and note what it predicts on."""
    with pytest.raises(KeyboardInterrupt):
        main([str(word) for word in (images, *arguments, '--out', out)])
    assert not (out / 'predictions.json').exists()
    monkeypatch.undo()
    predict_one = FilePredictor.__call__

    def note(self, path, target):
        seen.append(Path(path).name)
        return predict_one(self, path, target)

    monkeypatch.setattr(FilePredictor, '__call__', note)


def test_a_run_goes_on_where_it_ended(arguments, tmp_path, interrupted, monkeypatch):
    images, out = make_images(tmp_path / 'images', 5), tmp_path / 'out'
    (images / 'broken.png').write_bytes(b'no image')
    run_on(images, out, arguments, interrupted, monkeypatch)
    with open(next((out / '.predictions').glob('*.jsonl')), 'a') as file:
        file.write('{"image": "cut o')  # by a kill
    time.sleep(0.01)
    cv2.imwrite(str(images / '000.png'), np.zeros((28, 28, 3), np.uint8))  # changed since
    assert predict(images, *arguments, '--out', out) == 1
    assert interrupted == ['000.png', '001.png', '000.png', '002.png', '003.png', '004.png', 'broken.png']
    content = results(out)
    assert [Path(name).name for name in content['predictions']] == [f'{index:03d}.png' for index in range(5)]
    assert content['skipped'] == [str(images / 'broken.png')]
    assert predict(images, *arguments, '--out', tmp_path / 'again') == 1
    assert results(tmp_path / 'again') == content


def test_results_of_another_run_are_not_taken(arguments, tmp_path, interrupted, monkeypatch):
    images, out = make_images(tmp_path / 'images', 4), tmp_path / 'out'
    run_on(images, out, arguments, interrupted, monkeypatch)
    trained(ROOT, DIGITS, tmp_path / 'a.safetensors', seed=1)
    message = predict(images, *arguments, '--out', out)
    assert 'holds unfinished predictions of another run (other adapter)' in message and '--restart' in message
    assert predict(images, *arguments, '--out', out, '--restart') == 0
    assert interrupted[2:] == [f'{index:03d}.png' for index in range(4)]
    assert len(results(out)['predictions']) == 4


def test_pictures_of_an_earlier_run_are_no_images(arguments, tmp_path):
    images = make_images(tmp_path / 'images', 2)
    for _ in range(2):
        assert predict(images, *arguments, '--out', images / 'out') == 0
        assert len(results(images / 'out')['predictions']) == 2


def test_a_killed_process_is_replaced(arguments, tmp_path):
    """Under torchrun, two processes share the images. What the killed one had not done is done; there is one result."""
    images, out = make_images(tmp_path / 'images', 80), tmp_path / 'out'
    command = ['bash', ROOT / 'tools' / 'dist_predict.sh', 2, images, *arguments, '--out', out]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'  # the script runs `python`
    environment = {**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1', 'PORT': free_port(), 'RESTARTS': '1'}
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)
    while sum(path.stat().st_size > 0 for path in (out / '.predictions').glob('*.jsonl')) < 2:
        assert process.poll() is None, (tmp_path / 'log').read_text()[-3000:]
        time.sleep(0.02)
    (victim,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if 'predict.py' in ' '.join(child.cmdline()) and child.environ().get('RANK') == '1'
    )
    victim.send_signal(signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / 'log').read_text()[-3000:]
    log = (tmp_path / 'log').read_text()
    assert 'of 80 images are done' in log and '80 predictions in' in log
    content = results(out)
    assert predict(images, *arguments, '--out', tmp_path / 'alone') == 0
    alone = results(tmp_path / 'alone')
    assert list(content['predictions']) == list(alone['predictions'])
    assert {n: p['label'] for n, p in content['predictions'].items()} == {
        n: p['label'] for n, p in alone['predictions'].items()
    }


def test_ray(arguments, tmp_path, capsys):
    """On a cluster that it starts on this machine: the same as in one process."""
    pytest.importorskip('ray', reason='the extra [ray] is not installed')
    images = make_images(tmp_path / 'images', 10)
    (images / 'broken.png').write_bytes(b'no image')
    assert predict(images, *arguments, '--out', tmp_path / 'ray', '--engine', 'ray', '--workers', 1) == 1
    printed = ' '.join(capsys.readouterr().err.split())
    assert 'broken.png is no image that can be read' in printed and '10 predictions in' in printed
    assert predict(images, *arguments, '--out', tmp_path / 'alone') == 1
    for one, other in zip(*(results(tmp_path / name)['predictions'].items() for name in ('ray', 'alone'))):
        assert one[0] == other[0] and one[1] == {**other[1], 'score': pytest.approx(other[1]['score'], abs=1e-6)}


def test_options_of_ray(arguments, tmp_path, capsys, monkeypatch):
    images = make_images(tmp_path / 'images', 1)
    given = [images, *arguments, '--out', tmp_path / 'out']
    for words, message in (
        (['--workers', '2'], '--workers is for --engine ray'),
        (['--ray-address', 'auto'], '--ray-address is for --engine ray'),
        (['--engine', 'ray', '--workers', '0'], '--workers must be 1 or more, got 0'),
    ):
        assert predict(*given, *words) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert predict(*given, '--engine', 'ray') == 2
    assert 'run it without torchrun' in capsys.readouterr().err


def test_ray_without_the_extra_or_the_cluster(arguments, tmp_path, monkeypatch):
    from iconformer_mm import extras

    images = make_images(tmp_path / 'images', 1)
    given = [images, *arguments, '--out', tmp_path / 'out', '--engine', 'ray']
    with monkeypatch.context() as patch:
        patch.setattr(extras, 'find_spec', lambda name: None if name == 'ray' else name)
        assert 'predicting with --engine ray needs ray, which is not installed' in predict(*given)
    pytest.importorskip('ray', reason='the extra [ray] is not installed')
    message = predict(*given, '--ray-address', f'127.0.0.1:{free_port()}')
    assert 'no Ray cluster answers at' in message and 'ray start --head' in message
