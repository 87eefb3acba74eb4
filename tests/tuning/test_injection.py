"""The invariants of an injection, for every block family."""

import copy
import math
import pickle
from dataclasses import replace
from inspect import signature

import pytest
import torch
from families import FAMILIES, SWIN, VIT, flatten, image, stir
from torch import nn

from iconformer_mm import inject, remove, summarize
from iconformer_mm.adapters import ICoNAdapter
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.sites import FAMILIES as BLOCK_FAMILIES
from iconformer_mm.tuning.sites import BlockFamily, FromPatchEmbed

each_family = pytest.mark.parametrize('family', FAMILIES, ids=str)
each_method = pytest.mark.parametrize('method', ['icon', 'adaptformer'])


def frozen(model: nn.Module) -> nn.Module:
    """The original, its weights frozen as in the adapted model: attention kernels depend on that."""
    model.requires_grad_(False).eval()  # whose result is None for some backbones
    return model


def count_forwards(model: nn.Module) -> list[int]:
    """A counter of how often the blocks' own forward passes run."""
    count = [0]
    for attachment in get_injection(model).attachments:

        def counted(*args, forward=attachment.joint.host_forward, **kwargs):
            count[0] += 1
            return forward(*args, **kwargs)

        attachment.joint.host_forward = counted
    return count


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach() for t in flatten(model(x))]


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert torch.equal(a, b)


def vit() -> nn.Module:
    from mmpretrain.models.backbones import VisionTransformer

    return VisionTransformer(arch=VIT, img_size=64, out_type='raw')


@each_family
@each_method
@pytest.mark.parametrize('input', ['normed', 'residual'])
def test_outputs_before_training_are_the_originals(family, method, input):
    model = family.build()
    model.init_weights()
    original = frozen(copy.deepcopy(model))
    summary = inject(model, method, input=input)
    model.eval()
    assert summary.num_sites == family.num_blocks
    for size in family.sizes:
        for batch in (1, 2):
            x = image(size, batch)
            assert_equal(run(model, x), run(original, x))


@each_family
def test_init_weights_after_injection_keeps_the_outputs(family):
    model = family.build()
    original = copy.deepcopy(model)
    inject(model)
    for m in (model, original):
        torch.manual_seed(3)
        m.init_weights()
    x = image(family.sizes[0])
    assert_equal(run(model.eval(), x), run(frozen(original), x))


@each_family
def test_remove_gives_the_original_back(family):
    model = family.build()
    keys, grads = list(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    original = frozen(copy.deepcopy(model))
    inject(model)
    stir(model)
    x = image(family.sizes[0])
    assert not torch.equal(run(model.eval(), x)[-1], run(original, x)[-1])
    remove(model)
    assert list(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert type(model) is type(original)
    assert summarize(model).method is None
    assert_equal(run(frozen(model), x), run(original, x))


@each_family
def test_only_names_with_adapter_are_added(family):
    model = family.build()
    before = model.state_dict()
    inject(model)
    added = set(model.state_dict()) - set(before)
    assert added and all('adapter' in name for name in added)
    result = model.load_state_dict(before, strict=False)
    parameters = dict(model.named_parameters())
    assert {name for name in result.missing_keys if name in parameters} == added
    assert not result.unexpected_keys


@each_family
def test_training_changes_adapters_and_nothing_else(family):
    model = family.build()
    model.init_weights()
    inject(model)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        sum((t.float() - 1).square().mean() for t in flatten(model(image(family.sizes[-1], seed=step)))).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == ('adapter' not in name), name
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ('adapter' not in name), name


@each_family
def test_each_adapter_sees_its_own_grid(family):
    """The adapter is told the grid that the image's size and the stride give."""
    model = family.build()
    inject(model)
    stir(model.eval())
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append((args[0].shape[1], args[1])))
        for m in model.modules()
        if isinstance(m, ICoNAdapter)
    ]
    for size in family.sizes:
        seen.clear()
        run(model, image(size))
        assert len(seen) == family.num_blocks
        for tokens, grid in seen:
            assert tokens == grid.num_tokens
            if family.stride:
                assert (grid.height, grid.width) == tuple(math.ceil(side / family.stride) for side in size)
            else:
                assert grid.num_prefix_tokens == 0
                assert abs(grid.width - grid.height * size[1] / size[0]) <= 1 + size[1] / size[0]
    for hook in hooks:
        hook.remove()


