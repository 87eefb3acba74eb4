"""Where an adapted backbone looks: Grad-CAM and attention of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iconformer_mm.adapters import TokenGrid
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.inference.predictions import kind_of
from iconformer_mm.tuning.families import FromPatchEmbed
from iconformer_mm.tuning.grids import GridTracker, PatchEmbedTap, grid_of_call
from iconformer_mm.tuning.injection import find_backbone
from iconformer_mm.tuning.sites import Site, find_sites, no_site_error

from .kernel_probe import whole_images


def find_block(model: nn.Module, name: str | None = None) -> Site:
    """Find a block of a model by its name in the backbone. Without a name, take the last one.

    Raises:
        ValueError: The backbone has no such block, or no known block at all.
    """
    backbone = find_backbone(model)
    sites = {site.name: site for site in find_sites(backbone)}
    if not sites:
        raise no_site_error(backbone)
    if name is not None and name not in sites:
        raise ValueError(f"there is no block '{name}' in the backbone; there are: {', '.join(sites)}")
    return sites[name or list(sites)[-1]]


def model_score(inferencer: AdapterInferencer, data: dict) -> Tensor:
    """Reduce the prediction for an image to one differentiable number.

    - Classification: the largest logit.
    - Semantic segmentation: the mean logit of the predicted classes.
    - Depth: the sum of the map, in metres.
    - Detection: the sum of the ten largest scores; 0 if nothing is detected.

    Args:
        inferencer: The model.
        data: A preprocessed batch of one image.

    Raises:
        ValueError: The prediction is of another kind.
    """
    model = inferencer.model
    if inferencer.scope == 'mmpretrain':
        return model(**data, mode='tensor').max()
    (prediction,) = model(**data, mode='predict')
    return kind_of(prediction).score(prediction)


def grad_cam(inferencer: AdapterInferencer, image: Any, block: str | None = None) -> np.ndarray | None:
    """Compute Grad-CAM (Selvaraju et al., ICCV 2017) of the tokens that a block reads.

    The map is ``relu(sum_c w_c x_c)``, where ``w_c`` is the mean over the patch tokens of the gradient of
    :func:`model_score`. It uses the input of the block, not the output: after the last block of a ViT, only the class
    token is read.

    Args:
        inferencer: The model with its active adapter. It is not changed.
        image: Path, or image (H, W, 3), uint8, BGR.
        block: Name of the block in the backbone. Defaults to None: the last one.

    Returns:
        Map (H, W) on the block's token grid, divided by its largest value unless that is 0. None if the score does
        not depend on the block, for example if nothing is detected.

    Raises:
        ValueError: The block does not exist, or the image cannot be read.
    """
    model = inferencer.model
    model.eval()
    leaf: list[Tensor] = []
    (data,) = inferencer.batches([image])
    with _at_block(find_block(model, block)) as seen, torch.enable_grad(), whole_images(model):

        def cut(module: nn.Module, args: tuple) -> tuple:
            leaf[:] = [args[0].detach().requires_grad_()]
            return (leaf[0], *args[1:])

        handle = seen.site.block.register_forward_pre_hook(cut)
        try:
            score = model_score(inferencer, model.data_preprocessor(data, False))
        finally:
            handle.remove()
        if not score.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(score, leaf[0], allow_unused=True)
    if gradient is None or not gradient.any():
        return None
    values, gradient = (seen.patch_tokens(x) for x in (leaf[0].detach(), gradient))
    cam = (values * gradient.mean(dim=0)).sum(dim=1).relu()
    return seen.as_map(cam)


def attention_map(inferencer: AdapterInferencer, image: Any, block: str | None = None) -> np.ndarray | None:
    """Compute a block's attention to each patch, averaged over its heads.

    It is the attention of the class token (the first prefix token) if there is one, otherwise the mean over all tokens.

    Args:
        inferencer: The model with its active adapter. It is not changed.
        image: Path, or image (H, W, 3), uint8, BGR.
        block: Name of the block in the backbone. Defaults to None: the last one.

    Returns:
        Map (H, W) on the block's token grid, divided by its largest value. None if the attention is not from all
        tokens to all tokens, as in windows or with reduced keys.

    Raises:
        ValueError: The block does not exist, or the image cannot be read.
    """
    with _at_block(find_block(inferencer.model, block)) as seen, whole_images(inferencer.model):
        tap = _AttentionTap()
        handles = [
            seen.site.block.register_forward_pre_hook(lambda module, args: tap.weights.clear()),
            seen.site.block.register_forward_hook(lambda module, args, out: tap.stop()),
        ]
        try:
            with tap:
                inferencer([image])
        finally:
            for handle in handles:
                handle.remove()
    tokens, prefix = seen.grid.num_tokens, seen.grid.num_prefix_tokens
    weights = [w for w in tap.weights if w.dim() == 4 and w.shape[0] == 1 and w.shape[2:] == (tokens, tokens)]
    if not weights:
        return None
    attention = weights[-1][0].float().mean(dim=0)
    return seen.as_map((attention[0] if prefix else attention.mean(dim=0))[prefix:])


class _TracedBlock:
    """A block while a model runs: the grid of its tokens."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.grid = TokenGrid(0, 0)  # until the block is called

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens (H * W, d) of one image, from (1, N, d) or (1, H, W, d)."""
        return tokens.float().flatten(1, -2)[0, self.grid.num_prefix_tokens : self.grid.num_tokens]

    def as_map(self, values: Tensor) -> np.ndarray:
        """Reshape values of patch tokens (H * W) to a map (H, W), scaled to a largest value of 1."""
        values = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
        return values.reshape(self.grid.height, self.grid.width).cpu().numpy()


@contextmanager
def _at_block(site: Site) -> Iterator[_TracedBlock]:
    """Within it the grid of a block's tokens is noted at each call."""
    seen = _TracedBlock(site)
    tracker, tap = None, None
    if site.host is not None and site.patch_embed is not None and isinstance(site.grid, FromPatchEmbed):
        tracker = GridTracker(site.host, site.grid)
        tap = PatchEmbedTap(site.patch_embed, site.grid, tracker)
        tap.replace()

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.grid = grid_of_call(site, args, kwargs, tracker)

    handle = site.block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
        if tap is not None:
            tap.restore()


class _AttentionTap(TorchFunctionMode):
    """Records the weights (B, heads, N, M) of all attention computed while active, in any module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.stopped = False

    def stop(self) -> None:
        """Stop recording."""
        self.stopped = True

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.stopped:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.weights.append(_weights(*args, **kwargs))
        if func is F.multi_head_attention_forward:  # nn.MultiheadAttention may skip the weights
            out, weights = func(*args, **{**kwargs, 'need_weights': True, 'average_attn_weights': False})
            assert weights is not None  # requested by need_weights
            self.weights.append(weights)
            return out, weights.mean(dim=1)
        out = func(*args, **kwargs)
        if func in (torch.softmax, Tensor.softmax, F.softmax):
            self.weights.append(out)
        return out


def _weights(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Compute the weights that ``scaled_dot_product_attention`` applies to the values."""
    scale = options.get('scale') or query.shape[-1] ** -0.5
    scores = query @ key.transpose(-2, -1) * scale
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1)
