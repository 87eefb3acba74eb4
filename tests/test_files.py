"""How files are written: whole, and beside other writers."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from iconformer_mm.files import (
    TEMPORARY,
    DiskFullError,
    remove_abandoned,
    replaced_folder,
    require_space,
    write_json,
    written_whole,
)


@pytest.mark.skipif(os.name == 'nt', reason='folders cannot be synced there')
def test_the_entry_in_the_folder_is_brought_to_the_disk_after_the_renaming(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (events.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (events.append('renamed'), replace(a, b))[1])
    with written_whole(tmp_path / 'new' / 'a.txt') as temporary:
        temporary.write_text('x')
    place = events.index('renamed')
    assert events[place - 1].endswith('a.txt')
    assert {str(tmp_path / 'new'), str(tmp_path)} <= set(events[place + 1 :])


WRITER = """
import sys, time
from pathlib import Path
from iconformer_mm.files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text('complete')
    print('writing', flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_writer_stays_and_that_of_a_killed_one_goes(tmp_path):
    command = [sys.executable, '-c', WRITER]
    living, killed = (
        subprocess.Popen(
            [*command, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for name in ('living.txt', 'killed.txt')
    )
    for process in (living, killed):
        assert b'writing' in b''.join(iter(process.stdout.readline, b'writing\n')) + b'writing'
    (tmp_path / f'{TEMPORARY}empty').mkdir()  # of one that was killed at once
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 30
    while list(tmp_path.glob(f'{TEMPORARY}killed*')) and time.monotonic() < deadline:
        remove_abandoned(tmp_path)
    left = [path.name for path in tmp_path.glob(f'{TEMPORARY}*')]
    assert len(left) == 1 and left[0].startswith(f'{TEMPORARY}living')
    living.communicate(b'')
    assert living.returncode == 0
    assert (tmp_path / 'living.txt').read_text() == 'complete' and os.listdir(tmp_path) == ['living.txt']


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'new' / 'a.json'
    write_json(path, dict(a=[1, None, 'é']))
    assert json.loads(path.read_text(encoding='utf-8')) == dict(a=[1, None, 'é'])
    with pytest.raises(ValueError, match='Out of range float'):
        write_json(path, dict(a=math.nan))
    assert json.loads(path.read_text(encoding='utf-8'))['a'][0] == 1 and os.listdir(path.parent) == ['a.json']


def test_a_folder_is_replaced_by_a_whole_one_or_stays(tmp_path):
    path = tmp_path / 'new' / 'set'
    with replaced_folder(path) as folder:
        (folder / 'a').write_text('1')
        assert not path.exists()
    with replaced_folder(path) as folder:
        (folder / 'b').write_text('2')
    assert [p.name for p in path.iterdir()] == ['b']
    with pytest.raises(KeyError), replaced_folder(path) as folder:
        (folder / 'c').write_text('3')
        raise KeyError
    assert [p.name for p in path.iterdir()] == ['b'] and [p.name for p in path.parent.iterdir()] == ['set']


def test_space_on_the_disk(tmp_path):
    require_space(tmp_path / 'not' / 'there', 1, 'a letter')
    with pytest.raises(
        DiskFullError, match=r'a library needs about 1,000,000,000 MB in .*there, of which [\d,]+ MB are'
    ):
        require_space(tmp_path / 'not' / 'there', 10**15, 'a library')
    assert not list(tmp_path.iterdir())
