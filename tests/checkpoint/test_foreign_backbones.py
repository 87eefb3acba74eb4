"""Converted backbones compute what their own implementations do: transformers' and timm's, with random weights."""

import copy
import os
import re
import sys
from importlib import import_module

import pytest
import timm
import torch
from mmengine.registry import init_default_scope
from safetensors.torch import load_file
from torch import nn

import iconformer_mm  # noqa: F401 (registers its parts)
from iconformer_mm.checkpoint.foreign_backbones import ForeignBackboneError, convert_backbone, looks_like, recognise


def import_transformers():
    """Transformers out of a folder of its own.

    Installed beside mmpretrain 1.3.6, transformers 5 breaks ``import mmpretrain.models``, so it is no part of the
    environment: ``pip install --no-deps --target FOLDER transformers tokenizers``.
    """
    folder = os.environ.get('ICONFORMER_MM_REFERENCES', '')
    for library in ('mmpretrain', 'mmdet', 'mmseg'):
        import_module(f'{library}.models')  # before it can see transformers
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        return import_module('transformers')
    except ImportError:
        return None


transformers = import_transformers()
SINCE = {'DINOv3ViT': '4.56'}  # by the model, the first release of transformers that has it
needs_transformers = pytest.mark.skipif(
    transformers is None, reason='set ICONFORMER_MM_REFERENCES to a folder with transformers'
)

VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=64,
    patch_size=16,
    layer_norm_eps=1e-6,
)
SWIN = dict(image_size=128, patch_size=4, embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4)
SAM = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=16,
    window_size=2,
    global_attn_indexes=[1],
    output_channels=16,
)
SMALL = dict(depth=2, embed_dim=32, num_heads=2)


