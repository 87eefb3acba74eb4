"""Every message that docs/troubleshooting.md quotes is raised as it is quoted."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port
from families import SWIN, VIT, stir
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.models import build_backbone, build_classifier
from mmpretrain.registry import MODELS
from torch import nn

from iconformer_mm import add_adapter, inject, load_adapter, merge, save_adapter
from iconformer_mm.checkpoint import load_safetensors, read_adapter, save_safetensors
from iconformer_mm.cli.errors import user_errors
from iconformer_mm.datasets.checks import CheckedPipeline
from iconformer_mm.datasets.fit import DepthRange, Head, Model, check_fit
from iconformer_mm.engine import CheckedRunner, PEFTOptimWrapperConstructor, WeightsHook, load_config
from iconformer_mm.engine.config import check_precision, merge_options
from iconformer_mm.ops import filter_norm
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import check_averages, describe_training
from iconformer_mm.tuning.methods import build_method
from iconformer_mm.tuning.unused import unused_adapters
from iconformer_mm.tuning.without_gradient import GradientWatch

PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text(encoding='utf-8')


def vit(**changes):
    return build_backbone(dict(type='VisionTransformer', arch={**VIT, **changes}, img_size=64))


def classifier(num_classes=3):
    torch.manual_seed(0)
    return build_classifier(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=VIT, img_size=64),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32),
        )
    )


def adapted(method='icon', **options):
    model = classifier()
    inject(model, method, **options)
    return model


def inject_twice():
    inject(adapted())


def inject_into_wrapped():
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    inject(wrapped)


def merge_tokens():
    """A host that drops tokens on their way to the blocks."""
    backbone = vit()
    inject(backbone)
    backbone.drop_after_pos = nn.Identity()
    backbone.drop_after_pos.forward = lambda x: x[:, :10]
    backbone(torch.zeros(1, 3, 64, 64))


def train_text_without_gradients():
    model = nn.ModuleDict(dict(backbone=vit(), language_model=vit()))
    inject(model, 'lora', where=['backbone', 'language_model'])
    watch = GradientWatch(get_injection(model).learning_modules())
    watch.begin()
    with torch.no_grad():
        model.language_model(torch.zeros(1, 3, 64, 64))
    watch.end()


def run_block_alone():
    backbone = vit()
    inject(backbone)
    backbone.layers[0](torch.zeros(1, 17, 32))


def load_weights(change):
    """Weights of another make into an adapted backbone, as MMEngine loads them."""
    backbone = vit()
    inject(backbone)
    backbone.load_state_dict(change(vit(), vit(feedforward_channels=32)), strict=False)


def rename(own, other):
    return {name.replace('layers', 'blocks'): value for name, value in own.state_dict().items()}


def take_other(own, other):
    return other.state_dict()


def plain(model):
    """A checkpoint as MMEngine writes it."""
    return dict(meta={}, state_dict=model.state_dict())


def recorded(model):
    """A checkpoint as it is written beside a PEFTHook."""
    return dict(plain(model), meta=dict(iconformer_mm=describe_training(get_injection(model))))


def head_only():
    return dict(meta={}, state_dict={n: v for n, v in classifier().state_dict().items() if n.startswith('head')})


def adapter_file():
    save_adapter(adapted(), 'a.safetensors')
    return load_safetensors('a.safetensors')


def run(tmp_path, model, make_checkpoint, mode='train'):
    """What the hook sees of a run: a checkpoint is loaded, then the loop begins."""
    runner = SimpleNamespace(
        model=model,
        cfg=dict(model=dict()),
        hooks=[],
        logger=logging.getLogger('test'),
        optim_wrapper=None,
        _load_from='epoch_1.pth',
        _resume=mode == 'resume',
        _train_loop=dict() if mode == 'test' else EpochBasedTrainLoop.__new__(EpochBasedTrainLoop),
    )
    hook = WeightsHook()
    hook.before_run(runner)
    if make_checkpoint is not None:
        checkpoint = make_checkpoint()
        hook.after_load_checkpoint(runner, checkpoint)
        load_state_dict(model, checkpoint['state_dict'], logger='silent')
    hook.before_test(runner) if mode == 'test' else hook.before_train(runner)


def load_into(tmp_path, model):
    save_adapter(stir(adapted()), tmp_path / 'a.safetensors')
    load_adapter(model, tmp_path / 'a.safetensors')


def other_base(tmp_path):
    model = classifier()
    with torch.no_grad():
        model.backbone.cls_token += 1
    load_into(tmp_path, model)


def read_broken(tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'no such file')
    read_adapter(tmp_path / 'a.safetensors')


def read_weights(tmp_path):
    save_safetensors(dict(a=torch.zeros(1)), tmp_path / 'a.safetensors')
    read_adapter(tmp_path / 'a.safetensors')


def read_checkpoint(tmp_path):
    save_safetensors(dict(a=torch.zeros(1)), tmp_path / 'a.safetensors', {'iconformer_mm.checkpoint': '{}'})
    read_adapter(tmp_path / 'a.safetensors')


def load_data(dataset):
    loader = dict(batch_size=1, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False))
    CheckedRunner.build_dataloader(ConfigDict(loader))


def check_labels(**data):
    CheckedPipeline(Compose([lambda sample: sample]), 150)(dict(img_path='a.jpg', **data))


def raise_(sentence):
    raise ValueError(sentence)


def fit(model, dataset, trained=None):
    known = None if trained is None else SimpleNamespace(metainfo=dict(classes=trained))
    check_fit(model, dataset, known=known)


class Strokes(SimpleNamespace):
    """A data set as far as it is asked for its classes."""

    def __len__(self):
        return 4

    def get_data_info(self, index):
        return dict(img_path=f'{index}.jpg', ori_shape=(4, 4))


def strokes(**metainfo):
    return Strokes(metainfo=metainfo, split='train')


def maps(what='', **content):
    """One with maps, all alike."""
    loader = type(f'Load{what}Annotation', (), {'__call__': lambda self, sample: {**sample, **content}})()
    metainfo = {} if what else dict(classes=['background', 'shape'])
    pipeline = CheckedPipeline(Compose([loader]), None)
    return Strokes(metainfo=metainfo, split='train', reduce_zero_label=False, pipeline=pipeline)


def mask():
    return np.array([[0, 255]] * 2).repeat(2, axis=0).repeat(2, axis=1)


def quantised():
    backbone = vit()
    backbone.eval()
    return torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear}, dtype=torch.qint8)


def unused():
    backbone = build_backbone(
        dict(type='VisionTransformer', arch={**VIT, 'num_layers': 4}, img_size=64, out_type='raw', out_indices=1)
    )
    inject(backbone)
    return unused_adapters(backbone)


CASES = {
    'unknown PEFT method': lambda _: build_method('icn'),
    'unknown option': lambda _: build_method('icon', bottlneck=8),
    "a PEFT method's config": lambda _: build_method(dict(bottleneck=32)),
    'kernel_size must': lambda _: inject(vit(), kernel_size=4),
    'alpha must be': lambda _: build_method('lora', alpha=float('nan')),
    'gamma and beta must be': lambda _: filter_norm(torch.ones(1, 2, 3, 3), torch.ones(4, 3, 3), torch.ones(2, 3, 3)),
    '... is not a file of a PEFT': lambda _: load_config(
        str(ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'),
        str(ROOT / 'configs' / '_base_' / 'schedules' / 'quickstart_70e.py'),
    ),
    "config 'mmpretrain::nowhere'": lambda _: load_config('mmpretrain::nowhere'),
    "config 'mmnothing::x'": lambda _: load_config('mmnothing::x'),
    'no known Transformer': lambda _: inject(build_backbone(dict(type='ResNet', depth=18))),
    'the model is adapted already': lambda _: inject_twice(),
    'MMDistributedDataParallel': lambda _: inject_into_wrapped(),
    'mmpretrain Swin blocks': lambda _: inject(
        build_backbone(dict(type='SwinTransformer', arch=SWIN, img_size=64, pad_small_map=True)), 'vpt'
    ),
    'num_blocks is': lambda _: inject(vit(), 'partial', num_blocks=9),
    '... tokens do not fit': lambda _: merge_tokens(),
    '... has several backbones': lambda _: inject(nn.ModuleDict(dict(rgb=vit(), depth=vit()))),
    'no backbone is found': lambda _: inject(nn.ModuleDict(dict(head=nn.ModuleList([vit().layers[0]])))),
    'unfreeze: no parameter': lambda _: inject(vit(), unfreeze=['patch_embd.*']),
    '... needs the base': lambda _: add_adapter(adapted(unfreeze=['cls_token']), 'other'),
    "... is MMPretrain's LoRAModel": lambda _: inject(
        MODELS.build(
            dict(
                type='LoRAModel',
                module=dict(type='VisionTransformer', arch=VIT, img_size=64),
                rank=2,
                targets=[dict(type='qkv')],
            )
        )
    ),
    'a block of': lambda _: run_block_alone(),
    "config '...': nobody reads": lambda tmp_path: misspelt(tmp_path),
    'error: the weights': lambda tmp_path: tell(tmp_path, f'http://127.0.0.1:{free_port()}/deit.pth'),
    'error: no tensor of': lambda tmp_path: tell(tmp_path, tmp_path / 'alone.pth', 'backbone.'),
    'with_cp recomputes': lambda _: inject(vit(), 'bitfit', with_cp=True),
    'no gradient comes back': lambda _: train_text_without_gradients(),
    'nothing to train': lambda _: PEFTOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=0.1)))(frozen_vit()),
    'wrong pre-trained weights for VisionTransformer: ... of': lambda _: load_weights(rename),
    'wrong pre-trained weights for VisionTransformer: ... frozen': lambda _: load_weights(take_other),
    'the weights hold adapters': lambda _: adapted('lora').load_state_dict(adapted().state_dict(), strict=False),
    'weights were loaded, but': lambda tmp_path: run(tmp_path, adapted('frozen'), head_only),
    'there are no weights': lambda tmp_path: run(tmp_path, adapted(), None, 'test'),
    '... lacks ... of the ... tensors': lambda tmp_path: run(tmp_path, adapted('frozen'), head_only, 'test'),
    "... was trained with another PEFT method: 'icon' with": lambda tmp_path: run(
        tmp_path, adapted(bottleneck=8), lambda: recorded(adapted(bottleneck=16)), 'test'
    ),
    '... was trained with another PEFT method, or': lambda tmp_path: run(
        tmp_path, adapted(bottleneck=8), lambda: plain(adapted(bottleneck=16)), 'test'
    ),
    '... but the model is not adapted': lambda tmp_path: run(tmp_path, classifier(), lambda: plain(adapted()), 'test'),
    '... holds no adapters': lambda tmp_path: run(tmp_path, adapted(), lambda: plain(classifier()), 'test'),
    '... holds only the trained': lambda tmp_path: run(
        tmp_path,
        adapted(),
        lambda: dict(plain(adapted()), iconformer_mm=describe_training(get_injection(adapted()))),
    ),
    '... is an adapter file': lambda tmp_path: run(tmp_path, adapted(), adapter_file, 'resume'),
    '... was written by a run with EMAHook': lambda tmp_path: run(
        tmp_path, adapted(), lambda: dict(plain(adapted()), ema_state_dict={}), 'resume'
    ),
    '... is not a checkpoint of one model': lambda _: check_averages(
        dict(plain(adapted()), ema_state_dict={'module.head.fc.bias': torch.zeros(3)}), 'epoch_1.pth', True
    ),
    '... does not fit: it was': other_base,
    '... does not fit: 2 tensors': lambda tmp_path: load_into(tmp_path, classifier(5)),
    'adapter file nowhere': lambda _: read_adapter('nowhere.safetensors'),
    '... is not a valid': read_broken,
    '... is a safetensors file': read_weights,
    '... is a training checkpoint': read_checkpoint,
    "method 'full'": lambda tmp_path: save_adapter(adapted('full'), tmp_path / 'a.safetensors'),
    "method 'icon' cannot": lambda _: merge(adapted()),
    'Digits(': lambda _: load_data(dict(type='Digits', split='test', indices=[])),
    'CustomDataset(': lambda _: load_data(dict(type='CustomDataset', data_root='nowhere', data_prefix='train')),
    '...: the label map': lambda _: check_labels(gt_seg_map=np.full((4, 4), 150, np.uint8), ori_shape=(4, 4)),
    'head is for 3': lambda _: fit(Model((Head('head', 3),)), strokes(classes=list('abcde'))),
    'the classes of Strokes': lambda _: load_data(dict(type='Strokes', metainfo=dict(classes='disc'))),
    "Strokes(...) has 'b'": lambda _: fit(Model((Head('head', 2),)), strokes(classes=['b', 'a']), ['a', 'b']),
    '...: the 4 label maps': lambda _: fit(Model((Head('decode_head', 2),)), maps(gt_seg_map=mask())),
    '...: 100% of': lambda _: fit(Model(max_depth=3.0), maps('Depth', gt_depth_map=np.full((4, 4), 8.0))),
    'no depth in': lambda _: raise_(DepthRange(0, 10, False).find_fault(np.zeros((4, 4)))),
    '--cfg-options optim': lambda _: merge_options(Config(dict(optim_wrapper=dict())), {'optim_wraper.lr': 1}),
    'the config trains in mixed': lambda _: check_precision(Config(dict(optim_wrapper=dict(type='AmpOptimWrapper')))),
    '8 layers of': lambda _: inject(quantised()),
    '... adapted blocks': lambda _: raise_(unused()),
    '`parts` (head)': lambda tmp_path: load_adapter(classifier(), tmp_path / 'a.safetensors', parts=dict(head={})),
    '...: the largest depth': lambda _: check_labels(gt_depth_map=np.full((4, 4), 5000.0), ori_shape=(4, 4)),
}


def misspelt(tmp_path):
    (tmp_path / 'c.py').write_text('optim_wraper = dict()')
    load_config(str(tmp_path / 'c.py'))


def tell(tmp_path, checkpoint, prefix=None):
    """Load weights as a command does."""
    torch.save(dict(cls_token=torch.zeros(1)), tmp_path / 'alone.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), prefix=prefix)
    try:
        user_errors(build_backbone(dict(type='VisionTransformer', arch=VIT, init_cfg=init_cfg)).init_weights)()
    except SystemExit as end:
        raise ValueError(end.code) from None


def frozen_vit():
    backbone = vit()
    inject(backbone, 'frozen')
    return backbone


HEADINGS = re.findall(r'^### `(.*)`$', PAGE, re.MULTILINE)


def heading_of(beginning):
    (heading,) = [heading for heading in HEADINGS if heading.startswith(beginning)]
    return heading


def test_every_message_has_a_case():
    assert sorted(map(heading_of, CASES)) == sorted(HEADINGS) and len(HEADINGS) >= 25


@pytest.mark.parametrize('beginning', CASES)
def test_message(beginning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pattern = '.*'.join(re.escape(part) for part in heading_of(beginning).split('...'))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of many kinds; the message is what counts)
        CASES[beginning](tmp_path)
    assert re.search(pattern, ' '.join(str(caught.value).split()), re.DOTALL), caught.value
