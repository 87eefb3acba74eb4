"""A quantised host is refused where gradients are needed, and takes what needs none."""

import copy

import pytest
import torch
from families import FAMILIES, flatten, image
from torch import nn

from iconformer_mm import add_adapter, inject, list_adapters, summarize
from iconformer_mm.compat import device_of, dtype_of

METHODS = ['icon', 'adaptformer', 'adapter', 'lora', 'ssf', 'vpt', 'bitfit', 'norm', 'partial', 'full']


def quantised():
    backbone = next(f for f in FAMILIES if f.name == 'ViT').build()
    backbone.eval()
    return torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings('ignore')
def test_no_gradient_passes_a_quantised_layer():
    """Why it is refused."""
    layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
    x = torch.ones(1, 4, requires_grad=True)
    (x.sum() + layer(x).square().sum()).backward()
    assert torch.equal(x.grad, torch.ones(1, 4))  # of the sum only


@pytest.mark.parametrize('method', METHODS)
def test_methods_that_train_in_it_are_refused(method):
    backbone = quantised()
    with pytest.raises(ValueError, match=f"8 layers of VisionTransformer are quantised, .* method '{method}' would"):
        inject(backbone, method)
    assert not hasattr(backbone, '_peft_injection') and not any('adapter' in n for n, _ in backbone.named_parameters())


def test_a_head_is_trained_on_it():
    backbone = quantised()
    expected = flatten(copy.deepcopy(backbone)(image((64, 64))))
    inject(backbone, 'frozen')
    assert summarize(backbone).trainable == 0
    assert all(torch.equal(a, b) for a, b in zip(flatten(backbone(image((64, 64)))), expected))


def test_what_would_be_trained_in_it_later_is_refused():
    backbone = quantised()
    with pytest.raises(ValueError, match='8 layers of VisionTransformer are quantised'):
        inject(backbone, 'frozen', unfreeze=['patch_embed.*'])
    inject(backbone, 'frozen')
    with pytest.raises(ValueError, match='8 layers of VisionTransformer are quantised'):
        add_adapter(backbone, 'another', 'adaptformer')
    assert list_adapters(backbone) == ['default']


def test_modules_without_parameters_have_a_device_and_a_dtype():
    assert device_of(nn.Identity()) == torch.device('cpu') and dtype_of(nn.Identity()) == torch.float32
    assert (
        dtype_of(nn.Linear(2, 2).half()) == torch.float16 and device_of(nn.Linear(2, 2, device='meta')).type == 'meta'
    )
    packed = nn.Module()
    packed.register_parameter('weight', nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    packed.register_buffer('scale', torch.ones(1, dtype=torch.bfloat16))
    assert dtype_of(packed) == torch.bfloat16
