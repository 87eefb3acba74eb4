"""What of a model is adapted: found by structure, said by the user, or refused."""

import copy

import pytest
import torch
from families import SWIN, VIT, flatten, image, stir
from mmengine.model import BaseModel, BaseModule, ExponentialMovingAverage
from torch import nn

from iconformer_mm import add_adapter, inject, merge, remove, save_adapter, set_adapter, summarize
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.freezing import is_adapter


def vit(**options) -> nn.Module:
    from mmpretrain.models.backbones import VisionTransformer

    return VisionTransformer(arch=VIT, img_size=64, out_type='raw', **options)


def swin() -> nn.Module:
    from mmpretrain.models.backbones import SwinTransformer

    return SwinTransformer(arch=SWIN, img_size=64, pad_small_map=True)


class Model(BaseModel):
    """Holds what it is given, under the names it is given."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        raise NotImplementedError


class Plain(nn.Module):
    """The same, without a library's base class."""

    def __init__(self, **parts):
        nn.Module.__init__(self)
        for name, part in parts.items():
            setattr(self, name, part)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def check(model, path, frozen=()):
    """Only adapters at one path, and all that stands beside it, are trained."""
    before = trained(model)
    summary = inject(model)
    assert summary.backbones == ([path] if isinstance(path, str) else path)
    for name, parameter in model.named_parameters():
        inside = any(name.startswith(f'{p}.') if p else True for p in summary.backbones)
        if inside:
            assert parameter.requires_grad == is_adapter(name), name
        else:
            assert parameter.requires_grad == (name in before and not name.startswith(tuple(frozen))), name
    return summary


@pytest.mark.parametrize('name', ['image_encoder', 'vision_encoder', 'vision_backbone', 'visual', 'encoder', 'trunk'])
@pytest.mark.parametrize('base', [Model, Plain])
def test_one_encoder_of_any_name(name, base):
    summary = check(
        base(**{name: vit(), 'text_encoder': nn.Linear(4, 4), 'proj': nn.Linear(4, 4), 'head': nn.Linear(4, 2)}), name
    )
    assert summary.parts['text_encoder'] == (20, 20) and summary.parts['head'] == (10, 10)
    assert summary.num_sites == 2


def test_a_direct_parameter_of_the_model_is_no_backbone():
    model = Model(visual=vit(), logit_scale=nn.Parameter(torch.ones([])))
    check(model, 'visual')
    assert model.logit_scale.requires_grad


def test_an_encoder_and_its_neck_in_a_row():
    check(Model(image_encoder=nn.Sequential(vit(), nn.Linear(32, 8)), head=nn.Linear(8, 2)), 'image_encoder.0')


@pytest.mark.parametrize('outer', ['detector', 'student', 'model'])
def test_a_backbone_in_a_model_in_a_model(outer):
    inner = Model(backbone=swin(), neck=nn.Linear(4, 4), roi_head=nn.Linear(4, 4))
    check(Model(**{outer: inner, 'track_head': nn.Linear(4, 4)}), f'{outer}.backbone')


def test_blocks_of_a_decoder_or_a_head_are_no_backbone():
    """Segmenter's mask Transformer and MAE's decoder are made of known blocks."""
    model = Model(backbone=vit(), neck=nn.ModuleList([vit().layers[0]]), decode_head=nn.ModuleList([vit()]))
    check(model, 'backbone')
    assert not any(is_adapter(n) for n, _ in model.decode_head.named_parameters())


def test_names_with_adapter_beside_the_backbone():
    """As SAN's side adapter network."""
    model = Model(image_encoder=vit(), decode_head=nn.ModuleDict(dict(side_adapter_network=nn.Linear(2, 2))))
    model.decode_head.adapter = nn.Linear(3, 3)
    summary = check(model, 'image_encoder')
    assert summary.parts['decode_head'] == (18, 18)
    assert summary.adapters == sum(p.numel() for n, p in model.image_encoder.named_parameters() if is_adapter(n))


def test_several_encoders_are_refused_unless_named():
    model = Plain(rgb=vit(), depth=swin(), head=nn.Linear(2, 2))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"several backbones, 'rgb' \(VisionTransformer, 2 known blocks\), 'depth'"):
        inject(model)
    assert list(model.state_dict()) == keys and trained(model) == set(keys) & trained(model)
    summary = inject(model, backbones=['rgb', 'depth'], bottleneck=4)
    assert summary.num_sites == 2 + 5
    assert summary.sites['mmpretrain ViT'] == ['rgb.layers.0', 'rgb.layers.1']
    assert all(p.requires_grad for p in model.head.parameters())
    assert not model.rgb.cls_token.requires_grad and not model.depth.patch_embed.projection.weight.requires_grad
    remove(model)
    assert list(model.state_dict()) == keys
    inject(model, backbones=['rgb'])
    assert model.depth.patch_embed.projection.weight.requires_grad  # as asked for; the table shows it
    assert summarize(model).parts['depth'][0] > 0


