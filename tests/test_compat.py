"""Configs are found by the import name of their library; what watches tensors is known."""

import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from small_classifiers import classifier
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from iconformer_mm import inject
from iconformer_mm.compat import is_plain
from iconformer_mm.engine import load_config


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


def test_is_plain_unless_somebody_watches():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def function(x):
        seen.append(is_plain(x))
        return x + 1

    x = torch.ones(2)
    function(x)
    function(nn.Parameter(x))
    with torch.autocast('cpu', torch.bfloat16):
        function(x)
    assert seen == [True] * 3
    seen.clear()
    with Watch():
        function(x)
    torch.jit.trace(function, x, check_trace=False)
    function(x.to('meta'))
    with FakeTensorMode():
        function(torch.ones(2))
    assert seen == [False] * 4
    assert torch.equal(torch.compile(lambda x: x + is_plain(x), backend='eager')(x), x)


def test_mmcv_reads_maps_of_an_adapted_model_in_order():
    """A plain ViT's map is in channels_last, and so is what convolutions make of it. mmcv took it for contiguous."""
    ops = pytest.importorskip('mmcv.ops')
    inject(classifier(), 'icon')
    x = nn.Conv2d(4, 8, 1)(torch.randn(1, 4, 9, 12).to(memory_format=torch.channels_last)).detach()
    assert not x.is_contiguous()
    box, offset, mask = torch.tensor([[0, 1.0, 1.0, 6.0, 6.0]]), torch.randn(1, 18, 9, 12), torch.rand(1, 9, 9, 12)
    turned = torch.tensor([[0, 5.0, 5.0, 6.0, 6.0, 0.3]])
    deformed = ops.ModulatedDeformConv2d(8, 8, 3, padding=1)
    for read in (
        lambda x: ops.RoIAlign(3, 1.0, 2)(x, box),
        lambda x: ops.RoIAlignRotated(3, 1.0, 2)(x, turned),
        lambda x: deformed(x, offset, mask),
    ):
        a, b = (x.clone(memory_format=f).requires_grad_() for f in (torch.preserve_format, torch.contiguous_format))
        for each in (a, b):
            read(each).square().sum().backward()
        assert torch.equal(read(a), read(b))
        torch.testing.assert_close(a.grad, b.grad)
    reference = ops.RoIAlign(3, 1.0, 2, use_torchvision=True)(x, box)
    torch.testing.assert_close(ops.RoIAlign(3, 1.0, 2)(x, box), reference)


def test_operators_imported_after_the_backbone_is_adapted_read_in_order():
    """A head with RoIs may be made last, by one who adapts a backbone alone."""
    code = """
        import sys, timm, torch
        from iconformer_mm import inject
        from torch import nn
        assert 'mmcv.ops' not in sys.modules
        inject(timm.create_model('vit_tiny_patch16_224', depth=1), 'icon')
        from mmcv.ops import RoIAlign
        x = torch.randn(1, 4, 9, 12, generator=torch.Generator().manual_seed(0))
        box = torch.tensor([[0, 1.0, 1.0, 6.0, 6.0]])
        read = RoIAlign(3, 1.0, 2)
        torch.testing.assert_close(read(x.to(memory_format=torch.channels_last), box), read(x, box))
    """
    pytest.importorskip('mmcv.ops')
    subprocess.run([sys.executable, '-c', textwrap.dedent(code)], check=True)