@each_family
def test_deepcopy_is_independent(family):
    model = family.build()
    inject(model)
    twin = copy.deepcopy(model)
    x = image(family.sizes[0])
    before = run(model.eval(), x)
    stir(twin)
    assert_equal(run(model, x), before)
    assert not torch.equal(run(twin.eval(), x)[-1], before[-1])
    remove(twin)
    assert_equal(run(frozen(twin), x), before)
    assert summarize(model).method == 'icon'


@pytest.mark.parametrize('method', ['icon', 'adapter', 'lora', 'vpt'])
def test_pickle(method):
    model = vit()
    inject(model, method)
    stir(model).eval()
    twin = pickle.loads(pickle.dumps(model))
    assert_equal(run(twin, image((64, 64))), run(model, image((64, 64))))


@pytest.mark.parametrize('family', [f for f in FAMILIES if f.build_with_cp], ids=str)
def test_gradient_checkpointing(family):
    """Same gradients as without, also when another size came in between forward and backward."""
    plain, checkpointed = family.build(), family.build_with_cp()
    checkpointed.load_state_dict(plain.state_dict(), strict=False)  # SwinV2 leaves its own tables out
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        inject(model)
        stir(model).train()
        torch.manual_seed(5)
        losses = [sum(t.square().mean() for t in flatten(model(image(size)))) for size in family.sizes]
        sum(losses).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    actual = {n: p.grad for n, p in checkpointed.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize(
    ('family', 'method'), [(f, 'icon') for f in FAMILIES] + [(f, 'vpt') for f in FAMILIES if f.name == 'ViT'], ids=str
)
def test_gradient_checkpointing_of_any_host(family, method):
    """By our own option, also where the backbone has none: the same gradients."""
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = family.build()
        inject(model, method, with_cp=with_cp)
        stir(model).train()
        torch.manual_seed(5)
        host_forwards = count_forwards(model)
        losses = [sum(t.square().mean() for t in flatten(model(image(size)))) for size in family.sizes]
        sum(losses).backward()
        assert host_forwards[0] == family.num_blocks * len(family.sizes) * (2 if with_cp else 1)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_gradient_checkpointing_needs_adapted_blocks():
    model = vit()
    with pytest.raises(ValueError, match="with_cp recomputes adapted blocks, and method 'bitfit' adapts none"):
        inject(model, 'bitfit', with_cp=True)
    assert summarize(model).method is None


def test_gradient_checkpointing_recomputes():
    """It does save memory: blocks run again in the backward pass."""
    family = next(f for f in FAMILIES if f.name == 'Swin')
    model = family.build_with_cp()
    inject(model)
    calls = []
    model.stages[0].blocks[0].ffn.register_forward_pre_hook(lambda *args: calls.append(1))
    model.train()
    flatten(model(image((64, 64))))[-1].sum().backward()
    assert len(calls) == 2
    remove(model)
    assert model.stages[0].blocks[0].with_cp


@each_family
def test_bfloat16_autocast(family):
    model = family.build()
    inject(model)
    stir(model).train()
    with torch.autocast('cpu', torch.bfloat16):
        outputs = flatten(model(image(family.sizes[0])))
    sum(t.float().mean() for t in outputs).backward()
    for name, parameter in model.named_parameters():
        if 'adapter' in name:
            assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name


def test_half_precision_hosts_get_half_precision_adapters():
    model = vit().to(torch.bfloat16)
    inject(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert run(model.eval(), image((64, 64)).to(torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['ViT', 'Swin', 'timm ViT'])
def test_torch_compile(name):
    family = next(f for f in FAMILIES if f.name == name)
    model = family.build()
    inject(model)
    stir(model).eval()
    x = image(family.sizes[0])
    expected = run(model, x)
    # The eager backend traces the whole graph without generating code for it.
    compiled = torch.compile(model, backend='eager')
    for a, b in zip(run(compiled, x), expected):
        torch.testing.assert_close(a, b)
    sum(t.mean() for t in flatten(compiled(x))).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'adapter' in n)


@pytest.mark.parametrize('name', ['ViT', 'Swin'])
@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx_export(name, dynamo, tmp_path):
    two_exporters = 'dynamo' in signature(torch.onnx.export).parameters
    if dynamo and not two_exporters:
        pytest.skip('the exporter by torch.export came with torch 2.5')
    onnxruntime = pytest.importorskip('onnxruntime')
    family = next(f for f in FAMILIES if f.name == name)
    model = family.build()
    inject(model)
    stir(model).eval()
    x = image(family.sizes[0], batch=2)
    path = tmp_path / 'model.onnx'
    options = dict(verbose=False) if dynamo else dict(opset_version=17)
    if two_exporters:
        options['dynamo'] = dynamo
    torch.onnx.export(model, (x,), str(path), input_names=['x'], **options)
    session = onnxruntime.InferenceSession(path)
    for a, b in zip(session.run(None, {'x': x.numpy()}), run(model, x)):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=2e-5, rtol=1e-4)


def test_same_seed_same_result():
    def train():
        torch.manual_seed(7)
        model = vit()
        model.init_weights()
        inject(model, dropout=0.2)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            flatten(model(image((64, 64), seed=step)))[0].square().mean().backward()
            optimizer.step()
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_stages_and_batch_norm():
    """The host's train() neither freezes adapters nor wakes BatchNorm up."""
    from mmpretrain.models.backbones import SwinTransformer

    model = SwinTransformer(arch=SWIN, img_size=64, frozen_stages=2, pad_small_map=True)
    model.stages[3].norm = nn.BatchNorm2d(4)
    inject(model, dropout=0.1)
    assert model.train() is model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ('adapter' in name), name
    assert not model.stages[3].norm.training
    assert not model.stages[0].blocks[0].ffn.training  # the host's frozen stage stays as it wants
    assert model.stages[0].blocks[0].adapter_attention.dropout.training
    assert model.eval() is model
    assert not model.stages[0].blocks[0].adapter_attention.dropout.training


def test_frozen_and_full():
    from mmpretrain.models.backbones import ResNet

    model = vit()
    keys = list(model.state_dict())
    total = sum(p.numel() for p in model.parameters())
    summary = inject(model, 'frozen')
    assert (summary.trainable, summary.frozen, summary.backbone_share) == (0, total, 0)
    assert list(model.state_dict()) == keys
    remove(model)
    summary = inject(model, 'full')
    assert (summary.trainable, summary.frozen, summary.backbone_share) == (total, 0, 1)
    # These two need no known block, and keep BatchNorm on its statistics.
    resnet = ResNet(18)
    inject(resnet, 'frozen')
    buffers = {n: b.clone() for n, b in resnet.named_buffers()}
    resnet.train()
    resnet(image((64, 64)))
    assert all(torch.equal(b, buffers[n]) for n, b in resnet.named_buffers())


def test_heads_stay_trainable_and_never_count():
    from mmpretrain.models import build_classifier

    model = build_classifier(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=VIT, img_size=64, out_type='avg_featmap'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
        )
    )
    head = 32 * 10 + 10
    backbone = sum(p.numel() for p in model.backbone.parameters())
    summary = inject(model, bottleneck=8)
    assert summary.trainable == summary.adapters + head
    assert summary.frozen == summary.backbone == backbone
    assert summary.backbone_share == summary.adapters / backbone
    assert summary.parts['head'] == (head, head)
    text = str(summary)
    assert f'{summary.adapters:,}' in text and f'{head}' in text and '2 x mmpretrain ViT' in text
    assert summarize(model) == summary