def test_a_second_encoder_without_known_blocks_counts():
    from mmpretrain.models.backbones import ResNet

    with pytest.raises(ValueError, match=r"several backbones, 'backbone' .* 'depth_backbone' \(ResNet, 0 known"):
        inject(Model(backbone=vit(), depth_backbone=ResNet(18)))


@pytest.mark.parametrize(
    ('paths', 'message'),
    [
        (['rgbb'], r"has no module 'rgbb' \(did you mean 'rgb'.*\); found by structure: 'rgb'"),
        (['rgb', 'rgb'], "'rgb' is given twice"),
        (['rgb', 'rgb.layers'], "'rgb.layers' is given twice or is nested with another"),
        ([], 'at least one module'),
        ('rgb', "backbones must be a list of paths of modules, got 'rgb'"),
        (['teacher'], "'teacher' follows another module by averaging"),
    ],
)
def test_wrong_paths(paths, message):
    model = Plain(rgb=vit(), depth=vit(), teacher=vit())
    with pytest.raises(ValueError, match=message):
        inject(model, backbones=paths)
    assert summarize(model).method is None and not any(map(is_adapter, model.state_dict()))


def test_a_model_in_which_nothing_is_found():
    with pytest.raises(ValueError, match=r"no backbone is found in Model, which has .*'net' \(Linear\).*backbones="):
        inject(Model(net=nn.Linear(2, 2)), 'bitfit')
    with pytest.raises(ValueError, match='no backbone is found in Model'):
        inject(Model(net=nn.Linear(2, 2)), 'frozen')


def test_named_backbones_without_known_blocks():
    from mmpretrain.models.backbones import ResNet

    model = Model(detector=Model(backbone=ResNet(18), bbox_head=nn.Linear(2, 2)))
    summary = inject(model, 'bitfit')
    assert summary.backbones == ['detector.backbone']
    assert model.detector.bbox_head.weight.requires_grad


# Classifiers of models that hold the blocks themselves


def timm_vit(num_classes=5, **options):
    import timm

    return timm.create_model(
        'vit_tiny_patch16_224', num_classes=num_classes, img_size=64, embed_dim=32, depth=2, num_heads=2, **options
    )


@pytest.mark.parametrize('method', ['icon', 'lora', 'bitfit', 'ssf', 'frozen', 'partial'])
def test_the_classifier_of_a_bare_model_is_its_head(method, tmp_path):
    model = timm_vit()
    summary = inject(model, method)
    heads = {'head.weight', 'head.bias'}
    assert heads <= trained(model) and summary.parts['head'] == (165, 165)
    assert not any(name.startswith('head.') and is_adapter(name) for name in model.state_dict())
    assert {n for n in trained(model) if not is_adapter(n)} == heads

    stir(model)
    torch.nn.init.normal_(model.head.weight)
    save_adapter(model, tmp_path / 'a.safetensors')
    from iconformer_mm import load_adapter

    torch.manual_seed(0)
    twin = timm_vit()
    own = {n: v for n, v in model.state_dict().items() if not is_adapter(n) and n not in heads}
    twin.load_state_dict(own, strict=False)
    load_adapter(twin, tmp_path / 'a.safetensors')  # its own, random classifier is no part of the base
    x = image((64, 64))
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_several_classifiers():
    model = timm_vit()
    model.head_dist = nn.Linear(32, 5)
    inject(model)
    assert {'head.weight', 'head_dist.weight'} <= trained(model)


def test_the_head_of_timm_swin():
    import timm

    model = timm.create_model(
        'swin_tiny_patch4_window7_224', num_classes=5, img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2),
        window_size=2,
    )  # fmt: skip
    inject(model)
    assert {n for n in trained(model) if not is_adapter(n)} == {'head.fc.weight', 'head.fc.bias'}


def test_a_second_task_has_a_classifier_of_its_own():
    model = timm_vit()
    add_adapter(model, 'a', bottleneck=4)
    first = model.head
    add_adapter(model, 'b', bottleneck=4, parts=dict(head=nn.Linear(32, 3)))
    set_adapter(model, 'b')
    assert model(image((64, 64))).shape == (2, 3)
    set_adapter(model, 'a')
    assert model.head is first


# Copies that follow by averaging


