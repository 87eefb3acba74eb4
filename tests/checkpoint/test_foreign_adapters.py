"""Adapters of other programs compute here what they compute there.

The references are written anew from the papers and the public names of tensors, as modules of torch in unadapted
backbones.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from families import SWIN, VIT, image
from mmpretrain.models import build_backbone
from safetensors.torch import save_file
from torch import nn

from iconformer_mm import load_adapter, merge
from iconformer_mm.checkpoint.foreign_adapters import (
    ForeignAdapterError,
    inject_foreign,
    read_adaptformer,
    read_hf_lora,
    read_mmpretrain_lora,
    read_mona,
)
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model

QUICKSTART = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_frozen_digits.py'


def build(**config):
    torch.manual_seed(0)
    backbone = build_backbone(config)
    backbone.eval()  # which of mmpretrain returns nothing
    return backbone


def vit():
    return build(type='VisionTransformer', arch=VIT, img_size=64)


def swin():
    return build(type='SwinTransformer', arch=SWIN, img_size=64, pad_small_map=True)


def adapt(model, foreign):
    """What an adapted model makes of an image, and how far that is from what it made before."""
    before = model(image((64, 64)))[0]
    inject_foreign(model, foreign)
    model.eval()
    out = model(image((64, 64)))[0]
    assert (out - before).abs().max() > 0.01
    return out


def noise(module):
    """A module as if it were trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


class ForeignAdaptFormer(nn.Module):
    def __init__(self, width, bottleneck, scale):
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.factor = scale
        if scale is None:
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        out = self.up_proj(torch.relu(self.down_proj(x)))
        return out * (self.scale if self.factor is None else self.factor)


class BlockWithAdaptFormer(nn.Module):
    def __init__(self, block, adapter):
        super().__init__()
        self.block, self.adaptmlp = block, adapter

    def forward(self, x):
        x = x + self.block.attn(self.block.ln1(x))
        return self.block.ffn(self.block.ln2(x), identity=x) + self.adaptmlp(x)


@pytest.mark.parametrize('scale', [0.5, None], ids=['fixed', 'learned'])
def test_adaptformer(scale):
    reference, state = vit(), {'head.weight': torch.zeros(2, 32), 'blocks.0.norm1.weight': torch.ones(32)}
    for i, block in enumerate(reference.layers):
        adapter = noise(ForeignAdaptFormer(32, 6, scale))
        reference.layers[i] = BlockWithAdaptFormer(block, adapter)
        state.update({f'blocks.{i}.adaptmlp.{name}': value for name, value in adapter.state_dict().items()})
    out = adapt(vit(), read_adaptformer(state, 0.1 if scale is None else scale))
    torch.testing.assert_close(out, reference(image((64, 64)))[0])


class ForeignMonaOp(nn.Module):
    def __init__(self, width):
        super().__init__()
        for number, size in enumerate((3, 5, 7), 1):
            setattr(self, f'conv{number}', nn.Conv2d(width, width, size, padding=size // 2, groups=width))
        self.projector = nn.Conv2d(width, width, 1)

    def forward(self, maps):
        maps = maps + (self.conv1(maps) + self.conv2(maps) + self.conv3(maps)) / 3
        return maps + self.projector(maps)


class ForeignMona(nn.Module):
    def __init__(self, width, bottleneck=8):
        super().__init__()
        self.project1, self.project2 = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.adapter_conv = ForeignMonaOp(bottleneck)
        self.norm = nn.LayerNorm(width)
        self.gamma, self.gammax = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))

    def forward(self, x, size):
        z = self.project1(self.norm(x) * self.gamma + x * self.gammax)
        maps = self.adapter_conv(z.transpose(1, 2).unflatten(2, size))
        return x + self.project2(F.gelu(maps.flatten(2).transpose(1, 2)))


class BlockWithMona(nn.Module):
    def __init__(self, block, width):
        super().__init__()
        self.block = block
        self.my_module_1, self.my_module_2 = noise(ForeignMona(width)), noise(ForeignMona(width))

    def forward(self, x, size):
        x = self.my_module_1(x + self.block.attn(self.block.norm1(x), size), size)
        return self.my_module_2(self.block.ffn(self.block.norm2(x), identity=x), size)


def test_mona():
    reference, state = swin(), {}
    for i, stage in enumerate(reference.stages):
        for j, block in enumerate(stage.blocks):
            stage.blocks[j] = BlockWithMona(block, block.norm1.weight.numel())
            tensors = stage.blocks[j].state_dict()
            state.update({f'layers.{i}.blocks.{j}.{n}': v for n, v in tensors.items() if 'my_module' in n})
    shuffled = dict(sorted(state.items(), reverse=True))  # the order in a file says nothing
    torch.testing.assert_close(adapt(swin(), read_mona(shuffled)), reference(image((64, 64)))[0])


