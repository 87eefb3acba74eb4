"""What is recorded of a frozen prefix, and that a replay gives what the backbone gives."""

import copy
import threading

import pytest
import torch
from families import FAMILIES, flatten, image, stir
from torch import nn

from iconformer_mm import inject, remove
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.prefix import FrozenPrefix, PrefixError, Replay

# One of each kind of host: a sequence, a pyramid with maps of every stage, blocks that read maps, blocks that share
# positions, other libraries.
HOSTS = ('ViT', 'DeiT III', 'EVA-02', 'ViT-SAM', 'SwinV2', 'timm DINOv2 with registers', 'mmseg BEiT', 'mmseg MiT')


def build(name):
    model = next(f for f in FAMILIES if f.name == name).build()
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
    return model


def adapted(name='ViT', method='icon', blocks='last:1', **options):
    torch.manual_seed(0)
    model = build(name)
    inject(model, method, **({} if method == 'frozen' else dict(blocks=blocks)), **options)
    return stir(model)


def plan_of(prefix, x):
    return prefix.plan(((x,), {}), ((x.flip(0),), {}), ((torch.zeros_like(x),), {}))


@pytest.mark.parametrize('method', ['icon', 'lora', 'ssf', 'vpt', 'frozen'])
@pytest.mark.parametrize('name', HOSTS)
def test_a_replay_gives_the_same_bits(name, method):
    if method == 'vpt' and name not in ('ViT', 'DeiT III', 'timm DINOv2 with registers'):
        pytest.skip('vpt is not defined for this host')
    model = adapted(name, method)
    family = next(f for f in FAMILIES if f.name == name)
    x = image(family.sizes[0])
    prefix = FrozenPrefix(get_injection(model))
    model.eval()
    expected = flatten(model(x))
    with prefix.installed():
        plan = plan_of(prefix, x)
        assert len(plan.blocks) == family.num_blocks - (method != 'frozen')
        records = prefix.record(plan, lambda: model(x))
        replay = Replay(prefix, plan, records)
        replay.begin()
        found = flatten(model(torch.zeros_like(x)))
        replay.end()
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected))
        # Without a run the backbone is as it was.
        assert all(torch.equal(a, b) for a, b in zip(flatten(model(x)), expected))
    assert all('forward' not in vars(model.get_submodule(name)) for name in plan.blocks)


def test_a_replay_runs_no_frozen_block():
    model = adapted().eval()
    x = image((64, 64))
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed():
        plan = plan_of(prefix, x)
        records = prefix.record(plan, lambda: model(x))
        ran = []
        for name in ('layers.0.attn', 'layers.1.attn'):
            model.get_submodule(name).register_forward_pre_hook(lambda *args, name=name: ran.append(name))
        with Replay(prefix, plan, records):
            model(torch.zeros_like(x))
    assert ran == ['layers.1.attn']


def test_what_is_recorded():
    x = image((64, 64))
    for name, method, places in (
        ('ViT', 'icon', {'layers.1'}),
        ('ViT', 'frozen', {'output'}),
        ('mmseg ViT', 'icon', {'layers.1', 'output'}),  # its first map comes from a frozen block
    ):
        prefix = FrozenPrefix(get_injection(adapted(name, method)))
        with prefix.installed():
            plan = plan_of(prefix, x)
        assert {value.place for value in plan.values} == places
        assert plan.ends_early == ('output' not in places)


