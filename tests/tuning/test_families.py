"""Every further block family with every method: exact at first, trained in all parts, removed without a trace."""

import copy
import pickle

import families_table
import pytest
import torch
from conftest import ROOT
from families import MORE_FAMILIES, flatten, image, stir
from mmengine.config import Config
from torch import nn

from iconformer_mm import BlockFamily, inject, register_family, remove, summarize
from iconformer_mm.adapters import TokenGrid
from iconformer_mm.tuning import FAMILIES, get_injection
from iconformer_mm.tuning.families import FromPatchEmbed
from iconformer_mm.tuning.sites import find_sites

by_name = {family.name: family for family in MORE_FAMILIES}
each_family = pytest.mark.parametrize('family', MORE_FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def _known_families():
    """No test leaves a family behind."""
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


def run(model, x):
    with torch.no_grad():
        return flatten(model(x))


def close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@each_family
def test_every_method(family):
    """As the table in the docs says: right, or refused for the reason named there."""
    row = families_table.row_of(family)
    assert row in (ROOT / 'docs' / 'families.md').read_text(encoding='utf-8').splitlines(), (
        'docs/families.md is not up to date; run `python tests/families_table.py`'
    )
    assert 'wrong' not in row


@each_family
def test_number_of_blocks_and_pickle(family):
    model = families_table.make(family)
    assert len(find_sites(model)) == family.num_blocks
    inject(model, 'adaptformer')
    stir(model)
    x = image(family.sizes[0], batch=1)
    twin = pickle.loads(pickle.dumps(model)) if family.name != 'LeViT' else copy.deepcopy(model)  # of a local class
    assert all(torch.equal(a, b) for a, b in zip(run(twin, x), run(model, x), strict=True))


def gradients(model, sizes):
    model.train()
    torch.manual_seed(5)
    sum(
        (t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for s in sizes for t in flatten(model(image(s)))
    ).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def checkpoint_by_host(model):
    """Switch gradient checkpointing on as the host has it; whether it has any."""
    if hasattr(model, 'set_grad_checkpointing'):
        model.set_grad_checkpointing(True)
        return True
    flags = [(m, f) for m in model.modules() for f in ('with_cp', 'use_checkpoint') if hasattr(m, f)]
    for module, flag in flags:
        setattr(module, flag, True)
    return bool(flags)


CHECKPOINTED = ('timm EVA-02', 'timm NaFlexViT', 'timm DaViT', 'timm MViTv2', 'timm TNT', 'DaViT', 'TinyViT', 'MixMIM')


@pytest.mark.parametrize('name', CHECKPOINTED)
@pytest.mark.parametrize('ours', [False, True])
def test_gradient_checkpointing(name, ours):
    """By the host's own way and by ours: the same gradients, and blocks do run twice."""
    results, calls = [], []
    for recomputed in (False, True):
        model = families_table.make(by_name[name])
        if recomputed and not ours:
            assert checkpoint_by_host(model)
        torch.manual_seed(0)
        inject(model, 'icon', with_cp=recomputed and ours)
        stir(model)
        block = get_injection(model).attachments[0].module
        count = [0]
        ffn = block.get_submodule(get_injection(model).attachments[0].family.ffn)
        ffn.register_forward_pre_hook(lambda *args, count=count: count.__setitem__(0, count[0] + 1))
        results.append(gradients(model, by_name[name].sizes))
        calls.append(count[0])
    assert calls[1] == 2 * calls[0] > 0
    assert results[0].keys() == results[1].keys()
    for key, grad in results[0].items():
        torch.testing.assert_close(results[1][key], grad, msg=key, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('name', ['timm EVA-02', 'timm XCiT', 'DaViT'])
def test_torch_compile(name):
    model = families_table.make(by_name[name])
    inject(model)
    stir(model)
    x = image(by_name[name].sizes[0])
    close(run(torch.compile(model, backend='eager'), x), run(model, x))


def xcit(block, x, a):
    x = x + block.gamma1 * block.attn(block.norm1(x)) + a(block.norm1(x))
    x = x + block.gamma3 * block.local_mp(block.norm3(x), 4, 4)
    return x + block.gamma2 * block.mlp(block.norm2(x))


def mm_xcit(block, x, a):
    x = x + block.gamma1 * block.attn(block.norm1(x)) + a(block.norm1(x))
    x = x + block.gamma3 * block.local_mp(block.norm3(x), 4, 4)
    return x + block.gamma2 * block.ffn(block.norm2(x), identity=0)


def eva(block, x, a):
    x = x + block.attn(block.norm1(x)) + a(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def parallel(block, x, a):
    return block(x) + a(block.in_norm(x))


def davit(block, x, a):
    size = x.shape
    x = block.cpe1(x).flatten(2).transpose(1, 2)
    attended = x + block.attn(block.norm1(x)) + a(block.norm1(x))
    x = block.cpe2(attended.transpose(1, 2).reshape(size)).flatten(2).transpose(1, 2)
    return (x + block.mlp(block.norm2(x))).transpose(1, 2).reshape(size)


def edgenext(block, x, a):
    pieces = torch.split(x, block.conv_channels, dim=1)
    y = pieces[0]
    outs = []
    for i, conv in enumerate(block.conv_modules):
        y = conv(y if i == 0 else y + pieces[i])
        outs.append(y)
    y = torch.cat([*outs, pieces[block.num_convs]], 1).flatten(2).transpose(1, 2)
    if block.pos_embed:
        y = y + block.pos_embed((len(x), *x.shape[2:])).flatten(2).transpose(1, 2)
    y = y + block.gamma_csa * block.csa(block.norm_csa(y)) + a(block.norm_csa(y))
    y = y.reshape(len(x), *x.shape[2:], -1)
    y = block.gamma * block.pointwise_conv2(block.act(block.pointwise_conv1(block.norm(y))))
    return x + y.permute(0, 3, 1, 2)


FORMULAS = {
    'timm XCiT': (xcit, (2, 16, 32), (4, 4)),
    'XCiT': (mm_xcit, (2, 16, 32), (4, 4)),
    'timm EVA-02': (eva, (2, 17, 32), ()),
    'timm ViT parallel': (parallel, (2, 17, 32), ()),
    'timm DaViT': (davit, (2, 16, 4, 4), ()),
    'EdgeNeXt': (edgenext, (2, 16, 4, 4), ()),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_what_a_block_computes(name):
    """The adapter parallel to attention gives what a copy of the block's code with it gives."""
    formula, shape, arguments = FORMULAS[name]
    model = families_table.make(by_name[name])
    summary = inject(model, 'adapter', input='normed', sites=['attention'], bottleneck=4)
    stir(model)
    run(model, image(by_name[name].sizes[0]))
    # Of DaViT the channel block, whose attention sees the whole map.
    site = 'stages.0.blocks.0.1' if name == 'timm DaViT' else next(iter(summary.sites.values()))[0]
    block, x = model.get_submodule(site), torch.randn(shape)
    adapter = block.adapter_attention
    with torch.no_grad():
        actual = block(x, *arguments)
        remove(model)
        close([actual], [formula(block, x, adapter)])


def test_blocks_that_change_the_grid():
    """No adapter stands parallel to attention that pools; those after it see the grid behind it."""
    model = families_table.make(by_name['timm MViTv2'])
    summary = inject(model, 'icon')
    assert summary.sites == {'timm MViT': ['stages.0.blocks.0', 'stages.1.blocks.1']}
    remove(model)
    summary = inject(model, 'icon', sites=['ffn'])
    assert summary.num_sites == 4
    grids = []
    for name, module in model.named_modules():
        if name.endswith('.adapter'):
            module.register_forward_hook(lambda m, args, out: grids.append((args[1].height, args[1].width)))
    run(model, image((64, 64)))
    assert grids == [(16, 16), (8, 8), (8, 8), (4, 4)]


def test_tokens_in_the_order_of_mask_units():
    """Hiera's adapters see the map that Hiera itself makes of its tokens."""
    model = families_table.make(by_name['timm Hiera'])
    inject(model, 'icon', sites=['ffn'], input='residual')
    stir(model)
    seen, maps, handles = [], [], []
    for i, block in enumerate(model.blocks):
        block.adapter.register_forward_hook(lambda m, args, out: seen.append((args[0], args[1].height, out)))
        handles.append(block.norm2.register_forward_pre_hook(lambda m, x, i=i: maps.append(model.reroll(x[0], i))))
    run(model, image((64, 64)))
    assert [height for _, height, _ in seen] == [16, 8, 4, 4, 2]
    for (tokens, height, _), expected in zip(seen, maps, strict=True):
        assert torch.equal(tokens.unflatten(1, (height, height)), expected)
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match='with some of them masked they lie on no grid'):
        model(image((64, 64)), mask=torch.tensor([[True, False, True, True]] * 2))


def test_blocks_without_attention():
    model = families_table.make(by_name['PoolFormer'])
    with pytest.raises(ValueError, match=r"mmpretrain PoolFormer blocks have no attention .* set sites=\['ffn'\]"):
        inject(model, 'icon')
    with pytest.raises(ValueError, match=r"no linear map q, v, since they have only ffn; set targets=\['fc1', 'fc2'\]"):
        inject(model, 'lora')
    assert summarize(model).method is None
    assert inject(model, 'icon', sites=['ffn']).num_sites == 4
    remove(model)
    assert inject(model, 'lora', targets=['fc1', 'fc2']).num_sites == 4


def test_reversible_blocks_are_refused_with_the_reason():
    from mmpretrain.models.backbones import RevVisionTransformer

    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    model = RevVisionTransformer(arch=arch, img_size=64)
    with pytest.raises(ValueError, match='RevTransformerEncoderLayer.* take no adapters: its backward pass recomputes'):
        inject(model)
    assert inject(model, 'norm').adapters > 0


def test_images_of_several_sizes_have_no_grid():
    model = families_table.make(by_name['timm NaFlexViT'])
    patches = torch.rand(2, 6, 16 * 16 * 3)
    coordinates = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing='ij'), -1).view(1, 6, 2)
    batch = dict(
        patches=patches, patch_coord=coordinates.expand(2, 6, 2), patch_valid=torch.ones(2, 6, dtype=torch.bool)
    )
    before = run(model, batch)
    inject(model, 'adaptformer')
    assert torch.equal(run(model, batch)[0], before[0])
    remove(model)
    inject(model, 'icon')
    with pytest.raises(ValueError, match='images of several sizes, whose tokens lie on no common grid'):
        model(batch)


def test_unread_parameters_are_not_trained():
    """In a ViT that returns its class token the filter of the last block is neither trained nor counted as such."""
    from mmpretrain.models.backbones import VisionTransformer

    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
    for options, last in ((dict(out_type='raw'), None), (dict(out_type='cls_token'), 2), (dict(out_indices=[0, 1]), 1)):
        model = VisionTransformer(arch=arch, img_size=64, **options)
        summary = inject(model, 'icon', bottleneck=4)
        untrained = {n for n, p in model.named_parameters() if 'adapter' in n and not p.requires_grad}
        places = {f'layers.{last}.adapter_attention.icon.{n}' for n in ('gamma', 'beta', 'generator.weight')}
        assert untrained == (places if last is not None else set())
        without = sum(model.get_parameter(n).numel() for n in untrained)
        assert summary.adapters - summary.trainable == without
        stir(model).train()
        sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in flatten(model(image((64, 64))))).backward()
        read = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith(('layers.0', 'layers.1'))]
        assert all(p.grad.any() for p in read)


