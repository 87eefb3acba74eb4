"""Models with several towers: a small one of each kind for tests, and the config of the library's own."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_detectors
import small_segmentors
import torch
from torch import Tensor, nn

from iconformer_mm.checkpoint import empty_parameters
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import check_text_encoder
from iconformer_mm.tuning.freezing import is_adapter

LAYERS = ('encoder', 'decoder')
MASK_LAYERS = ('panoptic_head.pixel_decoder', 'panoptic_head.transformer_decoder')
CLASSES = ('circle', 'square', 'small triangle')


@dataclass(frozen=True)
class TowerModel:
    """A model of which more than the backbone is adapted.

    Attributes:
        config: Returns the config of a small one.
        towers: Paths of its Transformers beyond the backbone.
        stock: The library's config of a whole one.
        backbone: Path of the backbone.
        stock_backbone: Whether the whole one has a Transformer as its backbone.
        masks: Whether it is trained on masks of instances.
        reads_text: Whether it needs transformers.
        library: The module that builds and runs it.
        only_towers: Whether it has no parameters beside the towers.
    """

    config: Callable[[], dict[str, Any]]
    towers: tuple[str, ...]
    stock: str
    backbone: str = 'backbone'
    stock_backbone: bool = True
    masks: bool = False
    reads_text: bool = False
    library: Any = small_detectors
    only_towers: bool = False

    @property
    def all_towers(self) -> list[str]:
        """The backbone and the other towers."""
        return [self.backbone, *self.towers]

    @property
    def freeze(self) -> list[str]:
        """What freezes all beside the towers."""
        return [] if self.only_towers else ['*']


@functools.lru_cache
def _bert() -> str:
    from small_bert import write_bert

    return write_bert(Path(tempfile.mkdtemp(prefix='bert-')))


MODELS = {
    'DETR': TowerModel(
        lambda: small_detectors.DETR, LAYERS, 'mmdet::detr/detr_r50_8xb2-150e_coco.py', stock_backbone=False
    ),
    'Conditional DETR': TowerModel(
        lambda: small_detectors.CONDITIONAL_DETR,
        LAYERS,
        'mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
        stock_backbone=False,
    ),
    'DAB-DETR': TowerModel(
        lambda: small_detectors.DAB_DETR, LAYERS, 'mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py', stock_backbone=False
    ),
    'Deformable DETR': TowerModel(
        lambda: small_detectors.DEFORMABLE_DETR,
        LAYERS,
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        stock_backbone=False,
    ),
    'DINO': TowerModel(lambda: small_detectors.DINO, LAYERS, 'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'),
    'DDQ': TowerModel(lambda: small_detectors.DDQ, LAYERS, 'mmdet::ddq/ddq-detr-4scale_swinl_8xb2-30e_coco.py'),
    'MaskFormer': TowerModel(
        lambda: small_detectors.MASKFORMER,
        MASK_LAYERS,
        'mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
        stock_backbone=False,
        masks=True,
    ),
    'Mask2Former': TowerModel(
        lambda: small_detectors.MASK2FORMER,
        MASK_LAYERS,
        'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py',
        masks=True,
    ),
    'Mask2Former of MMSegmentation': TowerModel(
        lambda: small_segmentors.MASK2FORMER,
        ('decode_head.pixel_decoder', 'decode_head.transformer_decoder'),
        'mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
        library=small_segmentors,
    ),
    'Segmenter': TowerModel(
        lambda: small_segmentors.SEGMENTER,
        ('decode_head',),
        'mmseg::segmenter/segmenter_vit-b_mask_8xb1-160k_ade20k-512x512.py',
        library=small_segmentors,
        only_towers=True,
    ),
    'SAN': TowerModel(
        small_segmentors.san,
        ('decode_head.side_adapter_network', 'decode_head.rec_with_attnbias'),
        'mmseg::san/san-vit-b16_coco-stuff164k-640x640.py',
        backbone='image_encoder',
        library=small_segmentors,
    ),
    'Grounding DINO': TowerModel(
        lambda: small_detectors.grounding_dino(_bert()),
        ('language_model', *LAYERS),
        'mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
        reads_text=True,
    ),
    'GLIP': TowerModel(
        lambda: small_detectors.glip(_bert()),
        ('language_model', 'bbox_head.head.dyhead_tower'),
        'mmdet::glip/glip_atss_swin-t_fpn_dyhead_16xb2_ms-2x_funtune_coco.py',
        reads_text=True,
    ),
}


def need_transformers(name: str) -> None:
    """Skip a test of a model that reads text, if MMDetection cannot build it with the transformers that there is."""
    try:
        check_text_encoder(dict(type=name.replace(' ', '')))
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))


@functools.lru_cache
def data(name: str) -> dict[str, Any]:
    """A batch for a model."""
    model = MODELS[name]
    if model.library is small_segmentors:
        return small_segmentors.batch()
    return small_detectors.batch(masks=model.masks, text=CLASSES if model.reads_text else None)


@functools.lru_cache
def _built(name: str) -> nn.Module:
    model = MODELS[name].library.build(MODELS[name].config())
    predict(name, model)  # the first call of some kernels rounds otherwise
    return model


def build(name: str) -> nn.Module:
    """A small model with random weights, in evaluation mode."""
    return copy.deepcopy(_built(name))


def predict(name: str, model: nn.Module, batch: dict[str, Any] | None = None) -> list[Tensor]:
    """All predictions for a batch."""
    return MODELS[name].library.predict(model, data(name) if batch is None else batch)


def losses(name: str, model: nn.Module) -> Tensor:
    """The sum of the losses."""
    return MODELS[name].library.losses(model, data(name))


def train(name: str, model: nn.Module, steps: int = 2, rate: float = 0.05) -> set[str]:
    """A few steps; returns the names of trained parameters.

    Raises:
        AssertionError: One got no gradient.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(name, model).backward()
        without = [n for n, p in trained.items() if p.grad is None]
        assert without == []  # distributed training would wait for them
        optimizer.step()
    return set(trained)


