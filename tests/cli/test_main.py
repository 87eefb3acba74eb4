"""``iconformer COMMAND``, which ``python -m iconformer_mm`` is, too."""

import json
import subprocess
import sys

import pytest
from commands import call
from conftest import ROOT

from iconformer_mm import __version__
from iconformer_mm.cli.main import COMMANDS, main

DIGITS = 'configs/quickstart/vit-quickstart_icon_digits.py'


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['iconformer'])  # `main` sets them


@pytest.mark.parametrize('argv', [[], ['--help'], ['-h']])
def test_help_lists_all_commands(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name in ['train', 'test', 'predict', 'inspect', 'adapter', 'convert', 'compare', 'report', 'find-lr']:
        assert f'\n  {name} ' in out


def test_help_imports_no_command():
    code = (
        'import sys\nfrom iconformer_mm.cli.main import main\nmain(["--help"])\n'
        'print([name for name in sys.modules if name.startswith("iconformer_mm.cli.") and name[18:] != "main"])'
    )
    assert call(sys.executable, '-c', code).splitlines()[-1] == '[]'


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'iconformer_mm {__version__}\n'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('trian', "error: unknown command 'trian' (did you mean 'train'?)\n"),
        ('zzz', f"error: unknown command 'zzz'; there are: {', '.join(COMMANDS)}\n"),
    ],
)
def test_an_unknown_command(name, message, capsys):
    assert main([name]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_shows_its_own_usage(name, capsys):
    try:
        status = main([name, '--help'])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert capsys.readouterr().out.startswith(f'usage: iconformer {name} ')


def test_the_status_is_that_of_the_command(tmp_path, capsys):
    assert main(['adapter', 'info', str(tmp_path / 'none.safetensors')]) == 3
    assert 'does not exist' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='error: config .nowhere.py. not found'):
        main(['train', 'nowhere.py'])


def test_as_a_module_from_another_folder(tmp_path):
    """Beside `python tools/inspect_model.py`, which says the same."""
    arguments = [str(ROOT / DIGITS), '--shape', '28', '28', '--json']
    command = [sys.executable, '-m', 'iconformer_mm', 'inspect', *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    as_tool = call(sys.executable, ROOT / 'tools' / 'inspect_model.py', *arguments)
    assert json.loads(result.stdout[result.stdout.index('{') :]) == json.loads(as_tool[as_tool.index('{') :])
    result = subprocess.run([sys.executable, '-m', 'iconformer_mm', 'trian'], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "error: unknown command 'trian' (did you mean 'train'?)\n"
