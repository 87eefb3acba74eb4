"""How files are written: whole, at the place that was meant, and beside other writers."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from iconformer_mm.checkpoint import DamagedFileError, read_safetensors, save_safetensors
from iconformer_mm.checkpoint.safetensors_io import TEMPORARY, parse_json, remove_abandoned, written_whole


def test_home_is_home_in_writing_as_in_reading(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save_safetensors({'w': torch.ones(2)}, '~/new/a.safetensors')
    assert (tmp_path / 'new' / 'a.safetensors').is_file()
    assert torch.equal(read_safetensors('~/new/a.safetensors')[1]['w'], torch.ones(2))


def test_a_checksum_of_others_is_theirs(tmp_path):
    save_file({'w': torch.ones(2)}, tmp_path / 'a.safetensors', metadata={'checksum': 'crc32:1234', 'format': 'pt'})
    metadata, tensors = read_safetensors(tmp_path / 'a.safetensors')
    assert metadata['checksum'] == 'crc32:1234' and torch.equal(tensors['w'], torch.ones(2))


def test_the_checksum_of_plain_weights_of_ours_is_looked_at(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_safetensors({'w': torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:-1] + b'\0')
    with pytest.raises(DamagedFileError, match='does not match its checksum'):
        read_safetensors(path)


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
from iconformer_mm.checkpoint.safetensors_io import written_whole
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


def test_a_key_twice_is_an_error():
    assert parse_json('{"a": {"b": 1}}') == dict(a=dict(b=1))
    with pytest.raises(ValueError, match="has the key 'b' twice"):
        parse_json('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match='nested too deeply'):
        parse_json('[' * 100_000)
