"""The script for a GPU, without one: its parts are small programs here, and the commands of the real ones exist."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
import gpu  # noqa: E402


def program(code, seconds=60, needs=()):
    return gpu.Part(('-c', code), seconds, needs)


def test_parts_run_in_order_and_are_kept(tmp_path):
    parts = {
        'good': program("print('measured')"),
        'bad': program('raise SystemExit(3)'),
        'slow': program('import time; time.sleep(60)', seconds=1),
        'absent': program('', needs=('no_such_package',)),
        'last': gpu.Part(('-c', 'import sys, pathlib; pathlib.Path(sys.argv[1], "x").touch()', 'OUT'), 60, ()),
    }
    states = gpu.run_parts(parts, tmp_path, 60)
    expected = dict(good='done', bad='failed', slow='out of time', absent='not installed: no_such_package', last='done')
    assert {name: state['state'] for name, state in states.items()} == expected
    assert json.loads((tmp_path / 'states.json').read_text()) == states
    assert (tmp_path / 'good' / 'output.log').read_text() == 'measured\n' and (tmp_path / 'last' / 'x').exists()
    # Again: what is done is not run, what failed is.
    parts = dict(good=program('raise SystemExit(1)'), bad=program(''))
    assert {name: gpu.run_parts(parts, tmp_path, 60)[name]['state'] for name in parts} == dict(good='done', bad='done')


def test_nothing_is_begun_without_time(tmp_path):
    assert gpu.run_parts(dict(one=program('')), tmp_path, 2)['one'] == dict(state='no time left')


def test_the_commands_are_those_of_the_benchmarks(capsys):
    for part in gpu.PARTS.values():
        script = part.command[0]
        assert script == '-m' or (ROOT / script).is_file(), script
    assert gpu.main(['--list']) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(gpu.PARTS)
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.BUDGET + 60


def test_a_machine_without_a_gpu_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match='torch sees no CUDA device here'):
        gpu.main(['--out', str(tmp_path)])