def randomise(model):
    """Values that leave nothing out: norms, scales and biases are no identities."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.2)
        if 'norm' in name and name.endswith('weight'):
            p.data += 1
    return model.double().eval()


def hugging_face(kind, tmp_path, **config):
    """A model of transformers, and its file as transformers writes it."""
    if kind in SINCE and not hasattr(transformers, f'{kind}Model'):
        pytest.skip(f'{kind} needs transformers {SINCE[kind]} or newer, this is {transformers.__version__}')
    model = getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**config))
    model = randomise(model)
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / 'model.safetensors')


def image(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fill(model, converted):
    model.double().eval()  # which returns None in some
    result = model.load_state_dict(converted.tensors, strict=False)
    derived = ('relative_position_index', 'relative_coords_table', 'freqs_cos', 'freqs_sin')
    assert not result.unexpected_keys
    assert [n for n in result.missing_keys if not n.endswith(derived)] == []
    return model


def build_mm(converted, **options):
    config = copy.deepcopy(converted.config)
    library = config['type'].partition('.')[0]
    init_default_scope(library)
    if 'num_heads' in options:
        heads = options.pop('num_heads')
        config.get('arch', config)['num_heads'] = heads
    registry = import_module(f'{library}.registry').MODELS
    return fill(registry.build({**config, **options}), converted)


def build_timm(converted, **options):
    name, kwargs = converted.config['model_name'], converted.config['model_kwargs']
    return fill(timm.create_model(name, num_classes=0, **{**kwargs, **options}), converted)


def close(a, b):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def accounted(state, converted):
    """Every tensor of the file is used or named; those used are as many numbers as the result has."""
    named = set(converted.left) & set(state)
    used = recognise(state).tensors
    assert sum(v.numel() for v in converted.tensors.values()) > 0 and used
    assert all(reason for reason in converted.left.values())
    return named


# Plain ViTs of transformers

PLAIN = {
    'Dinov2': (dict(VIT, mlp_ratio=2, hidden_act='gelu'), 'DINOv2', ('mmpretrain', 'mmseg', 'timm')),
    'ViT': (VIT, 'ViT', ('mmpretrain', 'mmseg', 'timm')),
    'ViTMAE': (dict(VIT, mask_ratio=0.0), 'ViT', ('mmpretrain', 'mmseg', 'timm')),
    'CLIPVision': (dict(VIT, layer_norm_eps=1e-5), 'CLIP', ('mmpretrain', 'timm')),
    'SiglipVision': (VIT, 'SigLIP', ('mmpretrain', 'timm')),
}


@needs_transformers
@pytest.mark.parametrize(('kind', 'target'), [(k, t) for k, (_, _, targets) in PLAIN.items() for t in targets])
def test_plain_vits_of_hugging_face(kind, target, tmp_path):
    config, family, _ = PLAIN[kind]
    reference, state = hugging_face(kind, tmp_path, **config)
    converted = convert_backbone(state, target)
    assert (converted.family, converted.source) == (family, 'Hugging Face')
    accounted(state, converted)
    with torch.no_grad():
        if kind == 'ViTMAE':  # which shuffles its patches, and keeps their places
            noise = torch.arange(16.0, dtype=torch.float64).expand(2, 16)
            expected = reference(image(), noise=noise).last_hidden_state
        else:
            expected = reference(image()).last_hidden_state
        if kind == 'CLIPVision':  # which norms the class token alone
            (norm,) = (m for n, m in reference.named_modules() if n.endswith('post_layernorm'))
            expected = norm(expected)
        if target == 'timm':
            close(build_timm(converted, num_heads=2).forward_features(image()), expected)
        elif target == 'mmpretrain':
            model = build_mm(converted, num_heads=2, out_type='raw')
            close(model(image())[0], expected)
        else:
            features, cls = build_mm(converted, num_heads=2, output_cls_token=True)(image())[0]
            close(torch.cat([cls[:, None], features.flatten(2).transpose(1, 2)], 1), expected)


@needs_transformers
def test_dinov2_with_registers_and_gated_ffn(tmp_path):
    config = dict(VIT, num_register_tokens=3, use_swiglu_ffn=True, mlp_ratio=2)
    reference, state = hugging_face('Dinov2WithRegisters', tmp_path, **config)
    converted = convert_backbone(state, 'timm')
    assert 'embeddings.mask_token' in converted.left
    expected = reference(image()).last_hidden_state
    close(build_timm(converted, num_heads=2).forward_features(image()), expected)
    for target in ('mmpretrain', 'mmseg'):
        with pytest.raises(ForeignBackboneError, match='register tokens.*convert it --to timm'):
            convert_backbone(state, target)


@needs_transformers
def test_dinov2_giant_in_mmpretrain(tmp_path):
    reference, state = hugging_face('Dinov2', tmp_path, **dict(VIT, use_swiglu_ffn=True, mlp_ratio=2))
    converted = convert_backbone(state, 'mmpretrain')
    model = build_mm(converted, num_heads=2, out_type='raw')
    close(model(image())[0], reference(image()).last_hidden_state)
    with pytest.raises(ForeignBackboneError, match='gated FFN'):
        convert_backbone(state, 'mmseg')


@needs_transformers
def test_distilled_deit(tmp_path):
    reference, state = hugging_face('DeiT', tmp_path, **VIT)
    expected = reference(image()).last_hidden_state
    converted = convert_backbone(state, 'timm')
    assert converted.config['model_name'].startswith('deit_')
    close(build_timm(converted, num_heads=2).forward_features(image()), expected)
    converted = convert_backbone(state, 'mmpretrain')
    assert converted.config['type'] == 'mmpretrain.DistilledVisionTransformer'
    close(build_mm(converted, num_heads=2, out_type='raw')(image())[0], expected)


@needs_transformers
@pytest.mark.parametrize(
    'options', [{}, dict(use_gated_mlp=True, hidden_act='silu'), dict(query_bias=False, value_bias=False)]
)
def test_dinov3(tmp_path, options):
    config = dict(VIT, num_register_tokens=4, layer_norm_eps=1e-5, **options)
    reference, state = hugging_face('DINOv3ViT', tmp_path, **config)
    converted = convert_backbone(state, 'timm')
    assert converted.family == 'DINOv3' and 'dinov3' in converted.config['model_name']
    close(build_timm(converted, num_heads=2).forward_features(image()), reference(image()).last_hidden_state)


@needs_transformers
@pytest.mark.parametrize('target', ['mmpretrain', 'mmseg', 'timm'])
@pytest.mark.parametrize(('shared', 'pooled'), [(False, False), (True, True)])
def test_beit(tmp_path, target, shared, pooled):
    options = dict(use_relative_position_bias=not shared, use_shared_relative_position_bias=shared)
    reference, state = hugging_face('Beit', tmp_path, **VIT, **options, use_mean_pooling=pooled)
    converted = convert_backbone(state, target)
    assert converted.family == 'BEiT'
    expected = reference(image()).last_hidden_state
    if target == 'timm':
        close(build_timm(converted).forward_features(image()), expected)
    elif target == 'mmpretrain':
        if pooled:
            close(build_mm(converted)(image())[0], reference(image()).pooler_output)
        else:
            close(build_mm(converted, out_type='raw')(image())[0], expected)
    else:
        features = build_mm(converted)(image())[-1]
        close(features.flatten(2).transpose(1, 2), expected[:, 1:])


@needs_transformers
@pytest.mark.parametrize('target', ['mmpretrain', 'timm'])
def test_sam(tmp_path, target):
    config = transformers.SamConfig(vision_config=transformers.SamVisionConfig(**SAM))
    model = randomise(transformers.SamModel(config))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    converted = convert_backbone(state, target)
    assert converted.family == 'SAM' and any('mask_decoder' in n for n in converted.left)
    expected = model.vision_encoder(image()).last_hidden_state
    if target == 'timm':
        close(build_timm(converted).forward_features(image()), expected)
    else:
        close(build_mm(converted)(image())[0], expected)


@needs_transformers
@pytest.mark.parametrize('target', ['mmpretrain', 'mmseg', 'mmdet', 'timm'])
def test_swin(tmp_path, target):
    reference, state = hugging_face('Swin', tmp_path, **SWIN)
    converted = convert_backbone(state, target)
    assert converted.family == 'Swin'
    expected = reference(image(128)).last_hidden_state
    if target == 'timm':
        model = build_timm(converted, img_size=128)
        close(model.forward_features(image(128)).flatten(1, 2), expected)
    else:
        close(build_mm(converted)(image(128))[0].flatten(2).transpose(1, 2), expected)


@needs_transformers
@pytest.mark.parametrize('target', ['mmpretrain', 'timm'])
def test_swinv2(tmp_path, target):
    reference, state = hugging_face('Swinv2', tmp_path, **SWIN)
    converted = convert_backbone(state, target)
    assert converted.family == 'SwinV2' and 'window size' in converted.notes[0]
    expected = reference(image(128)).last_hidden_state
    if target == 'timm':
        close(build_timm(converted, img_size=128, window_size=4).forward_features(image(128)).flatten(1, 2), expected)
    else:
        model = build_mm(converted, img_size=128, window_size=[4, 4, 4, 4])
        close(model(image(128))[0].flatten(2).transpose(1, 2), expected)


@needs_transformers
def test_mit(tmp_path):
    config = dict(
        hidden_sizes=[32, 64, 160, 256], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 5, 8], layer_norm_eps=1e-6
    )
    reference, state = hugging_face('Segformer', tmp_path, **config)
    converted = convert_backbone(state, 'mmseg')
    assert converted.family == 'MiT'
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # of mmseg's class in all norms; here of some
    expected = reference(image(), output_hidden_states=True).hidden_states
    maps = build_mm(converted)(image())
    assert len(maps) == 4
    for a, b in zip(maps, expected):
        close(a, b)


# Originals, of which timm's own functions know what they are in timm


def by_timm(state, model):
    """The file in timm's names, by timm."""
    return dict(sys.modules[type(model).__module__].checkpoint_filter_fn(dict(state), model))


