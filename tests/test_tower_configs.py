"""The recipes that adapt more than a backbone: their shares, and two iterations, narrowed, on rendered scenes."""

import copy
import uuid

import numpy as np
import pytest
import small_segmentors
import torch
import tower_models
from benchmark_runs import narrow_mask2former, two_iterations, write_scenes
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from small_bert import write_bert
from small_detectors import narrow_fusion, repair_grounding_dino

from iconformer_mm import inject, summarize
from iconformer_mm.analysis.inspection import find_mistakes, inspect_model
from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.datasets.scenes import SHAPES
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import method_of
from iconformer_mm.tuning.accounting import WeightsError
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import adapter_shapes, choose
from iconformer_mm.tuning.selection import Selection

RECIPES = sorted(path.stem for path in (ROOT / 'configs' / 'towers').glob('*.py'))
DINO = 'dino-5scale_swin-l_icon-lora_coco'
# By the beginning of a recipe, its model in tower_models.
KINDS = {'mask2former': 'Mask2Former', 'san': 'SAN', 'glip': 'GLIP', 'grounding-dino': 'Grounding DINO'}


def recipe(name):
    cfg = load_config(str(ROOT / 'configs' / 'towers' / f'{name}.py'))
    init_default_scope(cfg.default_scope)
    return cfg


def test_there_are_recipes():
    assert RECIPES == [
        'dino-5scale_swin-l_full_coco',
        DINO,
        'glip_swin-t_full_coco',
        'glip_swin-t_icon-lora_coco',
        'glip_swin-t_lora_coco',
        'grounding-dino_swin-b_full_coco',
        'grounding-dino_swin-b_icon-lora_coco',
        'grounding-dino_swin-t_full_coco',
        'grounding-dino_swin-t_icon-lora_coco',
        'grounding-dino_swin-t_lora_coco',
        'mask2former_swin-l_full_ade20k-640x640',
        'mask2former_swin-l_full_coco',
        'mask2former_swin-l_icon-lora_ade20k-640x640',
        'mask2former_swin-l_icon-lora_coco',
        'san_vit-b16_full_coco-stuff164k-640x640',
        'san_vit-b16_icon-lora_coco-stuff164k-640x640',
    ]
    for name in RECIPES:
        cfg = recipe(name)
        assert 'iconformer_mm' in cfg.custom_imports.imports and find_mistakes(cfg, data=False) == []


def test_shares_of_dino():
    """Of the whole encoder and decoder; the backbone's is that of other recipes with Swin-L."""
    cfg = recipe(DINO)
    cfg.model.backbone.update(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], init_cfg=None)
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    summary = inject(MODELS.build(cfg.model), **method_of(cfg))
    rank, width, ffn = 16, 256, 2048
    sampling = (8 * 5 * 4 * 2, 8 * 5 * 4, width)  # offsets, weights and values of 8 heads, 5 levels and 4 points
    deformable = rank * sum(width + outputs for outputs in sampling)
    both = 2 * rank * (width + ffn)
    assert summary.towers['encoder'].trained == 6 * (deformable + both) == 586_752
    assert summary.towers['decoder'].trained == 6 * (2 * rank * 2 * width + deformable + both) == 685_056
    assert [tower.method for tower in summary.towers.values()] == ['icon', 'lora', 'lora']


RANK, WIDTH, FFN = 16, 256, 2048


def low_rank(*maps):
    """Parameters of LoRA on linear maps, each of inputs and outputs."""
    return RANK * sum(inputs + outputs for inputs, outputs in maps)


def deformable(levels):
    """The maps q and v of deformable attention with 8 heads and 4 points: offsets, weights and values."""
    return [(WIDTH, 8 * levels * 4 * 2), (WIDTH, 8 * levels * 4), (WIDTH, WIDTH)]


ATTENTION, CLIP, SIDE = 2 * [(WIDTH, WIDTH)], 768, 240
FEED = [(WIDTH, FFN), (FFN, WIDTH)]
MASKS = {
    'pixel_decoder': 6 * low_rank(*deformable(3), (WIDTH, 1024), (1024, WIDTH)),
    'transformer_decoder': 9 * low_rank(*ATTENTION, *ATTENTION, *FEED),
}


def vit(width, blocks):
    """LoRA on q, v and both layers of the FFN."""
    return blocks * low_rank((width, width), (width, width), (width, 4 * width), (4 * width, width))