def test_trained_norms_of_frozen_stages_are_read_before():
    """Weights of a classifier lack a detector's output norms, which are trained: their inputs are recorded."""
    torch.manual_seed(0)
    model = build('mmdet Swin')
    inject(model, 'icon', blocks='stage:3', unfreeze=['norm0', 'norm1'])
    x = image((64, 64))
    prefix = FrozenPrefix(get_injection(stir(model)))
    with prefix.installed():
        plan = plan_of(prefix, x)
        records = prefix.record(plan, lambda: model(x))
        assert {v.place for v in plan.values} == {'norm0', 'norm1', 'output', 'stages.3.blocks.0'}
        assert len(plan.blocks) == 4
        with torch.no_grad():
            model.norm0.weight.mul_(3)  # as training would
        model.eval()
        expected = model(x)
        with Replay(prefix, plan, records):
            found = model(torch.zeros_like(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_gradients_of_a_step_are_those_without_a_replay():
    model = adapted('mmseg ViT').train()
    x = image((64, 64))

    def gradients(images):
        model.zero_grad()
        sum(out.square().mean() for out in model(images)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(x)
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed():
        plan = plan_of(prefix, x)
        with Replay(prefix, plan, prefix.record(plan, lambda: model(x))):
            found = gradients(torch.zeros_like(x))
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_random_states_and_modes_stay():
    model = adapted().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed():
        plan_of(prefix, image((64, 64)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_other_threads_and_copies_run_as_always():
    model = adapted().eval()
    x = image((64, 64))
    expected = flatten(model(x))[0]
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed():
        plan = plan_of(prefix, x)
        found = []
        with Replay(prefix, plan, prefix.record(plan, lambda: model(x))):
            thread = threading.Thread(target=lambda: found.append(flatten(model(x))[0]))
            thread.start()
            thread.join()
            found.append(flatten(copy.deepcopy(model)(x))[0])
    assert all(torch.equal(out, expected) for out in found) and len(found) == 2
    remove(model)


# Where it cannot work


def refused(model, x=None):
    with pytest.raises(PrefixError) as error:
        prefix = FrozenPrefix(get_injection(model))
        with prefix.installed():
            plan_of(prefix, image((64, 64)) if x is None else x)
    return str(error.value)


def test_all_blocks_adapted():
    assert "'layers.0' is trained, and no frozen block comes before it" in refused(adapted(blocks='all'))
    assert "blocks='last:1'" in refused(adapted(blocks='first:1'))


def test_full_fine_tuning():
    model = build('ViT')
    inject(model, 'full')
    assert "method 'full' trains the whole backbone" in refused(model)


@pytest.mark.parametrize('pattern', ['cls_token', 'pos_embed'])
def test_trained_positions(pattern):
    assert f"'{pattern}' of the backbone is trained" in refused(adapted(unfreeze=[pattern]))


def test_a_trained_stem():
    assert "'patch_embed.projection' is trained, and no frozen block" in refused(adapted(unfreeze=['patch_embed.*']))


def test_a_trained_norm_in_the_prefix():
    assert "'layers.0' is trained" in refused(adapted(unfreeze=['layers.0.ln1.*']))


def test_dropout_in_the_prefix():
    model = adapted()
    model.drop_after_pos.p = 0.1
    assert 'dropout in 1 of them, such as drop_after_pos (Dropout)' in refused(model)


def test_drop_path_in_the_prefix():
    model = adapted('mmseg Swin', blocks='last:1')
    model.stages[1].blocks[0].attn.drop.drop_prob = 1e-9  # too rare to change anything here
    text = refused(model)
    assert 'drop_path_rate=0' in text and 'stages.1.blocks.0.attn.drop (DropPath)' in text


def test_dropout_after_the_prefix_is_fine():
    model = adapted()
    model.layers[1].ffn.layers[2].p = 0.5
    prefix = FrozenPrefix(get_injection(model.train()))
    with prefix.installed():
        assert plan_of(prefix, image((64, 64))).blocks


class Bypass(nn.Module):
    """A ViT whose image also reaches the output by a convolution."""

    def __init__(self):
        super().__init__()
        self.vit = build('ViT')
        self.conv = nn.Conv2d(3, 32, 16, 16)

    def forward(self, x):
        (tokens,) = self.vit(x)
        return tokens[:, 1:] + self.conv(x).flatten(2).transpose(1, 2)


def test_an_image_that_reaches_the_end_on_another_way():
    torch.manual_seed(0)
    model = Bypass()
    inject(model, 'icon', blocks='last:1', backbones=[''])
    assert "the prefix of Bypass is not a sequence. Besides what 'vit.layers.1' reads" in refused(model)


class Mixed(nn.Module):
    """A ViT that takes the first image of the batch from every image."""

    def __init__(self):
        super().__init__()
        self.vit = build('ViT')

    def forward(self, x):
        return self.vit(x - x[:1])


def test_images_of_a_batch_that_influence_each_other():
    model = Mixed()
    inject(model, 'icon', blocks='last:1', backbones=[''])
    x = image((64, 64))
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed(), pytest.raises(PrefixError, match='depends on the other images of the batch'):
        plan_of(prefix, x)


def test_more_or_fewer_calls_than_recorded():
    model = adapted().eval()
    x = image((64, 64))
    prefix = FrozenPrefix(get_injection(model))
    with prefix.installed():
        plan = plan_of(prefix, x)
        records = prefix.record(plan, lambda: model(x))
        with Replay(prefix, plan, records), pytest.raises(RuntimeError, match='called its backbone 2 times'):
            model(x)
            model(x)
        replay = Replay(prefix, plan, records)
        replay.begin()
        with pytest.raises(RuntimeError, match='0 times for a batch whose prefix was recorded with 1 calls'):
            replay.end()
        with Replay(prefix, plan, records), pytest.raises(RuntimeError, match='its images are of another size'):
            model(image((48, 80)))