def renamed(state, *pairs):
    out = {}
    for name, value in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        out[name] = value
    return out


def timm_model(name, **options):
    sizes = dict(SMALL, embed_dim=48, num_heads=3) if 'eva02' in name else SMALL
    return randomise(timm.create_model(name, **{**sizes, 'num_classes': 0, **options}))


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same_as_timm(state, model):
    """Converted, a file is tensor for tensor what timm makes of it."""
    converted = convert_backbone(state, 'timm')
    theirs = {n: v for n, v in by_timm(state, model).items() if n in model.state_dict()}
    assert converted.tensors.keys() >= theirs.keys() == model.state_dict().keys()
    for name, value in theirs.items():
        assert torch.equal(converted.tensors[name], value), name
    assert converted.source == 'original'
    return converted


def test_original_dinov2():
    model = timm_model('vit_small_patch14_dinov2', img_size=56)
    state = {**model.state_dict(), 'mask_token': noise(1, 32)}
    converted = same_as_timm(state, model)
    assert converted.family == 'DINOv2' and converted.left == {'mask_token': 'token of masked pre-training'}
    chunked = renamed(state, (r'^blocks\.(\d)\.', r'blocks.0.\1.'))
    assert all(torch.equal(v, converted.tensors[n]) for n, v in convert_backbone(chunked, 'timm').tensors.items())
    teacher = {f'teacher.backbone.{n}': v for n, v in state.items()} | {'teacher.dino_head.mlp.0.weight': noise(4, 4)}
    again = convert_backbone(teacher, 'timm')
    assert again.tensors.keys() == converted.tensors.keys()
    assert again.left['teacher.dino_head.mlp.0.weight'] == 'outside of the image encoder'


