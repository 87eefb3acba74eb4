"""The one step of the build that pyproject.toml cannot say: configs and tools go into the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Puts configs and tools into the built package, where MIM and ``iconformer_mm::path`` look for them.

    Nothing is written into the checkout. An editable install finds them beside the package
    (``iconformer_mm/compat.py``).
    """

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'iconformer_mm', '.mim')
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy2(ROOT / 'model-index.yml', target)


setup(cmdclass=dict(build_py=BuildWithConfigs))
