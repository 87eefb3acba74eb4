"""The application for Ray Serve, as ``serve run`` makes it. A server that runs is in tests/cli/test_serve.py."""

import pytest
from conftest import ROOT
from trained_adapters import DIGITS, trained

pytest.importorskip('ray', reason='the extra [ray] is not installed')
pytestmark = pytest.mark.filterwarnings('ignore')


def test_options_are_text(tmp_path, monkeypatch):
    from iconformer_mm.serving.deployment import build
    from iconformer_mm.serving.settings import Settings

    monkeypatch.setenv('ICONFORMER_MM_TOKEN', 'secret')
    monkeypatch.delenv('ICONFORMER_MM_CACHE', raising=False)
    trained(ROOT, DIGITS, tmp_path / 'a.safetensors')
    options = dict(config=str(ROOT / DIGITS), adapters=str(tmp_path))
    application = build({**options, 'replicas': '3', 'gpus': '0.5', 'max_waiting': '10', 'metrics_dir': '/counts'})
    deployment = application._bound_deployment
    assert deployment.num_replicas == 3
    resources = deployment.ray_actor_options
    assert resources['num_gpus'] == 0.5
    variables = resources['runtime_env']['env_vars']
    assert variables == dict(PROMETHEUS_MULTIPROC_DIR='/counts', ICONFORMER_MM_TOKEN='secret')
    assert deployment.init_args == (Settings(**options, replicas=3, gpus=0.5, max_waiting=10, metrics_dir='/counts'),)


def test_mistakes_come_before_anything_starts(tmp_path):
    from iconformer_mm.serving.deployment import build

    with pytest.raises(ValueError, match='holds no adapter file'):
        build(dict(config='c', adapters=str(tmp_path)))
    with pytest.raises(ValueError, match="unknown option 'replica' of a server .did you mean 'replicas'"):
        build(dict(config='c', adapters=str(tmp_path), replica='2'))
    with pytest.raises(ValueError, match="a server needs the option 'adapters'"):
        build(dict(config='c'))