class Copied(nn.Module):
    """A block of someone's own, built as timm builds them."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Host(nn.Module):
    def __init__(self, block=Copied):
        super().__init__()
        self.num_prefix_tokens = 0
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([block(8), block(8)])

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class Maps(nn.Module):
    """A host of a block of maps (B, d, H, W)."""

    def __init__(self, block):
        super().__init__()
        self.patch_embed, self.block = nn.Conv2d(3, 8, 4, 4), block

    def forward(self, x):
        return self.block(self.patch_embed(x))


GRID = FromPatchEmbed(lambda module, inputs, output: tuple(output.shape[-2:]), 0)


@pytest.mark.parametrize('block', [Copied, f'{__name__}.Copied', 'Copied'], ids=['class', 'path', 'name'])
def test_a_copied_block(block):
    model = Host()
    before = run(model, image((12, 20)))
    with pytest.raises(ValueError, match=r"register_family\(like='NAME', block='PATH'\)"):
        inject(model)
    summary = inject(model, families=[dict(like='timm ViT', block=block, grid=GRID)])
    assert summary.sites == {'Copied': ['blocks.0', 'blocks.1']}
    close(run(model, image((12, 20))), before)
    twin = copy.deepcopy(model)
    assert summarize(twin) == summary


def test_a_later_family_wins():
    model = Host()
    register_family(like='timm ViT', block=Copied, name='first', grid=GRID)
    register_family(like='timm ViT', block=Copied, name='second', grid=GRID)
    assert list(inject(model).sites) == ['second']
    remove(model)
    FAMILIES.append(BlockFamily('third', f'{__name__}.Copied', GRID, 'norm2', ffn='mlp'))
    assert list(inject(model).sites) == ['third']
    remove(model)
    from mmpretrain.models.backbones import VisionTransformer

    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    register_family(like='mmpretrain ViT', block='TransformerEncoderLayer', name='mine')
    assert list(inject(VisionTransformer(arch=arch, img_size=64)).sites) == ['mine']


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ([dict(like='mmdet swim', block='a.B')], r"no family 'mmdet swim' \(did you mean 'mmdet Swin'\?\)"),
        ([dict(block='a.B')], 'a family needs `like`'),
        ([dict(like='mmdet Swin', block='a.B', nrom='x')], r"no field 'nrom' \(did you mean 'norm'\?\)"),
        ([dict(like='mmdet Swin', block='a.b.Copied')], r"families: no module of Host is a block of 'Copied' \(a\.b\."),
        (dict(like='mmdet Swin', block='a.B'), 'families must be a list'),
        (['mmdet Swin'], 'families must be a list'),
        ([dict(like='mmdet Swin', block=3)], 'block must be a class, its import path or its name, got 3'),
    ],
)
def test_wrong_families(given, message):
    model = Host()
    with pytest.raises(ValueError, match=message):
        inject(model, families=given)
    assert summarize(model).method is None and all('forward' not in vars(m) for m in model.modules())


def test_a_block_defined_in_a_config_file(tmp_path):
    """A config that brings its own block and backbone says which known one it is a copy of."""
    path = tmp_path / 'my_config.py'
    path.write_text(
        """
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import Attention, Mlp