LORA = dict(peft_type='LORA', r=4, lora_alpha=6, bias='none', use_dora=False, target_modules=['...'])
TRANSFORMERS = 'base_model.model.vit.encoder.layer.{}.{}.lora_{}.weight'
TIMM = 'base_model.model.blocks.{}.{}.lora_{}.weight'
# Layer there; parameter here and the rows of it that the layer is.
LAYERS = {
    'transformers': (
        TRANSFORMERS,
        {
            'attention.attention.query': ('attn.qkv.weight', 0, 32),
            'attention.attention.value': ('attn.qkv.weight', 64, 96),
            'attention.output.dense': ('attn.proj.weight', 0, 32),
            'output.dense': ('ffn.layers.1.weight', 0, 32),
        },
    ),
    'timm': (TIMM, {'attn.qkv': ('attn.qkv.weight', 0, 96), 'mlp.fc1': ('ffn.layers.0.0.weight', 0, 64)}),
}


@pytest.mark.parametrize('library', LAYERS)
def test_hf_lora(library):
    pattern, layers = LAYERS[library]
    reference, state = vit(), {'base_model.model.classifier.weight': torch.zeros(2, 32)}
    with torch.no_grad():
        for i, block in enumerate(reference.layers):
            for layer, (name, first, last) in layers.items():
                weight = block.get_parameter(name)
                a, b = torch.randn(4, weight.shape[1]), 0.1 * torch.randn(last - first, 4)
                state[pattern.format(i, layer, 'A')], state[pattern.format(i, layer, 'B')] = a, b
                weight[first:last] += 6 / 4 * b @ a
    model = vit()
    out = adapt(model, read_hf_lora(state, LORA))
    torch.testing.assert_close(out, reference(image((64, 64)))[0], atol=1e-4, rtol=1e-4)
    merge(model)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def adaptformer_state(width=32, blocks=2, **extra):
    state = {}
    for i in range(blocks):
        adapter = noise(ForeignAdaptFormer(width, 6, 0.1))
        state.update({f'blocks.{i}.adaptmlp.{name}': value for name, value in adapter.state_dict().items()})
    return {**state, **extra}


LORA_STATE = {TRANSFORMERS.format(0, 'attention.attention.query', f): torch.zeros(4, 4) for f in 'AB'}


@pytest.mark.parametrize(
    ('read', 'message'),
    [
        (
            lambda: read_adaptformer(
                adaptformer_state(**{'blocks.1.adaptmlp.adapter_layer_norm_before.weight': torch.ones(32)})
            ),
            'blocks.1.adaptmlp is another variant',
        ),
        (lambda: read_adaptformer({'a.b': torch.zeros(1)}), 'the file has a.b'),
        (lambda: read_mona(adaptformer_state()), 'no tensor name matches'),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'use_dora': True}), 'use_dora=True'),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'bias': 'all'}), "bias='all'"),
        *(
            (lambda value=value: read_hf_lora(LORA_STATE, {**LORA, 'init_lora_weights': value}), f"weights='{value}'")
            for value in ('pissa', 'pissa_niter_16', 'olora', 'loftq', 'corda', 'lora_ga')
        ),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'use_rslora': True}), 'use_rslora=True'),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'rank_pattern': {'query': 2}}), 'rank_pattern='),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'alpha_pattern': {'query': 2}}), 'alpha_pattern='),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'of_next_year': 0.5}), 'of_next_year=0.5'),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'r': True}), 'the rank r must be'),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'lora_alpha': None}), 'lora_alpha must be'),
        (
            lambda: read_hf_lora({**LORA_STATE, 'base_model.model.vit.layernorm.weight': torch.ones(4)}, LORA),
            'the file changes the base: it has base_model.model.vit.layernorm.weight',
        ),
        (
            lambda: read_hf_lora({**LORA_STATE, 'base_model.model.classifier.lora_A.weight': torch.ones(4)}, LORA),
            'is a LoRA outside the blocks',
        ),
        (
            lambda: read_hf_lora({f'text.{n}': v for n, v in LORA_STATE.items()} | LORA_STATE, LORA),
            'is the second tensor for',
        ),
        (lambda: read_hf_lora(LORA_STATE, {**LORA, 'peft_type': 'IA3'}), "peft_type is 'IA3'"),
        (
            lambda: read_hf_lora({TRANSFORMERS.format(0, 'strange', 'A'): torch.zeros(1)}, LORA),
            "the layer 'strange' is none of the maps",
        ),
        (lambda: inject_foreign(vit(), read_adaptformer(adaptformer_state(blocks=3))), 'for 3 blocks'),
        (lambda: inject_foreign(vit(), read_adaptformer(adaptformer_state(width=16))), 'layers.0.adapter.down.weight'),
    ],
)
def test_what_differs_is_refused(read, message):
    with pytest.raises(ForeignAdapterError, match=message):
        read()


HARMLESS = dict(
    init_lora_weights='gaussian',
    lora_dropout=0.1,
    inference_mode=True,
    modules_to_save=['classifier'],
    loftq_config={},
    rank_pattern={},
    use_rslora=False,
    qalora_group_size=16,
    corda_config=None,
)