class MomentumModel(BaseModel):
    """As BYOL and MoCo v3 of MMPretrain."""

    def __init__(self, update_buffers=False):
        super().__init__()
        self.backbone = vit()
        self.neck = nn.Linear(32, 4)
        self.momentum_encoder = ExponentialMovingAverage(
            nn.Sequential(self.backbone, self.neck), momentum=0.5, update_buffers=update_buffers
        )

    def forward(self, x):
        return x


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('method', ['icon', 'lora', 'ssf'])
def test_averaging_models_follow_with_adapters(method, update_buffers):
    torch.manual_seed(0)
    model = MomentumModel(update_buffers)
    keys = list(model.state_dict())
    summary = inject(model, method)
    assert summary.following == ['momentum_encoder.module.0']
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    own, copied = model.backbone, model.momentum_encoder.module[0]
    assert [n for n, _ in own.named_parameters()] == [n for n, _ in copied.named_parameters()]
    for a, b in zip(own.parameters(), copied.parameters()):
        assert torch.equal(a, b)
    model.momentum_encoder.update_parameters(nn.Sequential(model.backbone, model.neck))
    before = {n: p.clone() for n, p in own.named_parameters()}
    stir(own)
    model.momentum_encoder.update_parameters(nn.Sequential(model.backbone, model.neck))
    for (name, a), b in zip(own.named_parameters(), copied.parameters()):
        torch.testing.assert_close(b, (a + before[name]) / 2)
    model.train()
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    remove(model)
    assert list(model.state_dict()) == keys
    model.momentum_encoder.update_parameters(nn.Sequential(model.backbone, model.neck))


def test_merging_covers_copies():
    model = MomentumModel()
    inject(model, 'lora')
    stir(model)
    x = image((64, 64))
    model.eval()
    expected = [model.backbone(x)[0], model.momentum_encoder.module[0](x)[0]]
    merge(model)
    assert not any(map(is_adapter, model.state_dict()))
    actual = [model.backbone(x)[0], model.momentum_encoder.module[0](x)[0]]
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_teachers_follow_parameter_by_parameter():
    """As mmdet's MeanTeacherHook and MMPretrain's CAE update them."""
    detector = Model(backbone=swin(), bbox_head=nn.Linear(2, 2))
    model = Model(student=detector, teacher=copy.deepcopy(detector).requires_grad_(False))
    summary = inject(model)
    assert summary.backbones == ['student.backbone'] and summary.following == ['teacher.backbone']
    pairs = list(zip(model.student.named_parameters(), model.teacher.named_parameters()))
    assert all(a == b for (a, _), (b, _) in pairs)
    stir(model.student)
    for (_, a), (_, b) in pairs:
        b.data.mul_(0.0).add_(a.data)
    x = image((64, 64))
    model.eval()
    for a, b in zip(flatten(model.student.backbone(x)), flatten(model.teacher.backbone(x))):
        assert torch.equal(a, b)


def test_a_second_adapter_is_refused_where_copies_follow():
    model = MomentumModel()
    inject(model)
    with pytest.raises(ValueError, match='copies that follow its backbone by averaging'):
        add_adapter(model, 'other')


def test_fixed_teachers_are_left_alone():
    model = Model(backbone=vit(), target_generator=vit(), teacher_model=Model(backbone=vit()))
    keys = [n for n in model.state_dict() if not n.startswith('backbone.')]
    summary = inject(model)
    assert summary.following == [] and summary.backbones == ['backbone']
    assert [n for n in model.state_dict() if not n.startswith('backbone.')] == keys


def test_born_adapted_copies_follow():
    from mmpretrain.registry import MODELS

    cfg = dict(type='mmpretrain.ICoNVisionTransformer', arch=VIT, img_size=64)
    model = Model(student=Model(backbone=MODELS.build(cfg)), teacher=Model(backbone=MODELS.build(cfg)))
    assert get_injection(model) is get_injection(model.student)
    with pytest.raises(ValueError, match='adapted apart from each other'):
        get_injection(Plain(a=MODELS.build(cfg), b=MODELS.build(cfg)))


# Hosts that lose adapters


def lora_model():
    from mmpretrain.models import LoRAModel

    return LoRAModel(
        module=dict(type='mmpretrain.VisionTransformer', arch=VIT, img_size=64), rank=2, targets=[dict(type='qkv')]
    )


@pytest.mark.parametrize('where', ['bare', 'backbone', 'inside'])
def test_lora_model_is_refused(where):
    inner = lora_model()
    model = Model(backbone=inner, head=nn.Linear(2, 2)) if where == 'backbone' else inner
    with pytest.raises(ValueError, match=r'LoRAModel, whose state_dict\(\) drops'):
        inject(model)
    assert not any(is_adapter(n) for n, _ in model.named_parameters())
    if where == 'inside':  # adapted before it is wrapped
        inject(inner.module)
        with pytest.raises(ValueError, match=r'leaves .* adapter tensors out of its state_dict\(\)'):
            save_adapter(inner, '/nowhere/a.safetensors')


def test_any_host_that_drops_adapters_is_refused():
    class Forgetful(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = vit()
            self._register_state_dict_hook(self.forget)

        @staticmethod
        def forget(module, state, prefix, metadata):
            for name in [n for n in state if 'adapter' in n]:
                del state[name]

        def forward(self, x):
            return self.backbone(x)

    model = Forgetful()
    with pytest.raises(ValueError, match=r'leaves adapters out of its state_dict\(\)'):
        inject(model)
    assert not any(is_adapter(n) for n, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
