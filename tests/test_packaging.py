"""What is built holds the configs and tools, and works installed, from another folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

IGNORED = ('.git', '.venv*', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '__pycache__', '.*_cache')


def call(*command, cwd):
    """Run a command away from the checkout; return what it printed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PIP_NO_INDEX': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    env.pop('PYTHONPATH', None)
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout


def build_wheel(source, out):
    call(sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '--wheel-dir', out, source, cwd=out)
    (path,) = out.glob('*.whl')
    return path


def contents(wheel):
    """Bytes by name, without the record of the names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith('.dist-info/RECORD')}


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the checkout, since building leaves folders."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp('source') / 'checkout', ignore=shutil.ignore_patterns(*IGNORED)
    )


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """An environment with the wheel, that sees all other packages of ours; its Python and our package's folder.

    A ``.pth`` file within the folder that it names is not read, so an editable install there has no effect.
    """
    venv = tmp_path_factory.mktemp('installed') / 'venv'
    call(sys.executable, '-m', 'venv', '--without-pip', venv, cwd=venv.parent)
    python = venv / 'bin' / 'python'
    call(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', wheel, cwd=venv.parent)
    packages = Path(sysconfig.get_path('purelib', vars=dict(base=venv)))
    (packages / 'libraries.pth').write_text(sysconfig.get_path('purelib'))
    package = packages / 'iconformer_mm'
    imported = call(python, '-c', 'import iconformer_mm; print(iconformer_mm.__file__)', cwd=venv.parent)
    assert Path(imported.strip()) == package / '__init__.py'
    return python, package


def test_the_wheel_holds_configs_and_tools(source, wheel):
    prefix = 'iconformer_mm/.mim/'
    expected = {f'{prefix}model-index.yml': (ROOT / 'model-index.yml').read_bytes()}
    for folder in ('configs', 'tools'):
        expected |= {f'{prefix}{folder}/{name}': data for name, data in files(ROOT / folder).items()}
    assert {name: data for name, data in contents(wheel).items() if name.startswith(prefix)} == expected
    assert not (source / 'iconformer_mm' / '.mim').exists()


def test_the_sdist_makes_the_same_wheel(source, wheel, tmp_path):
    call(sys.executable, '-c', f'import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})', cwd=source)
    (sdist,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (tmp_path / 'wheel').mkdir()
    again = build_wheel(tmp_path / sdist.name.removesuffix('.tar.gz'), tmp_path / 'wheel')
    assert contents(again) == contents(wheel)


def test_shipped_configs_load_by_their_names(installed, tmp_path):
    """One of each folder; also as a base, whose types are then looked for where its own `default_scope` says."""
    program = """if True:
        import sys
        from pathlib import Path
        from mmengine.config import Config
        from iconformer_mm.engine import load_config
        for name in sys.argv[1:]:
            Path('mine.py').write_text(f"_base_ = 'iconformer_mm::{name}'")
            direct, inherited = load_config(f'iconformer_mm::{name}'), Config.fromfile('mine.py')
            direct.pop('work_dir')
            assert inherited.to_dict() == direct.to_dict(), name
    """
    configs = sorted((ROOT / 'configs').glob('[!_]*/*_icon_*.py'))
    names = {path.parent.name: path.relative_to(ROOT / 'configs') for path in configs}
    assert len(names) == 8
    call(installed[0], '-c', program, *names.values(), cwd=tmp_path)


def test_trains_with_a_config_of_the_package(installed, tmp_path):
    """On its tools, from a folder with nothing but a config of two lines."""
    python, package = installed
    tools = package / '.mim' / 'tools'
    make = ['--out', 'data/scenes', '--styles', 'target', '--train', 8, '--val', 4]
    call(python, tools / 'dataset_converters' / 'make_scenes.py', *make, cwd=tmp_path)
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'iconformer_mm::scenes/depth_swin-scenes_full_target.py'\n"
        'train_cfg = dict(max_iters=2, val_interval=2)\n'
    )
    options = ['--peft', 'iconformer_mm::_base_/peft/lora.py', '--work-dir', 'out']
    call(python, tools / 'train.py', 'mine.py', *options, cwd=tmp_path)
    (scalars,) = (tmp_path / 'out').glob('*/vis_data/scalars.json')
    assert '"rmse"' in scalars.read_text()
    info = call(python, tools / 'adapter.py', 'info', 'out/adapter.safetensors', cwd=tmp_path)
    assert 'lora' in info