def test_what_changes_nothing_is_taken_and_what_is_left_is_named():
    state = {**LORA_STATE, 'base_model.model.classifier.weight': torch.ones(2, 4)}
    foreign = read_hf_lora(state, {**LORA, **HARMLESS})
    assert foreign.left == ['base_model.model.classifier.weight'] and foreign.method['targets'] == ['q']
    assert read_adaptformer(adaptformer_state(**{'head.weight': torch.ones(1)})).left == ['head.weight']


LORA_MODELS = {
    'ViT': (
        dict(type='VisionTransformer', arch=VIT, img_size=64),
        [dict(type='qkv'), dict(type='.*proj'), dict(type='.*ffn.layers.0.0')],
    ),
    'Swin': (
        dict(type='SwinTransformer', arch=SWIN, img_size=64, pad_small_map=True),
        [dict(type='.*w_msa.qkv'), dict(type='.*blocks.*ffn.layers.1')],
    ),
}


@pytest.mark.parametrize('name', LORA_MODELS)
def test_mmpretrain_lora(name):
    module, targets = LORA_MODELS[name]
    options = dict(module=module, alpha=6, rank=4, targets=targets)
    reference = build(type='LoRAModel', **options)
    with torch.no_grad():
        for parameter_name, parameter in reference.named_parameters():
            if 'lora_' in parameter_name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    state = {f'backbone.{n}': v.clone() for n, v in reference.named_parameters() if '.lora_' in n}
    state['head.fc.weight'] = torch.ones(2, 32)
    model = build(**module)
    base = {n.replace('.original_layer', '').removeprefix('module.'): v for n, v in reference.named_parameters()}
    model.load_state_dict({n: v for n, v in base.items() if '.lora_' not in n}, strict=False)
    foreign = read_mmpretrain_lora(state, model, options)
    assert foreign.left == ['head.fc.weight'] and foreign.method['alpha'] == 6
    torch.testing.assert_close(adapt(model, foreign), reference(image((64, 64)))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(alpha=6, rank=8), 'has rank 4 in the file, but 8 in the config'),
        (dict(alpha=6, targets=[dict(type='proj')]), "matches none of the LoRAModel's targets"),
        (
            dict(alpha=6, targets=[dict(type='0.attn.qkv', alpha=1), dict(type='qkv')]),
            'layers differ in alpha and rank',
        ),
    ],
)
def test_another_config_of_a_lora_model_is_refused(options, message):
    state = {
        f'backbone.module.layers.{block}.attn.qkv.lora_{word}.weight': torch.ones(shape)
        for block in range(2)
        for word, shape in (('down', (4, 32)), ('up', (96, 4)))
    }
    with pytest.raises(ForeignAdapterError, match=message):
        read_mmpretrain_lora(state, vit(), options)
    with pytest.raises(ForeignAdapterError, match='is none of the maps'):
        read_mmpretrain_lora({'module.patch_embed.projection.lora_up.weight': torch.ones(1)}, vit(), dict(alpha=1))


def run_tool(monkeypatch, *arguments):
    from importlib import import_module

    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.setattr(sys, 'argv', ['convert_adapter.py', *map(str, arguments)])
    import_module('convert_adapter').main()


def test_tool(tmp_path, monkeypatch, capsys):
    """From a checkpoint to an adapter file that fits the config's base, and no other."""
    torch.save(dict(model=adaptformer_state(96, 4)), tmp_path / 'checkpoint.pth')
    out = tmp_path / 'adapter.safetensors'
    options = ['--from', 'adaptformer', '--config', QUICKSTART, '--out', out]
    run_tool(monkeypatch, tmp_path / 'checkpoint.pth', *options)
    assert 'parameters in 4 blocks' in capsys.readouterr().out
    model = build_model(load_config(str(QUICKSTART)))
    with pytest.raises(ValueError, match='another base'):
        load_adapter(model, out)
    model.init_weights()
    load_adapter(model, out)
    state = torch.load(tmp_path / 'checkpoint.pth')['model']
    torch.testing.assert_close(
        model.backbone.layers[2].adapter.up.weight.detach(), state['blocks.2.adaptmlp.up_proj.weight']
    )


def test_mistakes_with_the_tool(tmp_path, monkeypatch):
    options = ['--config', QUICKSTART, '--out', tmp_path / 'out.safetensors']
    with pytest.raises(SystemExit, match='does not exist'):
        run_tool(monkeypatch, tmp_path / 'none.pth', '--from', 'mona', *options)
    save_file(LORA_STATE, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(SystemExit, match='adapter_config.json is missing'):
        run_tool(monkeypatch, tmp_path / 'adapter_model.safetensors', '--from', 'hf-lora', *options)
    (tmp_path / 'adapter_config.json').write_text(json.dumps(LORA))
    with pytest.raises(SystemExit, match='for 1 blocks, VisionTransformer has 4'):
        run_tool(monkeypatch, tmp_path / 'adapter_model.safetensors', '--from', 'hf-lora', *options)
    assert not (tmp_path / 'out.safetensors').exists()
