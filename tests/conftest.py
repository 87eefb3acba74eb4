import gc
import importlib
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

sys.path.insert(0, str(Path(__file__).parent))
import shortcuts  # noqa: E402, F401

from iconformer_mm.registry import PEFT_METHODS  # noqa: E402

os.environ['PIP_NO_INDEX'] = '1'  # nothing may be installed by a test
# Processes that tests start by forkserver are copies of one that has imported the libraries.
multiprocessing.set_forkserver_preload(
    [
        'shortcuts',
        'torch._dynamo',
        'torch.distributed.fsdp',
        'iconformer_mm.cli.main',
        'mmpretrain.models',
        'mmpretrain.datasets',
        'mmdet.models',
        'mmdet.datasets',
        'mmseg.models',
        'mmseg.datasets',
    ]
)

ROOT = Path(__file__).resolve().parent.parent

# What is true of the checkout, whichever libraries are installed, is checked once.
not_with_the_originals = pytest.mark.skipif(
    any(found.name == 'mmengine' for found in distributions()),
    reason='the tools of a release and of the site are in the environment of the maintained builds',
)


def free_port() -> str:
    """A port for processes that talk to each other; tests run side by side."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def import_methods(monkeypatch):
    """Let modules of benchmarks be imported that register methods. They are forgotten after the test."""
    registered, modules = dict(PEFT_METHODS.module_dict), set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    yield importlib.import_module
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], '__file__', None) or '').parent == ROOT / 'benchmarks':
            del sys.modules[name]
    PEFT_METHODS.module_dict.clear()
    PEFT_METHODS.module_dict.update(registered)


@pytest.fixture(autouse=True, scope='module')
def _frozen_imports():
    """MMEngine collects garbage for every data set. It need not go through all that has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_state():
    """No test sees the seed or the default scope that another left."""
    torch.manual_seed(0)
    init_default_scope('mmpretrain')


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages of MMEngine's logger."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
