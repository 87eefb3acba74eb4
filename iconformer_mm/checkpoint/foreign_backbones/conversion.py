"""From a file of another program to the names of a target."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..onnx_reading import read_onnx
from ..reading import read_checkpoint, state_dict_of
from .openmmlab import mm_beit, mm_swin, mmpretrain_sam, mmpretrain_vit, mmseg_mit, mmseg_vit
from .pieces import Pieces
from .recognition import ForeignBackboneError, Recognised, State, recognise
from .timm import timm_swin, timm_vit

TARGETS = ('mmpretrain', 'mmseg', 'mmdet', 'timm')


@dataclass(frozen=True)
class ConvertedBackbone:
    """A backbone in the names of a target.

    Attributes:
        family: What it is.
        source: Whose names the file had.
        config: Config of the class that it fits, key for key.
        tensors: Its tensors by the names of that class.
        left: Tensors of the file that are not used, with the reason.
        notes: What the user should know of the result.
    """

    family: str
    source: str
    config: dict[str, Any]
    tensors: State
    left: dict[str, str]
    notes: list[str]


_VIT_ALSO: dict[str, Callable[[Pieces], dict[str, Any]]] = dict(
    mmpretrain=mmpretrain_vit, mmseg=mmseg_vit, timm=timm_vit
)
_WRITERS: dict[str, dict[str, Callable[[Pieces], dict[str, Any]]]] = {
    'DINOv2': _VIT_ALSO,
    'MAE': _VIT_ALSO,
    'ViT': _VIT_ALSO,
    'DINOv3': dict(timm=timm_vit),
    'EVA-02': dict(timm=timm_vit),
    'BEiT': dict(mmpretrain=mm_beit('mmpretrain'), mmseg=mm_beit('mmseg'), timm=timm_vit),
    'SAM': dict(mmpretrain=mmpretrain_sam, timm=timm_vit),
    'CLIP': dict(mmpretrain=mmpretrain_vit, timm=timm_vit),
    'SigLIP': dict(mmpretrain=mmpretrain_vit, timm=timm_vit),
    'Swin': dict(mmpretrain=mm_swin('mmpretrain'), mmseg=mm_swin('mmseg'), mmdet=mm_swin('mmdet'), timm=timm_swin),
    'SwinV2': dict(mmpretrain=mm_swin('mmpretrain'), timm=timm_swin),
    'MiT': dict(mmseg=mmseg_mit),
}
# Classes that bear the name, and compute something else.
_OTHERWISE = {
    ('EVA-02', 'mmpretrain'): "ViTEVA02 has other angles of the rotary positions (mmpretrain 1.2 and onedl's 1.3.6)",
}
# What a target may have no place for without computing something else: what follows the encoder.
_BEHIND = {
    'pool': 'attention pooling',
    'hf_pool': 'attention pooling',
    'fc_norm': 'norm of the pooled tokens',
    'neck': 'neck',
}


def read_backbone(path: str | os.PathLike, trust: bool = False) -> State:
    """The tensors of a file of another program: safetensors, a checkpoint of torch, or ONNX. Nothing in it is executed.

    Args:
        path: The file.
        trust: Whether to unpickle a checkpoint that holds more than tensors and plain data. Defaults to False.

    Raises:
        DamagedFileError: It is truncated or no such file.
        UntrustedFileError: It holds more, and is not trusted.
        FileNotFoundError: There is none.
    """
    if os.fspath(path).endswith('.onnx'):
        return read_onnx(path)
    content = read_checkpoint(path, trust, advice='add --trust')
    for key in ('state_dict', 'model', 'teacher', 'model_ema', 'module'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return state_dict_of(content, path)


def convert_backbone(state: Mapping[str, Tensor], target: str) -> ConvertedBackbone:
    """Bring a backbone of another program to the names of a target.

    Args:
        state: Tensors of the file by name.
        target: ``'mmpretrain'``, ``'mmseg'``, ``'mmdet'`` or ``'timm'``.

    Returns:
        The tensors, the config of the class that they fit, and what of the file is not used.

    Raises:
        ForeignBackboneError: The backbone is not known, is a variant that the target does not compute, or the target
            has no class for it.
    """
    if target not in TARGETS:
        raise ForeignBackboneError(f"the target must be one of {', '.join(TARGETS)}, got '{target}'")
    found = recognise(state)
    writers = _WRITERS[found.family]
    if target not in writers:
        others = ' or '.join(f'--to {name}' for name in writers)
        why = _OTHERWISE.get((found.family, target))
        raise ForeignBackboneError(
            f'{target} has no class for {found.family}{f": its {why}" if why else ""}; convert it {others}. The other '
            "libraries take that backbone, too: by its scope, as in type='mmpretrain.VisionTransformer', or as "
            "type='TIMMFeatures'"
        )
    pieces = Pieces(found)
    config = writers[target](pieces)
    left = dict(found.left)
    for name in pieces.rest:
        what = _BEHIND.get(name.partition('.')[0])
        if what is None:
            raise ForeignBackboneError(
                f'this {found.family} has {name}, which {config["type"]} has no place for: it would compute '
                'something else'
            )
        left[f'{name} (common name)'] = f'{what}, which {config["type"]} has not'
    tensors = {n: v.detach().clone().contiguous() for n, v in pieces.out.items()}
    return ConvertedBackbone(found.family, found.source, config, tensors, left, _notes(found, config))


def _notes(found: Recognised, config: dict[str, Any]) -> list[str]:
    notes = []
    if found.family == 'SwinV2':
        notes.append('the window size is in no tensor: set window_size (and img_size) to those of the pre-training')
    if config['type'] == 'mmseg.VisionTransformer' and found.family == 'DINOv2':
        notes.append('layer scale is folded into the output maps of attention and FFN, since the class has none')
    if found.family not in ('SAM', 'BEiT', 'Swin', 'SwinV2'):
        notes.append(
            'the number of heads is in no tensor: it is that of the published model of this width, else the width / 64'
        )
    return notes
