import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

sys.path.insert(0, str(Path(__file__).parent))
os.environ['PIP_NO_INDEX'] = '1'  # nothing may be installed by a test
# Processes that tests start by forkserver are copies of one that has imported the libraries.
multiprocessing.set_forkserver_preload(['warm'])

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> str:
    """A port for processes that talk to each other; tests run side by side."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _fresh_state():
    """No test sees the seed or the default scope that another left."""
    torch.manual_seed(0)
    init_default_scope('mmpretrain')


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