BERT = vit(768, 12)
# q, k and v of vision and language: the one asks, both have values.
FUSION = [(256, 2048), (256, 2048), (768, 2048)]
SHARES = {
    'mask2former_swin-l_icon-lora_coco': {f'panoptic_head.{part}': number for part, number in MASKS.items()},
    'mask2former_swin-l_icon-lora_ade20k-640x640': {f'decode_head.{part}': number for part, number in MASKS.items()},
    'san_vit-b16_icon-lora_coco-stuff164k-640x640': {
        'decode_head.side_adapter_network': vit(SIDE, 8),
        'decode_head.rec_with_attnbias': vit(CLIP, 3),
    },
    'glip_swin-t_icon-lora_coco': {
        'language_model': BERT,
        'bbox_head.head.dyhead_tower': 6 * low_rank(*FUSION) + vit(768, 6),
    },
    'grounding-dino_swin-b_icon-lora_coco': {
        'language_model': BERT,
        'encoder': 6
        * (
            low_rank(*deformable(4), *FEED)  # of the image
            + low_rank(*ATTENTION, (WIDTH, 1024), (1024, WIDTH))  # of the text
            + low_rank(*3 * [(WIDTH, 1024)])  # of both
        ),
        'decoder': 6 * low_rank(*deformable(4), *ATTENTION, *ATTENTION, *FEED),
    },
}
# iCoN: down to 64 channels and up again, with biases, and what makes the kernels, which is the same in each block.
ICON = 38_016


def icon(*blocks):
    """Of blocks by number and width."""
    return sum(number * (64 * width + 64 + width * 64 + width + ICON) for number, width in blocks)


BACKBONES = {
    'swin-l': icon((2, 192), (2, 384), (18, 768), (2, 1536)),
    'swin-b': icon((2, 128), (2, 256), (18, 512), (2, 1024)),
    'swin-t': icon((2, 96), (2, 192), (6, 384), (2, 768)),
    'vit-b16': icon((9, 768)),
}


@pytest.mark.parametrize('name', SHARES)
def test_shares(name):
    """Of the models of full size, whose parameters have no values here."""
    kind, cfg = KINDS[name.partition('_')[0]], recipe(name)
    tower_models.need_transformers(kind)
    model = tower_models.without_values(cfg, tower_models.MODELS[kind].reads_text)
    method, paths = choose(model, methods=cfg.custom_hooks[0].methods)
    found = {
        path: sum(
            shape.numel() for shape in adapter_shapes(model, method.of(path), Selection(backbones=(path,))).values()
        )
        for path in paths
    }
    backbone = tower_models.MODELS[kind].backbone
    assert found == {backbone: BACKBONES[name.split('_')[1]], **SHARES[name]}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes'))


