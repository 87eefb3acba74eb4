"""Configs of a library are found by its import name, whichever distribution it came with; ours in a checkout, too."""

import pytest
from conftest import ROOT
from mmengine.config import Config

from iconformer_mm.apis import load_config


@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_bases_of_the_libraries(library, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{library}::_base_/default_runtime.py'\n")
    assert Config.fromfile(path).default_scope == library


@pytest.mark.parametrize('name', ['scenes/mask-rcnn_swin-scenes_fpn_icon_target', '_base_/models/vit-quickstart'])
def test_ours(name, tmp_path):
    """As if the file had been given by its path: no scope is added, which would be one without these types."""
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'iconformer_mm::{name}.py'\n")
    expected = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    assert Config.fromfile(path).to_dict() == expected.to_dict()
    assert load_config(f'iconformer_mm::{name}').model.to_dict() == expected.model.to_dict()


def test_ours_that_is_not_there(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("_base_ = 'iconformer_mm::nowhere/icon.py'\n")
    with pytest.raises(FileNotFoundError, match='configs/nowhere/icon.py'):
        Config.fromfile(path)
