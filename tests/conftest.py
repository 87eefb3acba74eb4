import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ['PIP_NO_INDEX'] = '1'  # nothing may be installed by a test

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