def narrow(cfg):
    """The same detector with 32 channels, or the 256 that Grounding DINO is written for, and two layers."""
    model = cfg.model
    width = 32 if model.type == 'DINO' else 256
    model.backbone.update(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
    model.backbone.update(init_cfg=None, drop_path_rate=0.0, pretrain_img_size=64)
    model.neck.update(in_channels=[8, 16, 32, 64][-len(model.neck.in_channels) :], out_channels=width)
    model.neck.norm_cfg.num_groups = 8
    attention, ffn = dict(embed_dims=width, num_heads=4), dict(embed_dims=width, feedforward_channels=48)
    for part in (model.encoder, model.decoder):
        part.num_layers = 2
        for key, layer in part.items():
            if key.endswith('layer_cfg') and key != 'fusion_layer_cfg':
                for name in layer:
                    layer[name].update(ffn if name == 'ffn_cfg' else attention)
    if 'fusion_layer_cfg' in model.encoder:
        model.encoder.fusion_layer_cfg.update(v_dim=width, l_dim=width, embed_dim=32, num_heads=2)
    model.positional_encoding.num_feats = width // 2
    model.num_queries = 10
    model.dn_cfg.group_cfg.num_dn_queries = 10
    model.bbox_head.update(embed_dims=width)
    if model.type == 'DINO':
        model.bbox_head.num_classes = len(SHAPES)
    model.test_cfg.max_per_img = 10


def narrow_glip(cfg):
    """The same detector with a narrow Swin and one fusion layer."""
    model = cfg.model
    model.backbone.update(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, drop_path_rate=0.0)
    model.neck.in_channels = [16, 32, 64]
    model.bbox_head.num_dyhead_blocks = 1
    model.test_cfg.update(nms_pre=50, max_per_img=10, score_thr=0.0)
    cfg.train_dataloader.dataset = cfg.train_dataloader.dataset.dataset  # which it repeats


def narrow_masks(cfg):
    """The same Mask2Former with a narrow Swin, 32 channels and one layer each."""
    model = cfg.model
    model.backbone.update(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, init_cfg=None)
    model.backbone.update(drop_path_rate=0.0, pretrain_img_size=64)
    if 'panoptic_head' in model:
        narrow_mask2former(model.panoptic_head)
        classes = dict(num_things_classes=len(SHAPES))
        model.panoptic_head.update(**classes, loss_cls=dict(class_weight=[1.0] * len(SHAPES) + [0.1]))
        model.panoptic_fusion_head.update(classes)
        model.data_preprocessor.batch_augments[0].size = (204, 204)
        model.train_cfg.num_points = 128
        model.test_cfg.max_per_image = 20
    else:
        narrow_mask2former(model.decode_head)
        model.decode_head.train_cfg.num_points = 128


def narrow_san(cfg, folder):
    """The same SAN with narrow encoders, on scenes, whose classes it reads; CLIP's weights are random ones."""
    small = small_segmentors.san()
    model = cfg.model
    for part in ('image_encoder', 'text_encoder'):
        cfg.model[part].update({key: value for key, value in small[part].items() if key not in ('templates',)})
    model.text_encoder.update(dataset_name='ade20k', vocabulary=None, templates=['a {}.'])
    head = small['decode_head']
    model.decode_head.san_cfg.update(head['san_cfg'])
    model.decode_head.maskgen_cfg.update(head['maskgen_cfg'])
    model.decode_head.update(num_classes=150, deep_supervision_idxs=[1])
    model.decode_head.train_cfg.num_points = 64
    model.decode_head.loss_decode[0].class_weight = [1.0] * 150 + [0.1]
    model.pretrained = None
    clip = MODELS.build(copy.deepcopy(model))
    random = torch.Generator().manual_seed(0)
    state = {n: torch.randn(v.shape, generator=random) * 0.1 for n, v in clip.state_dict().items()}
    torch.save({n: v for n, v in state.items() if 'side_adapter' not in n}, folder / 'clip.pth')
    model.pretrained = str(folder / 'clip.pth')
    cfg.optim_wrapper.type = 'OptimWrapper'  # mixed precision of 16 bits needs a GPU
    cfg.optim_wrapper.pop('loss_scale')
    ade20k = dict(img_path='images/training', seg_map_path='annotations/training')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        split = 'training' if loader is cfg.train_dataloader else 'validation'
        loader.dataset.update(type='ADE20KDataset', reduce_zero_label=True)
        loader.dataset.data_prefix = {key: value.replace('training', split) for key, value in ade20k.items()}
        for step in loader.dataset.pipeline:
            if step['type'] == 'LoadAnnotations':
                step['reduce_zero_label'] = True
    model.data_preprocessor.size_divisor = 32
    cfg.data_preprocessor.size_divisor = 32
    cfg.train_cfg.pop('val_begin')


def write_base(cfg, path):
    """Write random weights of the unadapted model; return the model."""
    model = MODELS.build(copy.deepcopy(cfg.model))
    torch.manual_seed(0)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), path)
    return model


def run(cfg, **changes):
    cfg = copy.deepcopy(cfg)
    cfg.update(**changes, experiment_name=uuid.uuid4().hex, visualizer=None)
    return Runner.from_cfg(cfg)


@pytest.fixture(scope='module')
def base(data, tmp_path_factory):
    """A detector that was not adapted, as pre-trained weights."""
    cfg = recipe(DINO)
    narrow(cfg)
    path = tmp_path_factory.mktemp('base') / 'base.pth'
    model = MODELS.build(cfg.model)
    torch.manual_seed(0)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.mark.filterwarnings('ignore')
def test_dino_trains_resumes_and_tests(data, base, tmp_path):
    cfg = recipe(DINO)
    narrow(cfg)
    cfg = two_iterations(cfg, data, tmp_path)
    runner = run(cfg, load_from=str(base))
    runner.train()
    summary = summarize(runner.model)
    assert {path: tower.method for path, tower in summary.towers.items()} == dict(
        backbone='icon', encoder='lora', decoder='lora'
    )
    before, after = torch.load(base, weights_only=True)['state_dict'], runner.model.state_dict()
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert {n for n in moved if n.startswith(('backbone.', 'encoder.', 'decoder.'))} <= set(filter(is_adapter, moved))
    for place in ('backbone.', 'encoder.', 'decoder.', 'bbox_head.', 'neck.'):
        assert any(n.startswith(place) for n in moved)
    content, _ = read_adapter(tmp_path / 'adapter.safetensors')
    assert content['backbones'] == ['backbone', 'encoder', 'decoder']

    cfg.train_cfg.max_iters = 3
    resumed = run(cfg, load_from=f'{tmp_path}/iter_2.pth', resume=True)
    resumed.train()
    assert resumed.iter == 3
    results = run(cfg, load_from=f'{tmp_path}/iter_3.pth').test()
    assert np.isfinite(results['coco/bbox_mAP'])