class MyBlock(BaseModule):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, 2), Mlp(width)
        self.drop_path1, self.drop_path2 = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@MODELS.register_module(force=True)
class MyBackbone(BaseModule):
    num_prefix_tokens = 0

    def __init__(self, width):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, width, 8, 8)
        self.layers = torch.nn.ModuleList([MyBlock(width), MyBlock(width)])

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return (x.mean(1),)


custom_imports = dict(imports=['iconformer_mm'])
model = dict(type='MyBackbone', width=16)
custom_hooks = [
    dict(type='PEFTHook', method='adaptformer', families=[dict(like='timm ViT', block='MyBlock')]),
]
""",
        encoding='utf-8',
    )
    from mmengine.registry import HOOKS, MODELS

    cfg = Config.fromfile(path, lazy_import=False)
    model = MODELS.build(cfg.model)
    hook = HOOKS.build(cfg.custom_hooks[0])
    summary = inject(model, hook.method, families=hook.families)
    assert summary.sites == {'MyBlock': ['layers.0', 'layers.1']}
    assert inject(MODELS.build(cfg.model), 'lora').num_sites == 2  # known from now on


def test_mmpose_by_name():
    """Blocks of MMPose are known by their import path; a module that keeps its layers in a list is trained, too."""

    class CrossFFN(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
            self.norm1 = nn.BatchNorm2d(2 * width)
            self.layers = [self.fc1, self.norm1, self.fc2]

        def forward(self, x, height, width):
            x = x.transpose(1, 2).unflatten(2, (height, width))
            for layer in self.layers:
                x = layer(x)
            return x.flatten(2).transpose(1, 2)

    class HRFormerBlock(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
            self.ffn, self.drop_path = CrossFFN(width), nn.Identity()

        def forward(self, x):
            size = x.shape
            x = x.flatten(2).transpose(1, 2)
            y = self.norm1(x)
            x = x + self.drop_path(self.attn(y, y, y)[0])
            x = x + self.drop_path(self.ffn(self.norm2(x), *size[2:]))
            return x.transpose(1, 2).reshape(size)

    HRFormerBlock.__module__, HRFormerBlock.__qualname__ = 'mmpose.models.backbones.hrformer', 'HRFormerBlock'
    known = {family.block for family in FAMILIES}
    assert {f'mmpose.models.backbones.{name}' for name in ('swin.SwinBlock', 'pvt.PVTEncoderLayer')} < known
    model = Maps(HRFormerBlock(8)).eval()
    model.requires_grad_(False)
    before = run(model, image((12, 20)))
    for method in ('icon', 'lora', 'norm', 'partial', 'adapter'):
        summary = inject(model, method)
        model.eval()
        assert torch.equal(run(model, image((12, 20)))[0], before[0])
        grads = gradients(stir(model), [(12, 20)])
        assert all(grads[n].any() for n, p in model.named_parameters() if p.requires_grad), method
        assert 'block' in summary.sites['mmpose HRFormer']
        remove(model)
        model.eval()


def test_rows_of_heads():
    """Rows of q and v that lie head by head: the path changes them and no others."""
    model = families_table.make(by_name['timm TinyViT'])
    inject(model, 'lora', targets=['v'])
    stir(model)
    block = next(a.module for a in get_injection(model).attachments)
    (name,) = block.adapter.names
    weight = block.get_parameter(name)
    changed = (block.adapter({name: weight})[name] != weight).any(1)
    attention = block.attn
    rows = torch.zeros(attention.num_heads, 2 * attention.key_dim + attention.val_dim, dtype=torch.bool)
    rows[:, 2 * attention.key_dim :] = True
    assert torch.equal(changed, rows.flatten())
    x = torch.randn(2, 49, weight.shape[1])
    path = block.adapter.add_path(name, attention.qkv, x, attention.qkv(x))
    expected = torch.nn.functional.linear(x, block.adapter({name: weight})[name], attention.qkv.bias)
    torch.testing.assert_close(path, expected)


def test_grid_of_other_sizes_is_refused():
    """A block for square maps says so, rather than taking another grid."""
    from iconformer_mm.tuning.grids import grid_of_call

    site = find_sites(families_table.make(by_name['LeViT']))[0]
    assert grid_of_call(site, (torch.zeros(1, 16, 8),), {}, None) == TokenGrid(4, 4)
    with pytest.raises(ValueError, match='12 tokens, which make no square'):
        grid_of_call(site, (torch.zeros(1, 12, 8),), {}, None)
