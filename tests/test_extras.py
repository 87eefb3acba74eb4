"""Who only trains needs no package of an extra; a command that needs one names the extra before it works."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tomllib
from conftest import ROOT
from packaging.requirements import Requirement

from iconformer_mm import extras
from iconformer_mm.cli.main import main
from iconformer_mm.extras import EXTRAS, MissingExtraError, require_extra
from iconformer_mm.figures import new_figure

# Folders of the packages of extras. MMEngine needs matplotlib itself, to train; torch needs Jinja to compile.
PROJECTS = {'numba': 'numba|llvmlite', 'jinja2': 'jinja2', 'markdown_it': 'markdown_it(_py)?|mdurl'}
PROJECTS['sklearn'] = 'sklearn|scikit_learn'
HIDDEN = re.compile(rf'(?i)(iconformer_mm|{"|".join(PROJECTS.values())})(-.*|\.py|\.libs)?|.*\.pth')
PROGRAM = """if True:
    import json, runpy, sys
    from importlib.util import find_spec

    task = json.load(open('task.json'))
    assert not [name for name in task['hidden'] if find_spec(name)]
    messages = []
    for tool, *arguments in task['tools']:
        sys.argv = [tool, *arguments]
        try:
            runpy.run_path(tool, run_name='__main__')
        except SystemExit as error:
            messages.append(str(error))
    json.dump(messages, open('messages.json', 'w'))
"""


@pytest.fixture(scope='module')
def without_extras(tmp_path_factory):
    """A folder with all packages of this environment but those of extras."""
    folder = tmp_path_factory.mktemp('packages')
    for entry in Path(sysconfig.get_path('purelib')).iterdir():
        if HIDDEN.fullmatch(entry.name) is None:
            (folder / entry.name).symlink_to(entry)
    return folder


def run(tools, packages, tmp_path):
    """Run tools in a process without the packages of extras; return the messages that they ended with."""
    (tmp_path / 'task.json').write_text(json.dumps(dict(hidden=list(PROJECTS), tools=tools)))
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (packages, ROOT))), 'OMP_NUM_THREADS': '1'}
    # -S: without the environment's own folder of packages
    command = [sys.executable, '-S', '-c', PROGRAM]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return json.loads((tmp_path / 'messages.json').read_text())


def tool(name, *arguments):
    return [str(ROOT / 'tools' / name), *arguments]


def test_training_and_prediction_need_no_extra(without_extras, tmp_path):
    config = 'iconformer_mm::scenes/upernet_swin-scenes_icon_target.py'
    short = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2']
    scenes = ['--out', 'data/scenes', '--styles', 'target', '--train', '2', '--val', '2']
    tools = [
        tool('dataset_converters/make_scenes.py', *scenes),
        tool('train.py', config, '--work-dir', 'out', '--cfg-options', *short),
        tool('adapter.py', 'info', 'out/adapter.safetensors'),
    ]
    assert run(tools, without_extras, tmp_path) in ([], ['0'])
    assert (tmp_path / 'out' / 'adapter.safetensors').is_file()


def test_what_needs_an_extra_names_it(without_extras, tmp_path):
    """In one line, and before the other arguments are looked at."""
    digits = 'iconformer_mm::quickstart/vit-quickstart_icon_digits.py'
    images = ['none.jpg', '--config', digits, '--adapter', 'none', '--out', 'out']
    tools = [
        tool('report.py', 'none'),
        tool('visualize_icon.py', *images),
        tool('train.py', digits),
    ]
    needs = [
        ('a report', 'jinja2 and markdown_it, which are', 'report'),
        ('looking at kernels', 'sklearn, which is', 'analysis'),
        ('the data set Digits', 'sklearn, which is', 'quickstart'),
    ]
    assert run(tools, without_extras, tmp_path) == [
        f"error: {what} needs {packages} not installed; install the extra '{extra}': "
        f"pip install 'iconformer_mm[{extra}]'"
        for what, packages, extra in needs
    ]


def test_extras_are_those_of_the_distribution():
    """Each package that code asks for is installed by the extra that the message names."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']

    def names(extra):
        for requirement in map(Requirement, project['optional-dependencies'][extra]):
            if requirement.name == 'iconformer_mm':
                for other in requirement.extras:
                    yield from names(other)
            else:
                yield requirement.name

    projects = {
        'sklearn': 'scikit-learn',
        'markdown_it': 'markdown-it-py',
        'prometheus_client': 'prometheus-client',
    }
    for extra, packages in EXTRAS.items():
        assert {projects.get(package, package) for package in packages} <= set(names(extra)), extra
    assert {Requirement(line).name for line in project['dependencies']} == {
        'numpy',
        'pillow',
        'rich',
        'safetensors',
        'torch',
    }


@pytest.mark.parametrize('command', ['compare', 'find-lr'])
def test_without_matplotlib(command, monkeypatch):
    """Said before anything runs, though the plot comes last."""
    monkeypatch.setattr(extras, 'find_spec', lambda name: None if name == 'matplotlib' else name)
    with pytest.raises(SystemExit, match=r"needs matplotlib, which is not installed; install the extra 'plot'"):
        main([command, 'none.yaml'])
    with pytest.raises(MissingExtraError, match='drawing a figure needs matplotlib'):
        new_figure(1, 1)


def test_one_missing_package(monkeypatch):
    require_extra('report', 'a report')
    monkeypatch.setattr(extras, 'find_spec', lambda name: None if name == 'jinja2' else name)
    with pytest.raises(MissingExtraError, match=r"^a report needs jinja2, which is not .*'iconformer_mm\[report\]'$"):
        require_extra('report', 'a report')


def test_without_mmengine(without_extras, tmp_path):
    """The one package that all need, and that no requirement can name: two distributions have it."""
    for entry in without_extras.iterdir():
        if not entry.name.startswith(('mmengine', 'onedl_mmengine')):
            (tmp_path / entry.name).symlink_to(entry)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (tmp_path, ROOT)))}
    command = [sys.executable, '-S', '-c', 'import iconformer_mm']
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        'ImportError: iconformer_mm needs MMEngine, which is not installed: pip install onedl-mmengine'
    )
