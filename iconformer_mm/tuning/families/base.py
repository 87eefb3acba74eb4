"""What a block family is: where an adapter attaches in a Transformer block, and where its tokens lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Argument:
    """The block is called with the grid's size.

    Attributes:
        name: Name of the argument, a pair (height, width).
        position: Its place among the positional arguments.
        width: Name of the next argument, the width, where ``name`` is the height alone. Defaults to None.
        num_prefix_tokens: Reads the number of prefix tokens from the block. Defaults to None, for no such tokens.
    """

    name: str
    position: int = 1
    width: str | None = None
    num_prefix_tokens: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class FromShape:
    """The block's input is a map, (B, H, W, d); or (B, d, H, W), where the family says so by ``channels_first``."""


@dataclass(frozen=True)
class FromBlock:
    """The block was built for one size.

    Attributes:
        read: Reads (height, width) from the block.
    """

    read: Callable[[Any], Size]


@dataclass(frozen=True)
class FromSquare:
    """The block sees a bare sequence, and its host takes square images only."""


@dataclass(frozen=True)
class NoGrid:
    """The tokens lie on no grid, or not in its order. Methods that ask for the grid are refused.

    Attributes:
        reason: Why, for the error.
    """

    reason: str


@dataclass(frozen=True)
class FromPatchEmbed:
    """The block sees a bare sequence; a module of its host knows the grid, mostly the patch embedding.

    Attributes:
        read: ``(module, inputs, output) -> (height, width)`` or ``(height, width, prefix tokens)``.
        num_prefix_tokens: Name of the host's attribute (a number or a flag), or, where the host has no such
            attribute, the number itself or a function of the host.
        module: Name of the module in the host, ``''`` for the host itself; or a function that makes it of the
            block's name in the host. Defaults to ``'patch_embed'``.
        host: Import path of the host's class. Defaults to None, the innermost module that has such a ``module``.
        before: Whether it is read before the module runs, when there is no output. Defaults to False.
    """

    read: Callable[[Any, tuple, Any], tuple[int, ...]]
    num_prefix_tokens: str | int | Callable[[Any], int]
    module: str | Callable[[str], str] = 'patch_embed'
    host: str | None = None
    before: bool = False


GridSource = Argument | FromShape | FromBlock | FromSquare | NoGrid | FromPatchEmbed
# Of a role (q, k, v, o, fc1, fc2): name of the weight, first and last + 1 row within a group, number of groups.
Rows = dict[str, tuple[str, int, int, int]]


@dataclass(frozen=True)
class BlockFamily:
    """How adapters attach to one class of blocks.

    Attributes:
        name: For people.
        block: Import path of the block's class, or its bare name. A subclass belongs to the
            family as long as it does not override ``forward``.
        grid: Where the token grid is known. Several for blocks that stand in hosts of several kinds; the first
            that fits counts.
        norm: Name of the submodule whose (last) input is the residual stream
            x'. None where the FFN itself reads the residual stream: there
            ``input='normed'`` and ``'residual'`` are the same.
        ffn: Name of the FFN submodule, whose input is LN2(x').
        attention_norm: Name of the norm LN1 before attention, None where
            attention reads x itself.
        attention: Name of the attention submodule, where it is called with LN1(x) as a whole. None
            where it is called with windows of it; then the output of LN1 is taken.
        attention_out: Name of the submodule whose output, of the shape of the block's
            input, is the last that happens to the branch of attention before its sum
            (with the sum, where it is called with ``identity``). None where there is no such
            submodule, or the FFN uses it, too.
        ffn_out: The same for the branch of the FFN.
        shared_out: Name of the submodule that is the last of all branches, attention
            first, the FFN last. None where there is no such submodule.
        takes_prompts: Whether attention runs over any sequence, whatever the
            place of its tokens.
        idle: Submodules that the block never calls.
        branches: What the block has: ``'attention'``, ``'ffn'``, or both.
        direct: Whether the FFN's norm reads the sum with attention itself. False where something stands
            between (a convolution), or both branches run side by side.
        skip: Name of the submodule whose input is what attention is added to. None for the block's input.
        stream: Which of the block's arguments, and of its outputs if it has several, is the residual stream.
        channels_first: Names of submodules whose maps are (B, d, H, W), ``''`` for the block itself.
        reshapes: Whether attention of this very block changes number or width of the tokens. Then nothing can
            stand parallel to it. None where no block of the family does.
        grid_after: ``(block, (height, width))`` to the grid's size after attention that reshapes.
        order: ``(block, (height, width), number of tokens)`` to the grid's size and the places (row by row) of the
            tokens, in blocks whose tokens do not lie row by row. None where they do.
        rows: Where linear maps lie, of blocks where names do not tell. None where they do.
        where: Which blocks of the class belong to the family. None for all.
    """

    name: str
    block: str
    grid: GridSource | tuple[GridSource, ...]
    norm: str | None
    ffn: str = 'ffn'
    attention_norm: str | None = 'norm1'
    attention: str | None = None
    attention_out: str | None = None
    ffn_out: str | None = None
    shared_out: str | None = None
    takes_prompts: bool = False
    idle: tuple[str, ...] = ()
    branches: tuple[str, ...] = ('attention', 'ffn')
    direct: bool = True
    skip: str | None = None
    stream: int = 0
    channels_first: tuple[str, ...] = ()
    reshapes: Callable[[Any], bool] | None = None
    grid_after: Callable[[Any, Size], Size] | None = None
    order: Callable[[Any, Size, int], tuple[Size, Tensor]] | None = None
    rows: Callable[[Any], Rows] | None = None
    where: Callable[[Any], bool] | None = None

    def __deepcopy__(self, memo: dict) -> BlockFamily:
        return self

    def __reduce__(self) -> tuple:
        # By name, since conditions may be functions without one.
        return _known_family, (self.name, self.block)

    @property
    def sources(self) -> tuple[GridSource, ...]:
        """Where the token grid may be known."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid,)

    def includes(self, block: nn.Module) -> bool:
        """Whether a module is a block of the family."""
        for cls in type(block).__mro__:
            if self.block in (class_path(cls), cls.__name__) and type(block).forward is getattr(cls, 'forward', None):
                return self.where is None or self.where(block)
        return False


def class_path(cls: type) -> str:
    """Import path of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def _known_family(name: str, block: str) -> BlockFamily:
    """The known family of a name and a block, for pickles.

    Raises:
        ValueError: It is not known in this process.
    """
    from . import FAMILIES

    for family in reversed(FAMILIES):
        if (family.name, family.block) == (name, block):
            return family
    raise ValueError(
        f'the pickled model has blocks of the family {name!r} ({block}), which is not known here; make it known first, '
        'by register_family'
    )
