"""Nothing computes or stores what no gradient needs."""

import pytest
import torch
from families import FAMILIES, flatten, image, stir
from torch import nn

from iconformer_mm import inject
from iconformer_mm.adapters import ICoNAdapter
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.sites import find_sites

some = pytest.mark.parametrize(
    'family', [f for f in FAMILIES if f.name in ('ViT', 'Swin', 'SwinV2', 'mmseg MiT')], ids=str
)


def adapted(family, **options):
    model = family.build()
    inject(model, 'icon', **options)
    return stir(model).train()


@some
def test_what_comes_before_the_first_adapter_keeps_no_graph(family):
    model = adapted(family)
    first = get_injection(model).attachments[0].module
    seen = {}
    first.attn.register_forward_hook(lambda module, args, out: seen.update(attention=args[0]))
    first.ffn.register_forward_hook(lambda module, args, out: seen.update(ffn=args[0]))
    flatten(model(image(family.sizes[0])))
    assert not seen['attention'].requires_grad
    assert seen['ffn'].requires_grad


def stores_hidden(model, x):
    """Of each block: whether a forward pass stores what the second layer of its FFN reads."""
    inputs, kept = [], []
    for site in find_sites(model):
        linears = [m for m in site.block.ffn.modules() if isinstance(m, nn.Linear)]
        linears[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        flatten(model(x))
    places = {t.untyped_storage().data_ptr() for t in kept}
    return [t.untyped_storage().data_ptr() in places for t in inputs]


@pytest.mark.parametrize('family', [f for f in FAMILIES if f.name in ('ViT', 'Swin', 'SwinV2')], ids=str)
def test_frozen_layers_store_no_input_for_weights(family):
    """What the second layer of an FFN reads only its weight's gradient would need."""
    x = image(family.sizes[0])
    original = family.build()
    original.train()
    assert stores_hidden(original, x) == [True] * family.num_blocks
    assert stores_hidden(adapted(family), x) == [False] * family.num_blocks


@some
def test_backward_writes_gradients_of_adapters_only(family):
    model = adapted(family)
    computed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: computed.append(name))
    sum(t.square().mean() for t in flatten(model(image(family.sizes[0])))).backward()
    assert set(computed) == {n for n, _ in model.named_parameters() if is_adapter(n)}


@pytest.mark.parametrize('family', [f for f in FAMILIES if f.name in ('ViT', 'Swin', 'SwinV2')], ids=str)
@pytest.mark.parametrize('sites', [['attention'], ['ffn']])
def test_gradients_that_reach_an_adapter_lie_as_tokens_do(family, sites):
    """Not as the maps with channels first that a stage hands on, which every block before would copy."""
    model = adapted(family, sites=sites)
    contiguous = []

    def watch(module, args, delta):
        delta.register_hook(lambda grad: contiguous.append(grad.is_contiguous()))

    for module in model.modules():
        if isinstance(module, ICoNAdapter):
            module.register_forward_hook(watch)
    sum(out.square().sum() for out in flatten(model(image(family.sizes[0])))).backward()
    assert contiguous == [True] * family.num_blocks