def test_summary_is_text_in_a_notebook_too(monkeypatch):
    summary = inject(vit(), bottleneck=8)
    text = str(summary)
    monkeypatch.setattr('rich.console._is_jupyter', lambda: True)
    assert str(summary) == text != ''


def test_nothing_matched_is_an_error():
    from mmpretrain.models.backbones import ResNet

    model = ResNet(18)
    with pytest.raises(ValueError) as error:
        inject(model)
    message = str(error.value)
    assert 'no known Transformer block in ResNet' in message
    assert 'swin_transformer.SwinBlock' in message  # what was looked for
    assert 'resnet.BasicBlock' in message  # what was there
    assert summarize(model).frozen == 0


def test_subclasses_with_a_forward_of_their_own_do_not_match():
    from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

    class Scaled(TransformerEncoderLayer):
        def forward(self, x):
            return 2 * super().forward(x)

    model = vit()
    for layer in model.layers:
        layer.__class__ = Scaled
    with pytest.raises(ValueError, match='no known Transformer block in VisionTransformer'):
        inject(model)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            dict(method='icn'),
            r"unknown PEFT method 'icn' \(did you mean 'icon'\?\); known: adapter, adaptformer, b",
        ),
        (dict(bottelneck=8), r"unknown option 'bottelneck' of PEFT method 'icon' \(did you mean 'bottleneck'\?\)"),
        (dict(method='frozen', bottleneck=8), "unknown option 'bottleneck' of PEFT method 'frozen'; it takes none"),
        (dict(method=dict(bottleneck=8)), 'needs a type'),
        (dict(input='raw'), "input must be one of normed, residual, output, sum, got 'raw'"),
        (dict(bottleneck=0), 'bottleneck must be an integer of at least 1'),
        (dict(kernel_size=4), 'kernel_size must be odd'),
    ],
)
def test_a_refused_model_is_untouched(arguments, message):
    model = vit()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(model, **arguments)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert 'forward' not in vars(model.layers[0]) and not model.patch_embed._forward_hooks