def test_original_dinov2_with_registers_and_gated_ffn():
    model = timm_model('vit_giant_patch14_reg4_dinov2', img_size=56, mlp_ratio=4)
    state = renamed(
        model.state_dict(), ('reg_token', 'register_tokens'), (r'mlp\.fc1', 'mlp.w12'), (r'mlp\.fc2', 'mlp.w3')
    )
    state = {**state, 'pos_embed': noise(1, 17, 32), 'mask_token': noise(1, 32)}
    assert same_as_timm(state, model).config['model_name'] == 'vit_giant_patch14_reg4_dinov2'


@pytest.mark.parametrize('name', ['vit_small_patch16_dinov3_qkvb', 'vit_small_plus_patch16_dinov3_qkvb'])
def test_original_dinov3(name):
    model = timm_model(name)
    state = renamed(
        model.state_dict(),
        ('reg_token', 'storage_tokens'),
        (r'gamma_(\d)', r'ls\1.gamma'),
        (r'mlp\.fc1_g', 'mlp.w1'),
        (r'mlp\.fc1_x', 'mlp.w2'),
        *([(r'mlp\.fc2', 'mlp.w3')] if 'plus' in name else []),
    )
    for i in range(2):
        q, v = (state.pop(f'blocks.{i}.attn.{x}_bias') for x in 'qv')
        state[f'blocks.{i}.attn.qkv.bias'] = torch.cat([q, noise(32), v])
        state[f'blocks.{i}.attn.qkv.bias_mask'] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
    state.update({'mask_token': noise(1, 32), 'rope_embed.periods': noise(8)})
    converted = same_as_timm(state, model)
    assert converted.config['model_name'] == name
    assert converted.left['rope_embed.periods'] == 'computed from the resolution'


def test_original_mae():
    model = timm_model('vit_base_patch16_224', img_size=64)
    decoder = {
        'decoder_embed.weight': noise(16, 32),
        'decoder_blocks.0.norm1.weight': noise(16),
        'mask_token': noise(1, 1, 16),
    }
    state = {**model.state_dict(), **decoder}
    converted = convert_backbone(state, 'mmpretrain')
    assert converted.family == 'MAE' and converted.left.keys() == decoder.keys()
    expected = model.forward_features(image())
    close(build_mm(converted, num_heads=2, out_type='raw')(image())[0], expected)


@pytest.mark.parametrize('target', ['mmpretrain', 'mmseg', 'timm'])
def test_heads_of_published_models_that_are_not_64_wide(target):
    """ViT-H has 16 heads of 80 channels; nothing is said of them here."""
    model = timm_model('vit_huge_patch14_224', img_size=28, depth=1, embed_dim=1280, num_heads=16, mlp_ratio=1)
    converted = convert_backbone(model.state_dict(), target)
    expected = model.forward_features(image(28))
    if target == 'timm':
        close(build_timm(converted).forward_features(image(28)), expected)
    elif target == 'mmpretrain':
        close(build_mm(converted, out_type='raw')(image(28))[0], expected)
    else:
        features, cls = build_mm(converted, output_cls_token=True)(image(28))[0]
        close(torch.cat([cls[:, None], features.flatten(2).transpose(1, 2)], 1), expected)


def test_a_width_that_64_does_not_divide():
    model = timm_model('vit_base_patch16_224', img_size=32, embed_dim=80, num_heads=2)
    with pytest.raises(ForeignBackboneError, match='the number of heads of this ViT is unknown: .* 80 wide'):
        convert_backbone(model.state_dict(), 'mmpretrain')


@pytest.mark.parametrize('name', ['vit_base_patch16_224', 'beitv2_base_patch16_224'])
def test_an_ffn_that_mmseg_cannot_have(name):
    model = timm_model(name, img_size=32, embed_dim=64, num_heads=1, mlp_ratio=3.5)
    message = 'is 224 wide, no whole multiple of 64.*convert it --to timm'
    with pytest.raises(ForeignBackboneError, match=message):
        convert_backbone(model.state_dict(), 'mmseg')


