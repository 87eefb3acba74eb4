"""A benchmark file and a method file make a config: for all of both."""

import copy
import json
import uuid

import pytest
import torch
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from safetensors.torch import load_file

from iconformer_mm import summarize
from iconformer_mm.checkpoint import empty_parameters
from iconformer_mm.datasets.scenes import WRITERS, scenes
from iconformer_mm.engine import add_peft, build_runner, load_config
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import build_method
from iconformer_mm.tuning.injection import adapter_shapes

FILES = sorted((ROOT / 'configs' / '_base_' / 'peft').glob('*.py'))
BENCHMARKS = sorted((ROOT / 'configs').glob('*/*_full_*.py'))
NO_PROMPTS = ('swin', 'beit', 'mae-base_upernet', 'mit')
each_file = pytest.mark.parametrize('file', FILES, ids=lambda path: path.stem)


def test_every_method_has_its_file():
    assert {path.stem for path in FILES} == set(PEFT_METHODS.module_dict)
    for path in FILES:
        hook = load_config(str(BENCHMARKS[0]), str(path)).default_hooks.peft
        method = build_method(hook.method)
        assert method.name == path.stem
        assert method.config == build_method(path.stem).config  # the defaults are the papers'


@pytest.mark.parametrize('benchmark', BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_takes_every_method(benchmark):
    """With recipe and model untouched; where a method is not defined, the error says so."""
    plain = load_config(str(benchmark))
    init_default_scope(plain.default_scope)
    with empty_parameters():  # only shapes count here
        model = plain.model  # SAN's is an image encoder
        backbone = MODELS.build({**(model.get('backbone') or model.image_encoder), 'init_cfg': None})
    others = [hook for hook in plain.get('custom_hooks', []) if hook.type != 'PEFTHook']
    for file in FILES:
        cfg = copy.deepcopy(plain)
        add_peft(cfg, str(file))
        method = cfg.default_hooks.pop('peft').method
        assert {**cfg.to_dict(), 'custom_hooks': None} == {**plain.to_dict(), 'custom_hooks': None}
        assert cfg.custom_hooks == others
        if file.stem == 'vpt' and any(word in benchmark.stem for word in NO_PROMPTS):
            with pytest.raises(ValueError, match='take no prompt tokens'):
                adapter_shapes(backbone, method)
        else:
            assert bool(adapter_shapes(backbone, method)) == (file.stem not in ('full', 'frozen'))


@each_file
@pytest.mark.filterwarnings('ignore')
def test_trains_and_tests_a_vit(file, tmp_path):
    """One epoch on digits; the checkpoint tests as the model did, the base is as it was."""
    results = []
    for work_dir, checkpoint in ((tmp_path, None), (tmp_path / 'test', tmp_path / 'epoch_1.pth')):
        cfg = load_config(str(ROOT / 'configs' / 'quickstart' / 'vit-quickstart_full_digits.py'), str(file))
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        cfg.default_hooks.checkpoint.interval = 1
        cfg.param_scheduler = []
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.indices = range(0, 297, 3)
        cfg.update(work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, log_level='WARNING')
        cfg.load_from = None if checkpoint is None else str(checkpoint)
        runner = build_runner(cfg)
        if checkpoint is None:
            runner.train()
            results.append(runner.message_hub.get_scalar('val/accuracy/top1').current())
        else:
            results.append(runner.test()['accuracy/top1'])
        assert summarize(runner.model).method == file.stem
    assert results[0] == results[1] > 15
    base = load_file(ROOT / 'configs' / 'quickstart' / 'vit-quickstart_strokes.safetensors')
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    kept = all(torch.equal(state[f'backbone.{name}'], value) for name, value in base.items())
    assert kept == (file.stem != 'full')
    assert (tmp_path / 'adapter.safetensors').is_file() == (file.stem != 'full')


@each_file
@pytest.mark.filterwarnings('ignore')
def test_trains_a_swin(file, tmp_path):
    """Two iterations of semantic segmentation on scenes."""
    cfg = load_config(str(ROOT / 'configs' / 'scenes' / 'upernet_swin-scenes_full_target.py'), str(file))
    WRITERS['ade20k'](tmp_path / 'data', 'train', scenes(2, 0, 'target'))
    WRITERS['ade20k'](tmp_path / 'data', 'val', scenes(2, 1, 'target'))
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = str(tmp_path / 'data')
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.update(work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex, log_level='WARNING', visualizer=None)
    if file.stem == 'vpt':
        with pytest.raises(ValueError, match='mmseg Swin blocks .* take no prompt tokens'):
            build_runner(cfg).train()
        return
    runner = build_runner(cfg)
    runner.train()
    assert summarize(runner.model).method == file.stem
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100


def test_work_folders_have_the_methods_name():
    quickstart = ROOT / 'configs' / 'quickstart'
    name = str(quickstart / 'vit-quickstart_full_digits.py')
    assert load_config(name, str(FILES[0])).work_dir == f'work_dirs/vit-quickstart_{FILES[0].stem}_digits'
    assert load_config(name, 'lora').work_dir == 'work_dirs/vit-quickstart_lora_digits'
    assert load_config(name).work_dir == 'work_dirs/vit-quickstart_full_digits'
    stock = 'mmpretrain::deit/deit-tiny_4xb256_in1k'
    assert load_config(stock, 'lora').work_dir == 'work_dirs/deit-tiny_4xb256_in1k_lora'


def test_a_file_without_a_method(tmp_path):
    path = tmp_path / 'other.py'
    path.write_text('custom_hooks = []\n')
    with pytest.raises(ValueError, match='is not a file of a PEFT method: it must have exactly one PEFTHook .* has 0'):
        load_config(str(BENCHMARKS[0]), str(path))
    with pytest.raises(FileNotFoundError, match='nowhere.py'):
        load_config(str(BENCHMARKS[0]), 'nowhere.py')
    assert json.dumps(load_config(str(BENCHMARKS[0]), 'lora').default_hooks.peft.to_dict()) == json.dumps(
        dict(type='PEFTHook', method=dict(type='lora'))
    )
