"""Packaging of iconformer_mm; the version lives in ``iconformer_mm/version.py``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read ``__version__`` without importing the package (torch may be absent)."""
    text = (ROOT / 'iconformer_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"__version__ = '([^']+)'", text).group(1)


def read_requirements(name: str) -> list[str]:
    """Read ``requirements/<name>.txt``, following ``-r`` lines."""
    requirements: list[str] = []
    for line in (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            requirements += read_requirements(line[3:].strip().removesuffix('.txt'))
        elif line:
            requirements.append(line)
    return requirements


class BuildWithConfigs(build_py):
    """Puts configs and tools into the built package, where MIM and ``iconformer_mm::path`` look for them.

    Nothing is written into the checkout, and an editable install has nothing of it: there they are found beside
    the package (``iconformer_mm/compat.py``).
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


EXTRAS = ('cls', 'det', 'seg', 'timm', 'quickstart', 'test')

setup(
    name='iconformer_mm',
    version=read_version(),
    description='Parameter-efficient fine-tuning with input-conditioned adapters for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    cmdclass=dict(build_py=BuildWithConfigs),
    packages=find_packages(include=('iconformer_mm', 'iconformer_mm.*')),
    package_data={'iconformer_mm': ['py.typed']},
    python_requires='>=3.10',
    install_requires=read_requirements('runtime'),
    extras_require={name: read_requirements(name) for name in EXTRAS},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
