"""Feature maps of any timm model, for the heads of the mm libraries."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from iconformer_mm.checkpoint.foreign_backbones import looks_like
from iconformer_mm.checkpoint.reading import fetch_checkpoint, read_checkpoint, state_dict_of
from iconformer_mm.registry import is_type
from iconformer_mm.tuning.accounting import is_derived, some
from iconformer_mm.tuning.freezing import is_adapter

from .peft_backbone import PEFTBackbone

# What lets a model take images of any size, where its class has the option.
_ANY_SIZE = dict(dynamic_img_size=True, dynamic_img_pad=True, strict_img_size=False)
_PREFIXES = (None, 'cls', 'all')
# What files hold beside a backbone, by the first part of its name: heads, and tokens of the pre-training.
_BESIDE = ('head', 'head_dist', 'fc', 'fc_norm', 'norm', 'attn_pool', 'classifier', 'mask_token', 'rel_pos_bias')


class TIMMFeatures(BaseModule):
    """Feature maps of any timm model, by its ``forward_intermediates``.

    Images may have any size where the model's class can do it (ViT, Eva, SAM, Swin and others): position embeddings
    are interpolated, and a side that is no multiple of the patch size is padded with zeros at its end. Others, such as
    BEiT and Hiera, take the size of ``model_kwargs=dict(img_size=...)``. Blocks after the last map and the classifier
    are left out. PEFT methods attach to it as to any backbone.

    Args:
        model_name: Name of the model in timm, e.g. ``'vit_small_patch14_dinov2'``.
        out_indices: Which maps to give: indices of blocks for models without stages, of stages for others. Negative
            ones count from the end. Defaults to None: the last map of each stride, which is the last block's map for
            a ViT and all stages for Swin.
        pretrained: Whether :meth:`init_weights` has timm download its weights for the name. Defaults to False.
        checkpoint: File or URL of weights: timm's own, and the originals that timm can read (DINOv2, DINOv3, MAE,
            EVA, BEiT, SAM, Swin). They are read without executing anything, by :meth:`init_weights`. Defaults to
            None. ``init_cfg=dict(type='Pretrained', checkpoint=...)`` is the same.
        prefix_tokens: None for maps alone. ``'cls'`` gives pairs of a map and the class token
            (B, C), as mmseg's ``DPTHead`` takes them. ``'all'`` gives pairs of a map and all tokens before the
            patches (B, P, C): class token and registers. Defaults to None.
        norm: Whether the model's final norm is applied to every map, as DINOv2's protocols do. Defaults to False.
        in_channels: Channels of the images. Defaults to 3.
        with_cp: Whether blocks are recomputed in the backward pass. Defaults to False.
        model_kwargs: Further arguments of ``timm.create_model``, e.g. ``dict(drop_path_rate=0.1)``. They win over
            what this class sets. Defaults to None.
        init_cfg: MMEngine's. Defaults to None.

    Attributes:
        timm_model: The model.
        out_indices: The maps, counted from 0.
        out_channels: Channels of each map.
        out_strides: Stride of each map, in pixels.

    Raises:
        ValueError: The name is unknown to timm, the model cannot give maps, an index is out of range, or the model
            has no such prefix tokens.

    Example:
        >>> backbone = dict(
        ...     type='TIMMFeatures', model_name='vit_base_patch14_dinov2', out_indices=(2, 5, 8, 11), norm=True
        ... )
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        prefix_tokens: str | None = None,
        norm: bool = False,
        in_channels: int = 3,
        with_cp: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        checkpoint, prefix, init_cfg = _split_init(checkpoint, init_cfg)
        super().__init__(init_cfg)
        self._is_init: bool = False
        if not isinstance(pretrained, bool):
            raise ValueError(f'pretrained is a switch, got {pretrained!r}; give a file as checkpoint={pretrained!r}')
        if pretrained and checkpoint:
            raise ValueError(f'give pretrained=True or checkpoint={checkpoint!r}, not both')
        if prefix_tokens not in _PREFIXES:
            raise ValueError(f"prefix_tokens must be None, 'cls' or 'all', got {prefix_tokens!r}")
        self.model_name = model_name
        self.checkpoint = checkpoint
        self.prefix_tokens = prefix_tokens
        self.norm = norm
        self._weights_prefix = prefix
        self._kwargs = _complete(model_name, dict(model_kwargs or {}), in_channels)
        self.pretrained = pretrained
        self.timm_model: Any = _create(model_name, **self._kwargs)
        self.out_indices, self.out_channels, self.out_strides = self._choose(out_indices)
        self._options = self._call_options()
        model: Any = self.timm_model
        if hasattr(model, 'prune_intermediate_layers'):
            model.prune_intermediate_layers(list(self.out_indices), prune_norm=not norm, prune_head=True)
        self._fixed_size = self._find_fixed_size()
        self._patch_size = self._find_patch_size()
        if with_cp:
            model.set_grad_checkpointing(True)

    def _choose(self, indices: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Indices, channels and strides of the maps."""
        known = list(getattr(self.timm_model, 'feature_info', None) or [])
        if not hasattr(self.timm_model, 'forward_intermediates') or not known:
            raise ValueError(
                f"timm's {self.model_name} ({type(self.timm_model).__name__}) gives no intermediate maps: it has no "
                '`forward_intermediates`. Take another model, or a newer timm'
            )
        if indices is None:
            strides = [info['reduction'] for info in known]
            indices = [i for i, stride in enumerate(strides) if stride not in strides[i + 1 :]]
        indices = [indices] if isinstance(indices, int) else list(indices)
        if not indices:
            raise ValueError('out_indices names no map; give at least one index')
        wrong = [i for i in indices if not -len(known) <= i < len(known)]
        if wrong:
            raise ValueError(
                f'out_indices {wrong} are out of range: {self.model_name} has {len(known)} maps, 0 to '
                f'{len(known) - 1} (or -1 to -{len(known)})'
            )
        chosen = [i % len(known) for i in indices]
        if chosen != sorted(set(chosen)):
            raise ValueError(f'out_indices must ascend, each once, got {tuple(indices)}')
        infos = [known[i] for i in chosen]
        return tuple(chosen), tuple(i['num_chs'] for i in infos), tuple(int(i['reduction']) for i in infos)

    def _call_options(self) -> dict[str, Any]:
        """Options of ``forward_intermediates`` for this model's class."""
        accepted = inspect.signature(self.timm_model.forward_intermediates).parameters
        options = dict(
            indices=list(self.out_indices), output_fmt='NCHW', intermediates_only=True, norm=self.norm, stop_early=True
        )
        if self.prefix_tokens:
            count = getattr(self.timm_model, 'num_prefix_tokens', 0) or 0
            if 'return_prefix_tokens' not in accepted or not count:
                raise ValueError(
                    f'prefix_tokens={self.prefix_tokens!r}: {self.model_name} gives no tokens beside its maps; leave '
                    'prefix_tokens out'
                )
            if self.prefix_tokens == 'cls' and getattr(self.timm_model, 'cls_token', None) is None:
                raise ValueError(
                    f"prefix_tokens='cls': {self.model_name} has no class token; its {count} prefix tokens are "
                    "registers, which 'all' gives"
                )
            options['return_prefix_tokens'] = True
        return {name: value for name, value in options.items() if name in accepted}

    def _takes_any_size(self) -> bool:
        return any(self._kwargs.get(option) == value for option, value in _ANY_SIZE.items())

    def _find_fixed_size(self) -> tuple[int, int] | None:
        """The only size of images that a model takes; None for one that takes others, or may."""
        config = getattr(self.timm_model, 'pretrained_cfg', None) or {}
        if not config.get('fixed_input_size') or self._takes_any_size():
            return None
        size = self._kwargs.get('img_size') or config['input_size'][1:]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def _find_patch_size(self) -> tuple[int, int] | None:
        """The patch size where images have to be padded to a multiple of it before the model sees them."""
        embedding = getattr(self.timm_model, 'patch_embed', None) or getattr(self.timm_model, 'embeds', None)
        size = getattr(embedding, 'patch_size', None)
        if size is None or self._kwargs.get('dynamic_img_pad'):
            return None
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def _call(self, x: Tensor) -> Any:
        height, width = x.shape[-2:]
        if self._patch_size is not None:
            rows, columns = self._patch_size
            if height % rows or width % columns:
                x = F.pad(x, (0, -width % columns, 0, -height % rows))
        if self._fixed_size is None or tuple(x.shape[-2:]) == self._fixed_size:
            return self.timm_model.forward_intermediates(x, **self._options)
        try:  # some of those that timm marks as fixed interpolate
            return self.timm_model.forward_intermediates(x, **self._options)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f'{self.model_name} takes images of {self._fixed_size[0]} x {self._fixed_size[1]} pixels, got '
                f'{height} x {width}. Resize or pad the images to one size, and give it as '
                f'model_kwargs=dict(img_size={tuple(x.shape[-2:])}): the positions of its weights are interpolated then'
            ) from error

    def forward(self, x: Tensor) -> tuple[Tensor | list[Tensor], ...]:
        """Compute the maps.

        Args:
            x: Images (B, in_channels, H, W).

        Returns:
            Maps (B, C, h, w), one for each of ``out_indices``; pairs with the tokens where ``prefix_tokens`` says so.
            Maps are contiguous, as mmcv's RoIAlign needs them.
        """
        maps = self._call(x)
        if self.prefix_tokens == 'cls':
            return tuple([features.contiguous(), tokens[:, 0]] for features, tokens in maps)
        if self.prefix_tokens == 'all':
            return tuple([features.contiguous(), tokens] for features, tokens in maps)
        return tuple(features.contiguous() for features in maps)

    def init_weights(self) -> None:
        """Load ``checkpoint``, or what timm has for the name; without either the model stays as timm initialised it.

        Tests and predictions do not call it, so they need neither.

        Raises:
            ValueError: The file is of another family or size of model.
            DamagedFileError: It is truncated or no checkpoint.
            FileNotFoundError: There is none.
        """
        if self.checkpoint:
            self._load(self.checkpoint)
        elif self.pretrained:
            self._take(_create(self.model_name, pretrained=True, **self._kwargs).state_dict())
        elif self.init_cfg and not self._is_init:
            super().init_weights()  # MMEngine's own; without an init_cfg it would have timm initialise anew
        self._is_init = True

    def _own(self) -> dict[str, Tensor]:
        """The model's tensors by timm's names, without adapters."""
        return {n.removeprefix('timm_model.'): v for n, v in self.state_dict().items() if not is_adapter(n)}

    def _take(self, state: Mapping[str, Tensor]) -> None:
        """Load what fits, by load_state_dict, so that whoever watches loads sees it."""
        own = self._own()
        fitting = {f'timm_model.{n}': v for n, v in state.items() if n in own and v.shape == own[n].shape}
        self.load_state_dict(fitting, strict=False)

    def _load(self, path: str) -> None:
        state = _read(path, self._weights_prefix)
        with torch.device('meta'):  # as built, without adapters and with all that files hold
            whole = _create(self.model_name, **self._kwargs)
        state = _fit(state, whole, path, self.model_name)
        own = self._own()
        wrong = [n for n, v in own.items() if n in state and state[n].shape != v.shape and not is_derived(n)]
        missing = [n for n in own if n not in state and not is_derived(n)]
        known = whole.state_dict()
        left = [n for n in state if n not in own]
        foreign = [n for n in left if n not in known and n.partition('.')[0] not in _BESIDE]
        if wrong or missing or foreign:
            what = looks_like(state)
            details = [
                wrong and f'{wrong[0]} is {tuple(state[wrong[0]].shape)} there, {tuple(own[wrong[0]].shape)} here',
                missing and f'{len(missing)} of {len(own)} tensors are missing, such as {some(missing)}',
                foreign and f'without a place here: {some(foreign)}',
            ]
            raise ValueError(
                f'{path} does not fit {self.model_name}: {"; ".join(d for d in details if d)}. '
                + (f'It looks like {what}. ' if what else '')
                + f'Give weights of {self.model_name}, or convert them (iconformer convert-backbone --to timm)'
            )
        if left:
            print_log(f'{path}: not used by {self.model_name} here: {some(left, 8)}', logger='current')
        self._take(state)


