"""Frozen weights in half precision, or in 8 or 4 bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from iconformer_mm.compat import device_of, is_autocast_enabled

from .accounting import WeightsError, output_norms
from .backbones import is_below, near
from .fingerprint import hash_names, hash_sets
from .freezing import is_adapter
from .packing import KINDS, check_torchao, is_packed, kind_of, write_head
from .quantised_weight import QuantisedWeight, linear_weights
from .replacement import Replacement

NAMES = ('bfloat16', *KINDS)


def check_frozen_dtype(name: Any) -> str:
    """Check that frozen weights can be held in a precision here.

    Args:
        name: One of ``NAMES``.

    Returns:
        The name.

    Raises:
        MissingExtraError: torchao is not installed, or it or torch is too old.
        ValueError: There is no such precision.
    """
    if name not in NAMES:
        hint = near(name, NAMES) if isinstance(name, str) else ''
        raise ValueError(f'frozen_dtype must be None or one of {", ".join(map(repr, NAMES))}, got {name!r}{hint}')
    if name in KINDS:
        check_torchao(name)
    return name


class FrozenPrecision(Replacement):
    """Holds the frozen matrices of a backbone in fewer bits, and runs it under bfloat16 autocast (ours).

    Parameters with one dimension (norms, biases) and adapters stay unchanged. With ``'bfloat16'`` all other
    matrices are in bfloat16. With ``'int8'``, ``'nf4'`` and ``'float8'`` the weights of linear layers are quantised
    instead, see :class:`~.quantised_weight.QuantisedWeight`. If autocast is already on, the caller's settings apply.
    Otherwise the backbone's outputs are cast back to float32, so neck and head need no changes.

    Quantised weights record the fingerprint of the base that they were made from. Floating-point weights that are
    loaded later are quantised on the way, and ``init_weights`` of the backbone runs on floating-point weights.

    Args:
        backbone: The backbone.
        name: The precision, one of ``NAMES``.
        trained: Names of parameters that are trained in place, which stay unchanged. Defaults to none.
        outside: Names of modules that are heads, which stay unchanged. Defaults to none.

    Raises:
        ValueError: A weight that would be quantised has NaN or infinite values.
    """

    def __init__(
        self, backbone: nn.Module, name: str, trained: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> None:
        super().__init__(backbone)
        self.name = name
        self.dtype = torch.bfloat16
        keep = [*trained, *outside]
        base = {n: p for n, p in backbone.named_parameters() if not is_adapter(n) and not is_below(n, keep)}
        matrices = {n: p for n, p in base.items() if p.dim() > 1 and p.is_floating_point()}
        self.weights = linear_weights(backbone, matrices, name) if name in KINDS else {}
        for weight in self.weights:
            _check_finite(weight, matrices[weight], name)
        self._originals = {n: p.dtype for n, p in matrices.items() if n not in self.weights}
        # A file may lack output norms, so its fingerprint may be without them.
        self._sets = [set(base), set(base) - output_norms(backbone)]
        self.is_active = False
        self._held = False
        self._arrived: dict[str, Tensor] = {}
        self._host_init: Any = None
        self._handles: list[Any] = []
        if self.weights:
            self._handles = [
                backbone._register_load_state_dict_pre_hook(self._before_load),
                backbone.register_load_state_dict_post_hook(self._after_load),
            ]

    def hold(self) -> None:
        """Round the matrices, unless they are already."""
        if self.is_active:
            return
        self.is_active = True
        self._pack()
        parameters = dict(self.module.named_parameters())
        for name in self._originals:
            parameters[name].data = parameters[name].data.to(self.dtype)
        self.replace()
        if self.weights and hasattr(self.module, 'init_weights'):
            self._host_init = self.module.__dict__.get('init_weights')
            self.module.__dict__['init_weights'] = self._init_weights

    def release(self) -> None:
        """Give the matrices their dtype back. Their values stay rounded."""
        for handle in self._handles:
            handle.remove()
        if not self.is_active:
            return
        self.is_active = False
        self.restore()
        if 'init_weights' in self.module.__dict__ and self.weights:
            del self.module.__dict__['init_weights']
            if self._host_init is not None:
                self.module.__dict__['init_weights'] = self._host_init
        self._unpack()
        parameters = dict(self.module.named_parameters())
        for name, dtype in self._originals.items():
            parameters[name].data = parameters[name].data.to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone under autocast."""
        device = device_of(self.module).type
        if is_autocast_enabled(device):
            return self.host_forward(*args, **kwargs)
        with torch.autocast(device, self.dtype):
            out = self.host_forward(*args, **kwargs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == self.dtype else t, out)

    def rounded(self, name: str, value: Tensor) -> Tensor:
        """Return what a value of the base is once it is held, for a parameter's name."""
        if name in self.weights:
            form = self.weights[name].form
            return form.unpack(form.pack(value), value.dtype)
        return value.to(self.dtype) if name in self._originals else value

    @property
    def sets(self) -> list[set[str]]:
        """The sets of names whose fingerprints packed weights record."""
        return self._sets

    @torch.no_grad()
    def take(self, name: str, value: Tensor) -> None:
        """Pack a floating-point value, and put it where the model has the packed weight, which may be empty.

        Args:
            name: Name of the weight.
            value: The value, on the device that the weight is to be on.

        Raises:
            ValueError: It has NaN or infinite values.
        """
        _check_finite(name, value, self.name)
        weight = self.weights[name]
        packed = weight.form.pack(value)
        if weight.packed.is_meta:
            weight.module._buffers[weight.name] = nn.Parameter(packed, requires_grad=False)
        else:
            weight.packed.copy_(packed)

    def record(self, fingerprints: Mapping[bytes, str]) -> None:
        """Record the fingerprints of the base that :meth:`take` got.

        Args:
            fingerprints: Those of :attr:`sets`, by :func:`~.fingerprint.hash_names`.
        """
        for weight in self.weights.values():
            write_head(weight.packed, self.name, fingerprints)

    def packed(self) -> dict[str, Tensor]:
        """Return copies of the packed weights by name."""
        return {name: weight.packed.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def set_packed(self, values: dict[str, Tensor]) -> None:
        """Copy packed weights in, as :meth:`packed` returned them."""
        for name, weight in self.weights.items():
            weight.packed.copy_(values[name])

    def _pack(self, known: dict[str, Tensor] | None = None) -> None:
        """Quantise the weights. Those that did not change keep the packed weight they are known to have."""
        if not self.weights:
            return
        known = known or {}
        current = {n: w.module.get_parameter(w.name).detach() for n, w in self.weights.items()}
        same = {
            n for n, v in known.items() if torch.equal(self.weights[n].form.unpack(v, current[n].dtype), current[n])
        }
        fingerprints = {} if len(same) == len(current) else self._fingerprints(current)
        for name, weight in self.weights.items():
            _check_finite(name, current[name], self.name)
            packed = known[name] if name in same else weight.form.pack(current[name])
            if fingerprints:
                write_head(packed, self.name, fingerprints)
            weight.hold(packed)
        self._held = True

    def _unpack(self) -> None:
        for weight in self.weights.values():
            weight.release()
        self._held = False

    def _fingerprints(self, values: dict[str, Tensor]) -> dict[bytes, str]:
        """Compute the fingerprints of the base, with the values that its quantised weights had."""
        state = self.module.state_dict()
        base = {name: values[name] if name in values else state[name] for name in self._sets[0]}
        if any(value.is_meta for value in base.values()):
            return {}
        return dict(zip(map(hash_names, self._sets), hash_sets(base, self._sets)))

    def _init_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Initialise the backbone in floating point."""
        known = self.packed()
        self._unpack()
        for weight in self.weights.values():
            _register_info(weight)
        host_init = self._host_init or type(self.module).init_weights.__get__(self.module)
        try:
            return host_init(*args, **kwargs)
        finally:
            self._pack(known)

    def _before_load(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Quantise the weights that a load brings in floating point."""
        self._arrived = {}
        for name, weight in self.weights.items() if self._held else ():
            key = prefix + name
            value = state_dict.get(key)
            if not isinstance(value, Tensor):
                continue
            if is_packed(value):
                if kind_of(value) != self.name or value.shape != weight.packed.shape:
                    raise WeightsError(
                        f"the weights hold the base in {kind_of(value)}, and the model's is in {self.name}: {name} "
                        f'does not fit. Adapt the model with frozen_dtype={kind_of(value)!r}, or load the base in '
                        'floating point'
                    )
            elif value.shape != weight.shape:
                errors.append(
                    f'size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in '
                    f'current model is {weight.shape}.'
                )
                del state_dict[key]
            else:
                _check_finite(name, value, self.name)
                self._arrived[name] = value
                state_dict[key] = weight.form.pack(value.to(weight.device))

    def _after_load(self, backbone: nn.Module, incompatible_keys: Any) -> None:
        """Record the fingerprint of the base that was loaded."""
        arrived, self._arrived = self._arrived, {}
        if not arrived:
            return
        fingerprints = self._fingerprints(arrived) if len(arrived) == len(self.weights) else {}
        with torch.no_grad():
            for weight in self.weights.values():
                if not weight.packed.is_meta:
                    write_head(weight.packed, self.name, fingerprints)


def _check_finite(name: str, value: Tensor, precision: str) -> None:
    # The extremes are NaN if a value is. Comparing each value would take memory of the weight's size.
    if not value.is_meta and not torch.stack(value.aminmax()).isfinite().all():
        raise ValueError(f'{name} has NaN or infinite values, which {precision} cannot hold; load sound weights')


def _register_info(weight: QuantisedWeight) -> None:
    """Tell MMEngine's initialisation of a parameter that it did not find when it began."""
    info = getattr(weight.module, '_params_init_info', None)
    parameter = weight.module._parameters[weight.name]
    if info is not None and parameter is not None and parameter not in info:
        info[parameter] = dict(
            init_info='The value is the same before and after calling `init_weights`',
            tmp_mean_value=parameter.data.mean().cpu(),
        )


def tell_rounded(name: str | None) -> None:
    """Log that a base keeps the values it was rounded to.

    Args:
        name: The precision that it was held in; None for that of its weights, of which nothing is to be said.
    """
    if name is not None:
        print_log(
            f'the base was held in {name} and keeps the rounded values; load its weights again for the original ones',
            logger='current',
            level=logging.WARNING,
        )