def test_original_distilled_deit():
    model = timm_model('deit_tiny_distilled_patch16_224', img_size=64, num_classes=3)
    converted = convert_backbone(model.state_dict(), 'mmpretrain')
    assert set(converted.left) == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}
    close(build_mm(converted, num_heads=2, out_type='raw')(image())[0], model.forward_features(image()))
    assert convert_backbone(model.state_dict(), 'timm').config['model_name'] == 'deit_tiny_distilled_patch16_224'


@pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'eva02_base_patch14_224'])
def test_original_eva02(name):
    model = timm_model(name, img_size=56)
    state = renamed(
        model.state_dict(),
        (r'mlp\.fc1_g', 'mlp.w1'),
        (r'mlp\.fc1_x', 'mlp.w2'),
        (r'mlp\.fc1\.', 'mlp.w12.'),
        (r'mlp\.fc2', 'mlp.w3'),
        (r'mlp\.norm', 'mlp.ffn_ln'),
        (r'attn\.(q|v)_proj\.bias', r'attn.\1_bias'),
    )
    state['rope.freqs_cos'] = noise(4, 4)
    converted = same_as_timm(state, model)
    assert converted.family == 'EVA-02' and converted.config['model_name'] == name
    close(build_timm(converted, num_heads=3).forward_features(image(56)), model.forward_features(image(56)))
    with pytest.raises(ForeignBackboneError, match='no class for EVA-02: its ViTEVA02 has other angles'):
        convert_backbone(state, 'mmpretrain')


def test_original_beit_v2():
    model = timm_model('beitv2_base_patch16_224', img_size=64, num_classes=3)
    converted = convert_backbone(model.state_dict(), 'timm')
    assert converted.config['model_name'].startswith('beitv2') and 'head.weight' in converted.left
    close(build_timm(converted, num_heads=2).forward_features(image()), model.forward_features(image()))
    pooled = model.fc_norm(model.forward_features(image())[:, 1:].mean(1))
    close(build_mm(convert_backbone(model.state_dict(), 'mmpretrain'))(image())[0], pooled)


def test_original_sam():
    model = timm_model('samvit_base_patch16', img_size=64, window_size=2, global_attn_indexes=(1,))
    state = {f'image_encoder.{n.replace("mlp.fc", "mlp.lin")}': v for n, v in model.state_dict().items()}
    state['mask_decoder.iou_token.weight'] = noise(1, 16)
    converted = same_as_timm(state, model)
    assert list(converted.left) == ['mask_decoder.iou_token.weight']
    close(build_mm(convert_backbone(state, 'mmpretrain'))(image())[0], model.forward_features(image()))


