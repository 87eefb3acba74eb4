"""What a whole training costs: an estimate of GPU hours and memory, heads included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .plan import GIB, RESERVED_GIB

# Peak of an A100 in TFLOP/s by its data sheet: bfloat16 or float16 on tensor cores, and float32.
A100_HALF, A100_FLOAT = 312.0, 19.5
UTILISATION = 0.35  # of the peak; assumed (ours)
ROIS, MASK_ROIS = 512, 128  # sampled regions of an image in MMDetection's two-stage detectors, and the positive ones


@dataclass(frozen=True)
class TrainingCost:
    """What a training needs. All but the parameters are estimates.

    Attributes:
        trained: Trained parameters of the whole model.
        gflop: Billions of floating-point operations of an image's forward pass, with neck and heads.
        memory_gib: Memory on each GPU (GiB).
        gpu_hours: Hours of one GPU.
    """

    trained: int
    gflop: float
    memory_gib: float
    gpu_hours: float


def training_cost(
    model: nn.Module, shape: tuple[int, int], images: int, batch: int, half: bool, frozen: bool = False
) -> TrainingCost:
    """Estimate the cost of a training on A100 GPUs.

    Forward passes are counted on the CPU on two images. A backward pass is taken to cost twice a forward pass where
    all is trained, and as much as one where weights are frozen, since their gradients are left out (ours).

    Args:
        model: The model, adapted or not.
        shape: Height and width of a training image in pixels.
        images: Images of the whole training, each time counted.
        batch: Images on one GPU.
        half: Whether it trains in mixed precision.
        frozen: Whether nothing of the backbone is trained, so that it has no backward pass. Defaults to False.
    """
    model = revert_sync_batchnorm(model)
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, int] = {}
    held = []  # so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            stored[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    pictures = torch.zeros(2, 3, *shape)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _forward(model, pictures)
    gflop = counter.get_total_flops() / 2e9
    trained = [p for p in model.parameters() if p.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    backward = 0.0 if frozen else 1.0
    factor = 1 + min(2.0, backward + share)
    peak = A100_HALF if half else A100_FLOAT
    hours = images * gflop * factor / (1e3 * peak * UTILISATION) / 3600
    each = sum(stored.values()) / 2 * (0.5 if half else 1.0)
    weights = sum(p.nbytes for p in model.parameters()) + 4 * sum(p.nbytes for p in trained)
    return TrainingCost(sum(p.numel() for p in trained), gflop, (weights + batch * each) / GIB + RESERVED_GIB, hours)


def _forward(model: Any, pictures: Tensor) -> None:
    """A forward pass with all heads; those of a two-stage detector see as many regions as in training."""
    if not hasattr(model, 'roi_head'):
        model(pictures, mode='tensor')
        return
    features = model.extract_feat(pictures)
    model.rpn_head(features)
    head = model.roi_head
    for part, number in ((head.bbox_head, ROIS), (head.mask_head, MASK_ROIS)):
        extractor = head.bbox_roi_extractor if part is head.bbox_head else head.mask_roi_extractor
        for index, each in enumerate(part if isinstance(part, nn.ModuleList) else [part]):
            pool: Any = extractor[index] if isinstance(extractor, nn.ModuleList) else extractor
            size = pool.roi_layers[0].output_size
            each(torch.zeros(len(pictures) * number, pool.out_channels, *size))