@pytest.mark.filterwarnings('ignore')
def test_a_resumed_run_ends_as_the_uninterrupted_one(data, base, tmp_path):
    """To the last bit: adapters in three towers, neck, head, and the state of the optimizer."""

    def train(folder, last, **changes):
        cfg = recipe(DINO)
        narrow(cfg)
        cfg = two_iterations(cfg, data, tmp_path / folder)
        cfg.train_cfg.update(max_iters=last, val_interval=100)
        cfg.load_from = None
        cfg.default_hooks.checkpoint = dict(type='AdapterCheckpointHook', interval=2, by_epoch=False, base=str(base))
        runner = run(cfg, **changes)
        runner.train()
        assert runner.iter == last
        return runner

    whole = train('whole', 4, load_from=str(base))
    train('cut', 2, load_from=str(base))
    resumed = train('cut', 4, resume=True)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(v, found[n]) for n, v in expected.items())
    states = [runner.optim_wrapper.state_dict()['state'] for runner in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][part]))
        for key, parts in states[0].items()
        for part, value in parts.items()
    )
    start = torch.load(base, weights_only=True)['state_dict']
    assert any(n not in start and v.any() for n, v in found.items() if n.startswith('decoder.'))


@pytest.mark.filterwarnings('ignore')
def test_a_frozen_head_for_new_classes_is_refused(data, base, tmp_path):
    cfg = recipe(DINO)
    narrow(cfg)
    cfg.custom_hooks[0]['freeze'] = ['bbox_head', 'neck']
    cfg = two_iterations(cfg, data, tmp_path)
    state = torch.load(base, weights_only=True)['state_dict']
    other = {n: torch.cat((v, v[:1])) if 'cls_branches' in n else v for n, v in state.items()}  # of one more class
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    with pytest.raises(WeightsError, match='A head for other classes must be trained: take it out of `freeze`'):
        run(cfg, load_from=str(tmp_path / 'other.pth')).train()


def test_inspection_names_the_towers(data):
    cfg = recipe(DINO)
    narrow(cfg)
    inspection = inspect_model(cfg, (64, 64))
    text = str(inspection.summary)
    assert 'backbone: icon, ' in text and 'encoder: lora, ' in text and 'decoder: lora, ' in text
    assert any(name.startswith('decoder.layers.0.cross_attn') for name, *_ in inspection.sites)
    assert inspection.cost.gflop > 0 and inspection.cost.gradient_mib > 0


@pytest.fixture
def fusion():
    with narrow_fusion():
        yield


@pytest.mark.parametrize('name', [n for n in RECIPES if n.startswith(('grounding', 'glip'))])
@pytest.mark.filterwarnings('ignore')
def test_detectors_that_read_text_train_and_test(name, data, fusion, tmp_path):
    tower_models.need_transformers(KINDS[name.partition('_')[0]])
    repair_grounding_dino()
    cfg = recipe(name)
    cfg.model.language_model.name = write_bert(tmp_path / 'bert')
    if name.startswith('glip'):
        narrow_glip(cfg)
        cfg.model.bbox_head.lang_model_name = cfg.model.language_model.name
    else:
        narrow(cfg)
    cfg = two_iterations(cfg, data, tmp_path / 'run')
    write_base(cfg, tmp_path / 'base.pth')
    runner = run(cfg, load_from=str(tmp_path / 'base.pth'))
    runner.train()
    if 'full' not in name:
        trained = {n for n, p in runner.model.named_parameters() if p.requires_grad}
        assert trained and all(map(is_adapter, trained))
        assert len(summarize(runner.model).towers) == (3 if name.startswith('glip') else 4)
    results = run(cfg, load_from=f'{tmp_path}/run/iter_2.pth').test()
    assert np.isfinite(results['coco/bbox_mAP'])


@pytest.mark.parametrize('name', [n for n in RECIPES if n.startswith(('mask2former', 'san'))])
@pytest.mark.filterwarnings('ignore')
def test_segmentation_trains_and_tests(name, data, tmp_path):
    cfg = recipe(name)
    if name.startswith('san'):
        narrow_san(cfg, tmp_path)
    else:
        narrow_masks(cfg)
    cfg = two_iterations(cfg, data, tmp_path / 'run')
    model = write_base(cfg, tmp_path / 'base.pth')
    runner = run(cfg, load_from=str(tmp_path / 'base.pth'))
    runner.train()
    before, after = model.state_dict(), runner.model.state_dict()
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    if 'full' not in name:
        towers = summarize(runner.model).towers
        assert [tower.method for tower in towers.values()] == ['icon', 'lora', 'lora']
        for path in towers:
            inside = {n for n in moved if n.startswith(f'{path}.')}
            assert inside and all(map(is_adapter, inside))
        beside = {n for n in moved if not n.startswith(tuple(f'{path}.' for path in towers))}
        assert bool(beside) != name.startswith('san')  # the head of Mask2Former is trained
    results = run(cfg, load_from=f'{tmp_path}/run/iter_2.pth').test()
    assert np.isfinite(results['coco/segm_mAP' if name.endswith('coco') else 'mIoU'])
