"""Every config builds, trains what its name says, and inherits a whole pipeline."""

import pytest
import yaml
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope

import iconformer_mm  # noqa: F401
from iconformer_mm import inject, summarize
from iconformer_mm.analysis.inspection import find_mistakes
from iconformer_mm.checkpoint import empty_parameters
from iconformer_mm.engine import load_config

CONFIGS = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / 'configs').glob('*/*.py') if p.parent.name not in ('foundation', 'towers')
)
COUNTS = {'cifar100': 8, 'svhn': 8, 'food101': 8, 'quickstart': 5, 'coco': 32, 'ade20k': 24, 'nyu': 8, 'scenes': 14}
COUNTS['comparison'] = 3  # not benchmarks: no metafile lists them
# Shares of iCoN, in percent, for backbones whose adapters are not in the published budget.
SHARES = {'_swin-t_': 3.730, 'segformer_mit-b5': 4.854, 'beit-base': 1.901, 'mae-base': 1.891}
METHODS = ('icon', 'adaptformer', 'frozen', 'full')

# Adapters of iCoN and AdaptFormer, and the share of iCoN in percent, for the published backbones.
BUDGETS = {
    'vit-base-p16': (1_645_824, 1_189_632, 1.918),
    'swin-base': (2_466_048, 1_553_664, 2.84),
    'swin-b-': (2_466_048, 1_553_664, 2.84),
    'swin-large': (3_242_112, 2_329_728, 1.66),
    'swinv2-base': (2_466_048, 1_553_664, 2.84),
}


def method_of(name):
    return next((m for m in METHODS if f'_{m}_' in name), 'full')


def build_model(name):
    cfg = load_config(str(ROOT / name))
    init_default_scope(cfg.default_scope)
    with empty_parameters():  # only shapes count here
        model = MODELS.build(cfg.model)
    for hook in cfg.get('custom_hooks', []):
        if hook.type == 'PEFTHook':
            inject(model, hook.method)
    return cfg, model


def metafile_entries():
    """What model-index.yml leads to, by config."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    collections = {collection['Name'] for collection in index['Collections']}
    entries = {}
    for path in index['Import']:
        for model in yaml.safe_load((ROOT / path).read_text())['Models']:
            assert model['In Collection'] in collections and model['Config'] not in entries
            assert model['Config'].startswith(path.rpartition('/')[0]) and model['Name'] in model['Config']
            entries[model['Config']] = model['Metadata']
    return entries


ENTRIES = metafile_entries()


def test_there_are_configs():
    folders = [name.split('/')[1] for name in CONFIGS]
    assert {folder: folders.count(folder) for folder in set(folders) - {'_base_'}} == COUNTS
    assert set(ENTRIES) == {name for name in CONFIGS if not ('pretrain-' in name or 'configs/comparison' in name)}


@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_trains_what_it_says(name):
    cfg, model = build_model(name)
    summary = summarize(model)
    method = method_of(name)
    assert (summary.method or 'full') == method
    assert cfg.custom_imports.imports == ['iconformer_mm']
    if method == 'full':
        assert summary.backbone_share == 1
    else:
        assert summary.parts['backbone'] == (0, summary.backbone)
        trained, adapters = summary.parts.get('adapters', (0, 0))
        assert adapters == summary.adapters
        assert summary.trainable > trained  # a head is trained, too
    for key, (icon, adaptformer, share) in BUDGETS.items():
        if key in name and method in ('icon', 'adaptformer'):
            assert summary.adapters == (icon if method == 'icon' else adaptformer)
            if method == 'icon':
                assert abs(100 * summary.adapters / summary.backbone - share) < 0.006
    for key, share in SHARES.items():
        if key in name and method == 'icon':
            assert round(100 * summary.backbone_share, 3) == share
    if name in ENTRIES:
        assert ENTRIES[name]['PEFT Method'] == method
        assert ENTRIES[name]['Backbone Parameters'] == summary.backbone
        assert ENTRIES[name]['Trained Share of the Backbone'] == f'{summary.backbone_share:.4%}'
    assert cfg.train_dataloader.dataset and cfg.val_evaluator
    if 'quickstart' not in name and 'pretrain-' not in name:
        backbone = cfg.model.backbone
        weights = (backbone.get('init_cfg') or {}).get('checkpoint') or cfg.model.get('pretrained') or cfg.load_from
        assert weights.endswith('swin-scenes_source.safetensors' if 'scenes' in name else '.pth')


CLASSES = {'cifar100': 100, 'svhn': 10, 'food101': 101, 'digits': 10, 'strokes': 50}


@pytest.mark.parametrize('name', [n for n in CONFIGS if any(f'{key}.py' in n for key in CLASSES)])
def test_heads_have_the_classes_of_their_data(name):
    expected = next(count for key, count in CLASSES.items() if f'{key}.py' in name)
    assert load_config(str(ROOT / name)).model.head.num_classes == expected


def benchmark_of(name):
    return name.replace(f'_{method_of(name)}_', '_METHOD_')


@pytest.mark.parametrize(
    'benchmark', sorted({benchmark_of(n) for n in CONFIGS if n in ENTRIES and 'quickstart' not in n})
)
def test_methods_of_a_benchmark_share_one_recipe(benchmark):
    """But for the method, and for the learning rate where a README says so."""
    recipes = []
    for method in METHODS:
        name = benchmark.replace('_METHOD_', f'_{method}_')
        cfg = load_config(str(ROOT / name)).to_dict()
        for key in ('custom_hooks', 'work_dir'):
            cfg.pop(key, None)
        if method == 'full' and 'swin-base-in21k' in name:
            assert cfg['optim_wrapper']['optimizer']['lr'] == 5e-5
            cfg['optim_wrapper']['optimizer']['lr'] = 1e-3
        if '/scenes/' in name:
            del cfg['optim_wrapper']['optimizer']['lr']
        recipes.append(cfg)
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'pretrain' not in name])
def test_none_has_a_usual_mistake(name):
    assert find_mistakes(load_config(str(ROOT / name))) == []