def test_original_clip():
    model = timm_model('vit_base_patch16_clip_quickgelu_224', img_size=64)
    pairs = [
        (r'patch_embed\.proj', 'conv1'),
        (r'^blocks', 'transformer.resblocks'),
        (r'norm_pre', 'ln_pre'),
        (r'^norm\.', 'ln_post.'),
        (r'norm([12])', r'ln_\1'),
        (r'attn\.qkv\.', 'attn.in_proj_'),
        (r'attn\.proj', 'attn.out_proj'),
        (r'mlp\.fc1', 'mlp.c_fc'),
        (r'mlp\.fc2', 'mlp.c_proj'),
        ('cls_token', 'class_embedding'),
        ('pos_embed', 'positional_embedding'),
    ]
    state = {f'visual.{n}': v for n, v in renamed(model.state_dict(), *pairs).items()}
    state['visual.class_embedding'] = state['visual.class_embedding'].flatten()
    state['visual.positional_embedding'] = state['visual.positional_embedding'][0]
    state['visual.proj'] = noise(32, 16)
    text = {
        'transformer.resblocks.0.ln_1.weight': noise(8),
        'positional_embedding': noise(7, 8),
        'logit_scale': noise(1),
    }
    converted = same_as_timm({**state, **text}, model)
    assert converted.family == 'CLIP'
    assert set(converted.left) == {*text, 'visual.proj'} and converted.left['visual.proj'] == 'head'


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256'])
def test_original_swin(name):
    sizes = dict(depths=(1, 1, 2, 1), embed_dim=16, num_heads=(1, 2, 4, 8), depth=None)
    model = randomise(timm.create_model(name, num_classes=0, **{k: v for k, v in sizes.items() if v}))
    earlier = {
        n: re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', n)
        for n in model.state_dict()
    }
    state = {earlier[n]: v for n, v in model.state_dict().items()}
    state['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(4, 4)
    state['head.weight'] = noise(3, 128)
    converted = same_as_timm(state, model)
    assert converted.left.keys() == {'layers.0.blocks.0.attn.relative_position_index', 'head.weight'}
    again = convert_backbone(model.state_dict(), 'timm')  # timm's own names
    assert all(torch.equal(v, converted.tensors[n]) for n, v in again.tensors.items())


@needs_transformers
def test_original_mit(tmp_path):
    config = dict(hidden_sizes=[32, 64, 160, 256], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 5, 8])
    _, state = hugging_face('Segformer', tmp_path, **config)
    original = renamed(
        state,
        (r'^encoder\.patch_embeddings\.(\d)\.layer_norm', r'patch_embed\1.norm'),
        (r'^encoder\.patch_embeddings\.(\d)\.', r'patch_embed\1.'),
        (r'^encoder\.layer_norm\.(\d)', r'norm\1'),
        (r'^encoder\.block\.(\d)', r'block\1'),
        (r'layer_norm_(\d)', r'norm\1'),
        (r'attention\.self\.query', 'attn.q'),
        (r'attention\.self\.sr', 'attn.sr'),
        (r'attention\.self\.layer_norm', 'attn.norm'),
        (r'attention\.output\.dense', 'attn.proj'),
        (r'mlp\.dense', 'mlp.fc'),
    )
    shifted = {}
    for name, value in original.items():
        name = re.sub(r'^(patch_embed|norm|block)(\d)', lambda m: f'{m[1]}{int(m[2]) + 1}', name)
        shifted[name] = value
    for name in [n for n in shifted if '.attention.self.key.' in n]:
        pair = [shifted.pop(name), shifted.pop(name.replace('.key.', '.value.'))]
        shifted[name.replace('attention.self.key', 'attn.kv')] = torch.cat(pair)
    shifted['head.weight'] = noise(3, 256)
    converted = convert_backbone(shifted, 'mmseg')
    assert converted.source == 'original' and list(converted.left) == ['head.weight']
    theirs = convert_backbone(state, 'mmseg').tensors
    assert converted.tensors.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[n]) for n, v in converted.tensors.items())


# What cannot be converted


def vit_state(**more):
    return {**timm_model('vit_base_patch16_224', img_size=64).state_dict(), **more}


def vit_without(name):
    return {n: v for n, v in vit_state().items() if n != name}


@pytest.mark.parametrize(
    ('state', 'target', 'message'),
    [
        (lambda: {}, 'timm', 'none of the known backbones'),
        (lambda: dict(timm.create_model('resnet18').state_dict()), 'timm', 'none of the known .*it has conv1.weight'),
        (lambda: vit_state(surprise=noise(1)), 'timm', 'has 1 tensors that are unknown there, such as surprise'),
        (
            lambda: vit_state(**{'blocks.0.attn.extra.bias': noise(1)}),
            'timm',
            'unknown there, such as blocks.0.attn.extra',
        ),
        (lambda: vit_without('blocks.1.mlp.fc1.weight'), 'mmseg', 'lacks blocks.1.fc1.weight'),
        (lambda: vit_state(pos_embed=noise(1, 16, 32)), 'mmpretrain', 'positions of this ViT are 15, no square grid'),
        (vit_state, 'mmdet', 'mmdet has no class for ViT; convert it --to mmpretrain or --to mmseg or --to timm'),
        (vit_state, 'torchvision', "target must be one of mmpretrain, mmseg, mmdet, timm, got 'torchvision'"),
        (lambda: vit_state(**{'norm_pre.weight': noise(32)}), 'mmseg', 'mmseg has no class for CLIP'),
    ],
)
def test_refuses(state, target, message):
    with pytest.raises(ForeignBackboneError, match=message):
        convert_backbone(state(), target)


def test_every_tensor_is_used_or_named():
    """The sum of what is used and of what is named is the file."""
    state = vit_state(mask_token=noise(1, 1, 32), **{'head.weight': noise(3, 32)})
    converted = convert_backbone(state, 'mmpretrain')
    used = sum(v.numel() for v in converted.tensors.values())
    assert used + sum(state[n].numel() for n in converted.left) == sum(v.numel() for v in state.values())


def test_what_a_file_looks_like():
    assert looks_like(vit_state()) == 'a ViT, 2 blocks, 32 channels'
    assert looks_like({'conv.weight': noise(1)}) == ''
