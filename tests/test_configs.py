"""Every config builds, trains what its name says, and inherits a whole pipeline."""

import pytest
from conftest import ROOT
from mmengine.registry import init_default_scope

import iconformer_mm  # noqa: F401
from iconformer_mm import inject, summarize
from iconformer_mm.apis import load_config

CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'configs').glob('*/*.py'))
ADAPTERS = {
    ('vit-base-p16', 'icon'): (1_645_824, 85_798_656),
    ('vit-base-p16', 'adaptformer'): (1_189_632, 85_798_656),
    ('swin-base', 'icon'): (2_466_048, 86_743_224),
    ('swin-base', 'adaptformer'): (1_553_664, 86_743_224),
}


def build_model(name):
    from mmpretrain.registry import MODELS

    cfg = load_config(str(ROOT / name))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    for hook in cfg.get('custom_hooks', []):
        if hook.type == 'PEFTHook':
            inject(model, hook.method)
    return cfg, model


def test_there_are_configs():
    assert len(CONFIGS) == 24 + 5


@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_trains_what_it_says(name):
    cfg, model = build_model(name)
    summary = summarize(model)
    method = next(m for m in ('icon', 'adaptformer', 'frozen', 'full', 'pretrain') if f'_{m}' in name)
    assert (summary.method or 'full') == ('full' if method == 'pretrain' else method)
    for (backbone, peft), (adapters, base) in ADAPTERS.items():
        if backbone in name and peft == method:
            assert (summary.adapters, summary.backbone) == (adapters, base)
    if method in ('full', 'pretrain'):
        assert summary.frozen == 0
    # The head's size is the data set's.
    classes = {'cifar100': 100, 'svhn': 10, 'food101': 101, 'digits': 10, 'strokes': 50}
    expected = next(n for key, n in classes.items() if f'{key}.py' in name)
    assert cfg.model.head.num_classes == model.head.num_classes == expected
    assert cfg.train_dataloader.dataset.type and cfg.val_evaluator.type == 'Accuracy'
    if 'Digits' not in cfg.train_dataloader.dataset.type and 'Strokes' not in cfg.train_dataloader.dataset.type:
        assert cfg.model.backbone.init_cfg.checkpoint.endswith('.pth')


@pytest.mark.parametrize('dataset', ['cifar100', 'svhn', 'food101'])
def test_methods_of_a_benchmark_share_one_recipe(dataset):
    """But for the method (and, stated, the learning rate of full fine-tuning on Swin)."""
    for backbone in ('vit-base-p16-mae', 'swin-base-in21k'):
        recipes = []
        for name in CONFIGS:
            if f'/{dataset}/' in name and backbone in name:
                cfg = load_config(str(ROOT / name)).to_dict()
                for key in ('custom_hooks', 'work_dir'):
                    cfg.pop(key, None)
                if '_full_' in name and backbone.startswith('swin'):
                    assert cfg['optim_wrapper']['optimizer'].pop('lr') == 5e-5
                    cfg['optim_wrapper']['optimizer']['lr'] = 1e-3
                recipes.append(cfg)
        assert len(recipes) == 4
        assert all(recipe == recipes[0] for recipe in recipes)