def wake(model: nn.Module, seed: int = 1) -> None:
    """Change the trained adapters, so that they have an effect."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether predictions are the same to the last bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def stock(name: str) -> nn.Module:
    """The library's own model of full size, without values in its parameters."""
    return without_values(load_config(MODELS[name].stock), MODELS[name].reads_text)


def without_values(cfg: Any, reads_text: bool) -> nn.Module:
    """The model of a config of full size, without values in its parameters."""
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmseg':
        import mmdet.models  # noqa: F401
    cfg.model.pop('pretrained', None)
    text = _empty_bert(_bert()) if reads_text else contextlib.nullcontext()
    with empty_parameters(), text as bert:
        if bert is not None:
            cfg.model.language_model.name = bert
            if 'encoder' in cfg.model:
                cfg.model.encoder.num_cp = 0  # checkpointing needs fairscale
            if 'lang_model_name' in cfg.model.bbox_head:
                cfg.model.bbox_head.lang_model_name = bert
        return REGISTRY.build(cfg.model)


@contextlib.contextmanager
def _empty_bert(folder: str) -> Iterator[str]:
    """Let BERT be built from a config of BERT-base and a small vocabulary, without weights."""
    from mmdet.models.language_models import bert
    from transformers import BertConfig, BertModel

    small_detectors.repair_grounding_dino()
    with tempfile.TemporaryDirectory() as written:
        shutil.copytree(folder, written, ignore=shutil.ignore_patterns('*.safetensors'), dirs_exist_ok=True)
        BertConfig().save_pretrained(written)

        class FromConfig:
            @staticmethod
            def from_pretrained(name: str, add_pooling_layer: bool, config: Any) -> nn.Module:
                return BertModel(config, add_pooling_layer=add_pooling_layer)

        original, bert.HFBertModel = bert.HFBertModel, FromConfig
        try:
            yield written
        finally:
            bert.HFBertModel = original
