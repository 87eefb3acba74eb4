"""The benchmarks' own pipelines, data sets, losses and metrics, fed from scenes, on small models."""

import pytest
import torch
from benchmark_runs import PYRAMID, check_training_and_test, narrow_mask2former, two_iterations, write_scenes
from commands import ranks
from conftest import ROOT

from iconformer_mm.datasets.scenes import SHAPES
from iconformer_mm.engine import add_peft, load_config

SWIN = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes'))


def shrink_model(cfg):
    """The same architecture, narrow."""
    model = cfg.model
    backbone = model.backbone
    backbone.pop('init_cfg', None)
    model.pop('pretrained', None)
    kind = backbone.type
    if kind == 'SwinTransformer':
        backbone.update(SWIN)
    elif kind == 'mmpretrain.SwinTransformerV2':
        backbone.update(arch={**SWIN, 'extra_norm_every_n_blocks': 0}, window_size=[5, 5, 5, 5])
    elif kind == 'MixVisionTransformer':
        backbone.update(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
        model.decode_head.update(in_channels=[8, 16, 32, 64], channels=16)
    else:  # BEiT, MAE
        backbone.update(embed_dims=32, num_layers=4, num_heads=2, mlp_ratio=2, out_indices=[0, 1, 2, 3])
        model.neck.embed_dim = 32
        model.decode_head.update(in_channels=[32] * 4, channels=16)
        model.auxiliary_head.update(in_channels=32, channels=16)
    if kind == 'SwinTransformer' and model.type == 'EncoderDecoder':
        model.decode_head.update(in_channels=PYRAMID, channels=16)
        model.auxiliary_head.update(in_channels=PYRAMID[2], channels=16)
    if model.type == 'DepthEstimator':
        model.decode_head.in_channels = PYRAMID[3]
    if 'neck' in model and model.neck.type == 'FPN':
        narrow = dict(in_channels=32, num_classes=len(SHAPES))
        model.neck.update(in_channels=PYRAMID, out_channels=32)
        model.rpn_head.update(in_channels=32, feat_channels=32)
        model.roi_head.bbox_roi_extractor.out_channels = model.roi_head.mask_roi_extractor.out_channels = 32
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.update(narrow, fc_out_channels=32)
        model.roi_head.mask_head.update(narrow, conv_out_channels=32)
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)  # untrained scores are low


CASES = [
    ('coco/mask-rcnn_swin-t_fpn_icon_1x_coco.py', 'coco/segm_mAP'),
    ('coco/mask-rcnn_swin-b-in22k_fpn_adaptformer_ms-crop-3x_coco.py', 'coco/segm_mAP'),
    ('coco/cascade-mask-rcnn_swin-b-in22k_fpn_icon_ms-crop-3x_coco.py', 'coco/segm_mAP'),
    ('coco/cascade-mask-rcnn_swin-t_fpn_frozen_1x_coco.py', 'coco/segm_mAP'),
    ('ade20k/swin-large-in22k_upernet_icon_8xb2-160k_ade20k-512x512.py', 'mIoU'),
    ('ade20k/segformer_mit-b5_icon_8xb2-160k_ade20k-640x640.py', 'mIoU'),
    ('ade20k/beit-base_upernet_adaptformer_8xb2-160k_ade20k-640x640.py', 'mIoU'),
    ('ade20k/mae-base_upernet_icon_8xb2-160k_ade20k-512x512.py', 'mIoU'),
    ('nyu/depth_swin-base_icon_8xb3-25k_nyu.py', 'rmse'),
    ('nyu/depth_swinv2-base_icon_8xb3-25k_nyu.py', 'rmse'),
]


def method_of(name):
    return next(method for method in ('icon', 'adaptformer', 'frozen') if f'_{method}_' in name)


def small_config(name, data, work_dir):
    """A benchmark config, narrowed, for two iterations on scenes."""
    cfg = load_config(str(ROOT / 'configs' / name))
    shrink_model(cfg)
    return two_iterations(cfg, data, work_dir)