class ICoNTIMMFeatures(PEFTBackbone, TIMMFeatures):
    """:class:`TIMMFeatures` with iCoN adapters, or others.

    Takes all arguments of :class:`TIMMFeatures`, and ``peft``.
    """


def _split_init(checkpoint: str | None, init_cfg: dict | None) -> tuple[str | None, str, dict | None]:
    """Checkpoint, prefix of its names, and what is left of ``init_cfg``."""
    if init_cfg is not None and is_type(init_cfg, 'Pretrained', 'PretrainedInit'):
        if checkpoint:
            raise ValueError('give the weights once: as checkpoint, or as init_cfg')
        return init_cfg['checkpoint'], init_cfg.get('prefix') or '', None
    return checkpoint, '', init_cfg


def _create(name: str, **kwargs: Any) -> nn.Module:
    """The timm model of a name.

    Raises:
        ValueError: timm knows none.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError('TIMMFeatures needs timm: pip install iconformer_mm[timm]') from error
    bare = name.partition('.')[0]
    if ':' not in name and not timm.is_model(bare):
        close = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(
            f"timm {timm.__version__} has no model '{name}'"
            + (f'; the nearest names are {", ".join(close)}' if close else '')
            + '. timm.list_models() has all'
        )
    return timm.create_model(name, **kwargs)


def _complete(name: str, kwargs: dict[str, Any], in_channels: int) -> dict[str, Any]:
    """Arguments of a model, with those that let it take images of any size."""
    kwargs.setdefault('in_chans', in_channels)
    with torch.device('meta'):
        kind = type(_create(name, **kwargs))
    accepted = inspect.signature(kind.__init__).parameters
    return {**{option: value for option, value in _ANY_SIZE.items() if option in accepted}, **kwargs}


def _read(path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file or a URL; those below a prefix, without it, where one is given."""
    content = read_checkpoint(fetch_checkpoint(path) if path.startswith(('http://', 'https://')) else path)
    state = state_dict_of(content, path)
    start = f'{prefix.rstrip(".")}.' if prefix else ''
    found = {n[len(start) :]: v for n, v in state.items() if n.startswith(start)}
    if not found:
        raise ValueError(f"{path} has no tensor below '{start}'; it has {some(list(state))}")
    # Files that this class, or mmpretrain's TIMMBackbone, was saved in.
    wrapped = 'timm_model.'
    return {n.removeprefix(wrapped): v for n, v in found.items()}


def _fit(state: dict[str, Tensor], model: nn.Module, path: str, name: str) -> dict[str, Tensor]:
    """Weights in timm's names and the model's size of positions, by timm's own function for the class."""
    fit = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if fit is None:
        return state
    try:
        return dict(fit(dict(state), model))
    except Exception as error:  # of another family, it may fail anywhere
        what = looks_like(state)
        raise ValueError(
            f'{path} does not fit {name}: timm cannot read it ({type(error).__name__}: {error}). '
            + (f'It looks like {what}. ' if what else f'It has {some(list(state))}. ')
            + f'Give weights of {name}'
        ) from error
