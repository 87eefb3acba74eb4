"""What of a training fits where: an estimate of the memory on each of several GPUs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from mmengine.config import Config
from torch import nn

from iconformer_mm.engine.config import build_model, method_of
from iconformer_mm.tuning import get_injection, inject
from iconformer_mm.tuning.families import family_of
from iconformer_mm.tuning.injection import backbones_of
from iconformer_mm.tuning.packing import KINDS
from iconformer_mm.tuning.quantised_weight import linear_weights
from iconformer_mm.tuning.selection import Selection

from .inspection import MIB, cost_of

GIB = 2**30
# Left to the CUDA context, libraries, temporary tensors and fragmentation (ours).
RESERVED_GIB = 1.0
RESERVED_SHARE = 0.1
ONE, DDP, SHARDED = 'one GPU', 'DDPStrategy', 'FSDPStrategy'
_PRECISIONS = (None, 'bfloat16', 'int8', 'nf4')
_UNITS = 2  # gathered blocks at a time: the one that runs, and the next


@dataclass(frozen=True)
class Way:
    """One way to hold a training in memory.

    Attributes:
        strategy: ``'one GPU'``, ``'DDPStrategy'`` or ``'FSDPStrategy'``.
        frozen_dtype: The option of the PEFTHook.
        with_cp: The option of the PEFTHook.
        weights_gib: Frozen weights on one GPU, with blocks that are gathered from others (GiB).
        trained_gib: Trained parameters, their gradients, AdamW's state and buffers for exchange (GiB).
        stored_gib: What the backbones' forward pass of one image stores (GiB).
        images: The most images on one GPU that fit.
    """

    strategy: str
    frozen_dtype: str | None
    with_cp: bool
    weights_gib: float
    trained_gib: float
    stored_gib: float
    images: int

    def gib(self, batch: int) -> float:
        """The estimate for a batch on one GPU, without what is reserved (GiB)."""
        return self.weights_gib + self.trained_gib + batch * self.stored_gib


@dataclass(frozen=True)
class Plan:
    """What of a training fits on some GPUs. All numbers are estimates.

    Attributes:
        gpus: Number of GPUs.
        memory_gib: Memory of each (GiB).
        batch: Images on one GPU.
        ways: Ways to hold the training, the simplest first.
    """

    gpus: int
    memory_gib: float
    batch: int
    ways: list[Way]

    @property
    def usable_gib(self) -> float:
        """Memory of a GPU without what is reserved (GiB)."""
        return _usable(self.memory_gib)

    @property
    def chosen(self) -> Way | None:
        """The first way that fits; None if none does."""
        return next((way for way in self.ways if way.images >= self.batch), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        chosen = self.chosen
        return {**asdict(self), 'chosen': None if chosen is None else asdict(chosen)}


def _usable(memory_gib: float) -> float:
    return max(0.0, memory_gib * (1 - RESERVED_SHARE) - RESERVED_GIB)


def plan_memory(
    cfg: Config, gpus: int, memory_gib: float, shape: tuple[int, int] = (224, 224), batch: int | None = None
) -> Plan:
    """Estimate the memory of a config's training, for each strategy, ``frozen_dtype`` and ``with_cp``.

    Weights are counted, packed ones included. What the backbones store for the backward pass is measured on one image,
    on the CPU. Neck and head are counted as weights, and what they store is not measured. A tenth of the memory and
    1 GiB are left to everything else.

    Args:
        cfg: The config, with a PEFTHook or a method added by ``--peft``.
        gpus: Number of GPUs.
        memory_gib: Memory of each (GiB).
        shape: Height and width of the images in pixels. Defaults to 224 x 224.
        batch: Images on one GPU. Defaults to None: the config's ``train_dataloader.batch_size``, or 1.

    Raises:
        ValueError: A number is not positive, or the method cannot be applied to the model.
    """
    if gpus < 1 or memory_gib <= 0 or (batch is not None and batch < 1):
        raise ValueError(f'a plan needs at least one GPU, memory and images, got {gpus}, {memory_gib} GiB and {batch}')
    batch = batch or (cfg.get('train_dataloader') or {}).get('batch_size') or 1
    options = method_of(cfg)
    stored: dict[tuple[bool, bool], float] = {}
    weights: dict[str | None, _Weights] = {}
    for half, with_cp in product((False, True), (False, True)):
        model = build_model(cfg)
        given: dict[str, Any] = dict(method='full') if options is None else copy.deepcopy(options)
        given.update(frozen_dtype='bfloat16' if half else None, with_cp=with_cp)
        try:
            if get_injection(model) is None:
                inject(model, **given)
        except ValueError:
            if not half and not with_cp:
                raise  # the method itself does not fit
            continue  # a method that freezes nothing, or has no blocks to recompute
        stored[half, with_cp] = cost_of(model, shape).stored_mib * MIB / GIB
        if not with_cp:
            names = _PRECISIONS[1:] if half else (None,)
            weights.update({name: _Weights.of(model, name) for name in names})
    ways = [
        _way(strategy, name, with_cp, weights[name], stored[name is not None, with_cp], gpus, memory_gib)
        for strategy, name, with_cp in _in_order(gpus)
        if name in weights and (name is not None, with_cp) in stored
    ]
    return Plan(gpus, memory_gib, batch, ways)


def _in_order(gpus: int) -> list[tuple[str, str | None, bool]]:
    """Ways from the simplest and fastest on: first without sharding, which costs communication."""
    whole = product([ONE] if gpus == 1 else [DDP], (None, 'bfloat16'), (False, True))
    packed = product([ONE] if gpus == 1 else [DDP], ('int8', 'nf4'), (False, True))
    sharded = list(product([SHARDED], (None, 'bfloat16'), (False, True))) if gpus > 1 else []
    return [*whole, *sharded, *packed]


@dataclass(frozen=True)
class _Weights:
    """Bytes of a model's tensors.

    Attributes:
        frozen: Frozen parameters that are not packed.
        packed: Packed weights.
        trained: Trained parameters.
        buffers: Buffers.
        block: Parameters of the largest block.
        rest: Parameters outside of blocks.
    """

    frozen: int
    packed: int
    trained: int
    buffers: int
    block: int
    rest: int

    @classmethod
    def of(cls, model: nn.Module, frozen_dtype: str | None) -> _Weights:
        """Count those of a model, which is adapted in bfloat16 if a precision is given. Nothing is packed."""
        packed = 0
        left_out: set[int] = set()
        injection = get_injection(model)
        if frozen_dtype in KINDS:
            selection = Selection() if injection is None else injection.selection
            for backbone in backbones_of(model).values():
                frozen = {n: p for n, p in backbone.named_parameters() if not p.requires_grad}
                trained = selection.trained_names(backbone, ())
                names = [n for n in frozen if n not in trained]
                for name, weight in linear_weights(backbone, names, frozen_dtype).items():
                    packed += weight.form.nbytes
                    left_out.add(id(frozen[name]))
        parameters = [p for p in model.parameters() if id(p) not in left_out]
        blocks = [m for m in model.modules() if family_of(m) is not None]
        inside = {id(p) for block in blocks for p in block.parameters()}
        sizes = [sum(p.nbytes for p in b.parameters() if id(p) not in left_out) for b in blocks]
        return cls(
            frozen=sum(p.nbytes for p in parameters if not p.requires_grad),
            packed=packed,
            trained=sum(p.nbytes for p in parameters if p.requires_grad),
            buffers=sum(b.nbytes for b in model.buffers()),
            block=max(sizes, default=0),
            rest=sum(p.nbytes for p in parameters if id(p) not in inside),
        )


def _way(
    strategy: str, name: str | None, with_cp: bool, weights: _Weights, stored: float, gpus: int, memory_gib: float
) -> Way:
    frozen, trained = float(weights.frozen), 4.0 * weights.trained  # values, gradients, two states of AdamW
    if strategy == DDP:
        trained += weights.trained  # buckets for the exchange of gradients
    if strategy == SHARDED:
        frozen = frozen / gpus + _UNITS * weights.block + weights.rest
        trained = trained / gpus + weights.trained  # gradients before they are reduced
    held = (frozen + weights.packed + weights.buffers) / GIB
    room = _usable(memory_gib) - held - trained / GIB
    images = max(0, int(room / stored)) if stored else 0
    return Way(strategy, name, with_cp, held, trained / GIB, stored, images)


def settings_of(way: Way) -> Sequence[str]:
    """Return the lines of a config that ask for a way."""
    lines = [f'frozen_dtype={way.frozen_dtype!r}, with_cp={way.with_cp} of the PEFTHook']
    if way.strategy == SHARDED:
        lines += ["runner_type='FlexibleRunner'", "strategy=dict(type='FSDPStrategy')"]
    elif way.strategy == DDP:
        lines.append('tools/dist_train.sh (DDP)')
    return lines