@pytest.mark.parametrize(('name', 'metric'), CASES, ids=[name for name, _ in CASES])
@pytest.mark.filterwarnings('ignore')
def test_trains_two_iterations_and_tests(name, metric, data, tmp_path):
    cfg = small_config(name, data, tmp_path)
    check_training_and_test(cfg, method_of(name), metric)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
@pytest.mark.filterwarnings('ignore')
def test_stock_mask2former_adapts_by_the_flag(library, data, tmp_path):
    """MMDetection's and MMSegmentation's own Swin Mask2Former configs, with the hook alone."""
    name = {'mmdet': 'mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco', 'mmseg': 'mask2former_swin-t_8xb2-160k_ade20k'}
    cfg = load_config(f'{library}::mask2former/{name[library]}{"" if library == "mmdet" else "-512x512"}')
    add_peft(cfg, 'icon')
    cfg.model.backbone.pop('init_cfg')
    cfg.model.backbone.update(SWIN)
    if library == 'mmdet':
        narrow_mask2former(cfg.model.panoptic_head)
        classes = dict(num_things_classes=len(SHAPES))
        cfg.model.panoptic_head.update(**classes, loss_cls=dict(class_weight=[1.0] * len(SHAPES) + [0.1]))
        cfg.model.panoptic_fusion_head.update(classes)
        cfg.model.data_preprocessor.batch_augments[0].size = (204, 204)
        cfg.model.train_cfg.num_points = 128
        cfg.model.test_cfg.max_per_image = 20
    else:
        narrow_mask2former(cfg.model.decode_head)
        cfg.model.decode_head.train_cfg.num_points = 128
    cfg = two_iterations(cfg, data, tmp_path)
    check_training_and_test(cfg, 'icon', 'coco/segm_mAP' if library == 'mmdet' else 'mIoU')


@pytest.mark.filterwarnings('ignore')
def test_vitdet_adapts_by_the_flag(data, tmp_path):
    """A plain ViT with windowed and global attention under Mask R-CNN, in the manner of ViTDet."""
    cfg = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    add_peft(cfg, 'icon')
    cfg.model.backbone = dict(
        type='mmpretrain.ViTSAM',
        arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64, global_attn_indexes=[1, 3]),
        img_size=192,
        patch_size=16,
        out_channels=32,
        out_indices=-1,
        use_abs_pos=True,
        use_rel_pos=True,
        window_size=5,  # does not divide the map
    )
    cfg.model.neck = dict(type='FPN', in_channels=[32], out_channels=256, num_outs=5)
    heads = cfg.model.roi_head
    cfg.model.rpn_head.anchor_generator.strides = [16, 32, 64, 128, 256]
    heads.bbox_roi_extractor.featmap_strides = heads.mask_roi_extractor.featmap_strides = [16, 32, 64, 128]
    heads.bbox_head.update(fc_out_channels=32, num_classes=len(SHAPES))
    heads.mask_head.update(conv_out_channels=32, num_classes=len(SHAPES))
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg = two_iterations(cfg, data, tmp_path)
    check_training_and_test(cfg, 'icon', 'coco/segm_mAP')


@pytest.mark.parametrize('name', [CASES[0][0], CASES[4][0]])
def test_two_processes_with_gradient_checkpointing(name, data, tmp_path):
    """Training over two processes: one checkpoint, adapters trained, frozen weights equal to those of another run."""
    states = []
    for run in ('first', 'second'):
        cfg = small_config(name, data, tmp_path / run)
        cfg.model.backbone.with_cp = True
        cfg.optim_wrapper.optimizer.lr = 1e-3 if run == 'first' else 1e-2
        cfg.dump(tmp_path / f'{run}.py')
        ranks('train.py', tmp_path / f'{run}.py')
        states.append(torch.load(tmp_path / run / 'iter_2.pth', map_location='cpu', weights_only=False)['state_dict'])
    for key, value in states[0].items():
        if key.startswith('backbone.') and 'adapter' not in key:
            assert torch.equal(value, states[1][key]), key  # the same seed, however much was trained
        elif key.endswith('adapter_attention.up.weight'):
            assert not torch.equal(value, states[1][key]), key
