"""Every further block family with every method: exact at first, trained in all parts, removed without a trace."""

import pytest
import torch
from families import MORE_FAMILIES, flatten, image, stir

from iconformer_mm import inject, remove
from iconformer_mm.registry import PEFT_METHODS

METHODS = sorted(set(PEFT_METHODS.module_dict) - {'full', 'frozen'})
STARTS_ELSEWHERE = ('ssf', 'mona', 'vpt')
each_family = pytest.mark.parametrize('family', MORE_FAMILIES, ids=str)
each_method = pytest.mark.parametrize('method', METHODS)


def run(model, x):
    with torch.no_grad():
        return flatten(model(x))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def make(family):
    """A frozen model in which no bias is zero and no norm or scale is one."""
    torch.manual_seed(0)
    model = family.build()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.requires_grad_(False)
    model.eval()
    return model


def check(family, method):
    """Whether a method is defined for a family; an error of the test if it is not right where it is."""
    model = make(family)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    sizes = family.sizes if method in ('icon', 'adapter') else family.sizes[-1:]
    before = {size: run(model, image(size)) for size in sizes}
    try:
        summary = inject(model, method)
    except ValueError as error:
        assert list(model.state_dict()) == keys and all('forward' not in vars(m) for m in model.modules())
        assert equal(run(model, image(sizes[-1])), before[sizes[-1]])
        return str(error)
    model.eval()
    assert summary.adapters == summary.trainable > 0
    for size in sizes:
        assert equal(run(model, image(size)), before[size]) != (method in STARTS_ELSEWHERE)
    stir(model)
    outputs = flatten(model(image(sizes[-1])))
    assert not equal(outputs, before[sizes[-1]])
    # Not the mean of squares: where a norm is last, it is the same whatever comes in.
    sum((t.float() * torch.randn_like(t.float())).sum() for t in outputs).backward()
    without = [n for n, p in model.named_parameters() if 'adapter' in n and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None for n, p in model.named_parameters() if 'adapter' not in n)
    remove(model)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert all(equal(run(model, image(size)), before[size]) for size in sizes)
    return None


@each_family
@each_method
def test_each_method(method, family):
    refusal = check(family, method)
    print(family, method, refusal)