def test_refuses_a_second_injection_and_an_empty_removal():
    model = vit()
    with pytest.raises(ValueError, match='VisionTransformer is not adapted'):
        remove(model)
    inject(model)
    with pytest.raises(ValueError, match=r"adapted already, by 'icon'; call remove\(model\) first"):
        inject(model, 'adaptformer')


def test_refuses_hosts_that_use_the_name():
    model = vit()
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="have 'adapter' in their names"):
        inject(model)


def test_a_block_without_its_patch_embedding():
    model = vit()
    inject(model)
    with pytest.raises(RuntimeError, match='ran before its patch embedding'):
        model.layers[0](torch.zeros(1, 17, 32))


def test_a_new_family_is_one_entry():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return x

    family = BlockFamily(
        'mine',
        f'{Block.__module__}.{Block.__qualname__}',
        FromPatchEmbed(lambda module, inputs, output: tuple(output.shape[-2:]), num_prefix_tokens=0),
        norm='norm',
        ffn='mlp',
        attention_norm='norm1',
    )
    BLOCK_FAMILIES.append(family)
    try:
        with pytest.raises(ValueError, match=r"blocks\.0 has no submodule 'norm1', .* it has: norm, mlp"):
            inject(Host())
    finally:
        BLOCK_FAMILIES.remove(family)
    family = replace(family, attention_norm=None)
    BLOCK_FAMILIES.append(family)
    try:
        model = Host()
        original = frozen(copy.deepcopy(model))
        assert inject(model).sites == {'mine': ['blocks.0', 'blocks.1']}
        assert_equal(run(model, image((12, 20))), run(original, image((12, 20))))
    finally:
        BLOCK_FAMILIES.remove(family)
