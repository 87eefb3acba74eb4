"""Matrices packed in 8 or 4 bits, quantised by torchao."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.extras import MissingExtraError, require_extra

# By name, the number that packed weights are marked with.
KINDS = {'int8': 1, 'nf4': 2, 'float8': 3}
OLDEST_TORCHAO = (0, 18)
OLDEST_TORCH = (2, 5)

# A packed weight begins with a mark, its kind, its size, and two fingerprints of the base that it was made from: each
# the names of the parameters (8 bytes) and the fingerprint (32 bytes).
_MARK = b'iconq1\0'
_HEAD = struct.Struct('<7sBQ8s32s8s32s')
_ALIGNMENT = 16
_VALUES_OF_ROWS = 2**20  # values that are quantised at a time
_VALUES_OF_NF4 = 2**15  # fewer: torchao compares each value with all 16 levels at once
_BLOCK, _SCALER_BLOCK = 64, 256  # of NF4 (QLoRA, Dettmers et al., NeurIPS 2023)
_SMALLEST_BLOCK = 16
# Levels of NF4 as torchao rounds them.
_NF4 = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
_TWO_ZEROS = 0x77  # a byte with twice the level 0


def check_torchao(frozen_dtype: str) -> None:
    """Check that weights can be quantised here, without importing torchao.

    Args:
        frozen_dtype: The option's value, for the message.

    Raises:
        MissingExtraError: torch or torchao is too old, or torchao is not installed.
    """
    purpose = f'frozen_dtype={frozen_dtype!r}'
    if _release(torch.__version__) < OLDEST_TORCH:
        raise MissingExtraError(
            f'{purpose} needs torch {_dotted(OLDEST_TORCH)} or newer and torchao {_dotted(OLDEST_TORCHAO)} or newer; '
            f"this is torch {torch.__version__}, where frozen_dtype='bfloat16' works"
        )
    require_extra('quant', purpose)
    installed = metadata.version('torchao')
    if _release(installed) < OLDEST_TORCHAO:
        raise MissingExtraError(
            f'{purpose} needs torchao {_dotted(OLDEST_TORCHAO)} or newer, and {installed} is installed; install the '
            "extra 'quant': pip install 'iconformer_mm[quant]'"
        )


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    numbers = version.split('+')[0].split('.')[:2]
    return tuple(int(''.join(filter(str.isdigit, number)) or 0) for number in numbers)


def _dotted(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version))


@dataclass(frozen=True)
class Format:
    """How a matrix is packed into one tensor of bytes.

    One tensor of bytes follows ``.to()``, ``.half()``, broadcasts and checkpoints without rounding.

    Attributes:
        kind: ``'int8'`` (a scale for each row), ``'float8'`` (e4m3, a scale for each row) or ``'nf4'`` (a scale for
            each block of 64 values, the scales themselves in 8 bits).
        shape: Shape of the weight. Its first dimension is the output.
    """

    kind: str
    shape: torch.Size

    @cached_property
    def block(self) -> int:
        """Values in a block of NF4."""
        return math.gcd(self.shape.numel(), _BLOCK)

    @cached_property
    def scaler_block(self) -> int:
        """Scales of NF4 that share a factor."""
        return math.gcd(self.shape.numel() // self.block, _SCALER_BLOCK)

    @cached_property
    def sections(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """Of each part, the first byte, the end, and the dtype."""
        count = self.shape.numel()
        if self.kind == 'nf4':
            blocks = count // self.block
            parts = {
                'mean': (1, torch.float32),
                'factors': (blocks // self.scaler_block, torch.float32),
                'scales': (blocks, torch.int8),
                'values': (count // 2, torch.uint8),
            }
        else:
            values = torch.int8 if self.kind == 'int8' else torch.float8_e4m3fn
            parts = {'scales': (self.shape[0], torch.float32), 'values': (count, values)}
        sections, start = {}, _HEAD.size
        for name, (size, dtype) in parts.items():
            start = -(-start // _ALIGNMENT) * _ALIGNMENT
            end = start + size * dtype.itemsize
            sections[name] = start, end, dtype
            start = end
        return sections

    @property
    def nbytes(self) -> int:
        """Size of the packed weight."""
        return max(end for _, end, _ in self.sections.values())

    def fits(self) -> bool:
        """Whether packing makes a weight smaller than bfloat16 does."""
        count = self.shape.numel()
        if self.kind == 'nf4' and self.block < _SMALLEST_BLOCK:
            return False
        return 0 < self.nbytes < 2 * count

    def parts(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the parts of a packed weight. They share its memory."""
        return {name: packed[start:end].view(dtype) for name, (start, end, dtype) in self.sections.items()}

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Tensor:
        """Quantise a weight by torchao.

        Args:
            weight: The weight, floating-point and finite.

        Returns:
            The packed weight, without fingerprints.
        """
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device=weight.device)
        if weight.is_meta:
            return packed
        write_head(packed, self.kind, {})
        parts = self.parts(packed)
        if self.kind == 'nf4':
            self._pack_nf4(weight.detach(), parts)
            return packed
        # Rows have scales of their own.
        by_row = {name: part.view(self.shape[0], -1) for name, part in parts.items()}
        for rows, matrix in self._matrices(weight.detach(), _VALUES_OF_ROWS):
            for name, values in _quantise_rows(matrix, self.kind).items():
                by_row[name][rows] = values.view(len(values), -1)
        return packed

    def _pack_nf4(self, weight: Tensor, parts: dict[str, Tensor]) -> None:
        """Write the parts of a weight in NF4. Blocks of zeros, and scales that are all equal, stay exact.

        Values are quantised by some blocks at a time. Scales have a mean in common, so they are quantised at the end.
        """
        largest = torch.empty(parts['scales'].shape, device=weight.device)
        for rows, matrix in self._matrices(weight, _VALUES_OF_NF4):
            blocks = matrix.view(-1, self.block)
            largest[self._blocks(rows)] = blocks.abs().amax(dim=1)
            parts['values'][self._blocks(rows, self.block // 2)] = _nf4_codes(blocks)
        scales, factors, mean = _nf4_scales(largest, self.scaler_block)
        parts['scales'].copy_(scales)
        parts['factors'].copy_(factors)
        parts['mean'].copy_(mean)

    def _blocks(self, rows: slice, size: int = 1) -> slice:
        """Return where the blocks of NF4 of some rows lie, each of ``size`` elements."""
        columns = self.shape[1:].numel()
        return slice(*(row * columns // self.block * size for row in (rows.start, rows.stop)))

    def _matrices(self, weight: Tensor, values: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows at a time as a matrix, in float32 and contiguous, in whole blocks of NF4.

        Args:
            weight: The weight.
            values: About how many values to yield at a time.
        """
        columns = self.shape[1:].numel()
        step = self.block // math.gcd(columns, self.block) if self.kind == 'nf4' else 1
        count = step * max(1, values // (step * columns))
        for start in range(0, len(weight), count):
            rows = slice(start, min(start + count, len(weight)))
            yield rows, weight[rows].flatten(1).float().contiguous()

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight that a packed one stands for: computed in float32, then rounded to ``dtype``."""
        parts = self.parts(packed)
        if self.kind != 'nf4':
            rows = parts['values'].view(self.shape[0], -1).float()
            return rows.mul_(parts['scales'][:, None]).view(self.shape).to(dtype)
        levels = torch.tensor(_NF4, device=packed.device)
        codes = torch.arange(256, device=packed.device)
        pairs = torch.stack((levels[codes >> 4], levels[codes & 15]), dim=1)
        scales = (parts['scales'].view(-1, self.scaler_block) / parts['factors'][:, None]).flatten() + parts['mean']
        values = pairs.index_select(0, parts['values'].int()).view(-1, self.block)
        return values.mul_(scales[:, None]).view(self.shape).to(dtype)


def _quantise_rows(matrix: Tensor, kind: str) -> dict[str, Tensor]:
    """Quantise a matrix by torchao, with one symmetric scale for each row."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if kind == 'int8':
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        config = Float8WeightOnlyConfig(weight_dtype=torch.float8_e4m3fn, set_inductor_config=False)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device='meta')
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    quantize_(layer, config)
    weight: Any = layer.weight
    # torchao's method refers to its layer. The cycle would hold the weight until garbage is collected.
    vars(layer).pop('extra_repr', None)
    zeros = (matrix == 0).all(dim=1)  # whose scale would be zero
    values = weight.qdata.view(torch.uint8).masked_fill(zeros[:, None], 0).view(weight.qdata.dtype)
    return dict(scales=weight.scale.flatten().masked_fill(zeros, 1), values=values)


def _nf4_codes(blocks: Tensor) -> Tensor:
    """Quantise blocks by torchao: for each value the nearest level of NF4, two codes in a byte."""
    from torchao.quantization import NF4Tensor

    levels = torch.tensor(_NF4, device=blocks.device)
    codes = NF4Tensor.convert_to_norm_float_weight(blocks, *blocks.shape, levels).view(len(blocks), -1)
    zeros = (blocks == 0).all(dim=1)  # torchao divides them by zero
    return codes.masked_fill(zeros[:, None], _TWO_ZEROS).flatten()


def _nf4_scales(largest: Tensor, scaler_block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the scales of blocks by torchao.

    Args:
        largest: Of each block, the largest absolute value.
        scaler_block: How many scales share a factor.

    Returns:
        The scales in int8, the factors and the mean.
    """
    from torchao.quantization import NF4Tensor

    # torchao takes the largest of each block itself. Of blocks of one value that is the value.
    scales, factors, mean = NF4Tensor.double_quantize_scalers(largest, 1, scaler_block)
    equal = factors.isinf()  # torchao divides by the largest difference from the mean
    scales = scales.masked_fill(equal.repeat_interleave(scaler_block), 0)
    return scales, factors.masked_fill(equal, 1), mean


def write_head(packed: Tensor, kind: str, fingerprints: Mapping[bytes, str]) -> None:
    """Write the head of a packed weight.

    Args:
        packed: The packed weight.
        kind: Its kind.
        fingerprints: At most two fingerprints of the base, by :func:`~.fingerprint.hash_names` of its parameters.
    """
    flat = [part for names, value in fingerprints.items() for part in (names, bytes.fromhex(value))]
    flat += [b''] * (4 - len(flat))
    head = _HEAD.pack(_MARK, KINDS[kind], packed.numel(), *flat)
    packed[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(packed.device)


def _head(value: Tensor) -> tuple | None:
    if value.dtype != torch.uint8 or value.dim() != 1 or value.numel() < _HEAD.size or value.is_meta:
        return None
    head = _HEAD.unpack(bytes(value[: _HEAD.size].tolist()))
    return head if head[0] == _MARK and head[2] == value.numel() else None


def is_packed(value: Any) -> bool:
    """Whether a value is a packed weight."""
    return isinstance(value, Tensor) and _head(value) is not None


def kind_of(packed: Tensor) -> str:
    """Return the kind of a packed weight."""
    head = _head(packed)
    number = None if head is None else head[1]
    return next((kind for kind, own in KINDS.items() if own == number), 'an unknown format')


def recorded_fingerprints(packed: Tensor) -> dict[bytes, str]:
    """Return the fingerprints in the head of a packed weight; see :func:`write_head`."""
    head = _head(packed)
    pairs = () if head is None else ((head[3], head[4]), (head[5], head[6]))
    return {names: value.hex() for names, value in pairs if any(names)}
