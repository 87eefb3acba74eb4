"""What of a model is trained beside the method's own choice: said by the user, kept with what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .backbones import is_below, near
from .freezing import is_adapter
from .sites import Site


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a shell pattern (``*`` also stands for dots), or lies in the module of that name."""
    return fnmatchcase(name, pattern) or name.startswith(f'{pattern}.')


@dataclass(frozen=True)
class Selection:
    """What is adapted, trained and frozen beside the method's own choice.

    Attributes:
        blocks: The blocks that are adapted; see :func:`choose_blocks`.
        unfreeze: Patterns of the backbone's own parameters that are trained.
        freeze: Patterns of parameters beside the backbone that are not.
        backbones: Paths of the backbones in the model; None for the only one.
        classifiers: Whether classifiers within the backbone are heads. False in files of releases that held them.

    Raises:
        ValueError: An option is of another kind.
    """

    blocks: str | tuple[int | str, ...] = 'all'
    unfreeze: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    backbones: tuple[str, ...] | None = None
    classifiers: bool = True

    def __post_init__(self) -> None:
        for option in ('unfreeze', 'freeze', 'backbones'):
            value = getattr(self, option)
            if option == 'backbones' and value is None:
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                what = 'paths of modules' if option == 'backbones' else "patterns, e.g. ['norm*']"
                raise ValueError(f'{option} must be a list of {what}, got {value!r}')
            if option == 'backbones' and not value:
                raise ValueError('backbones must name at least one module, got an empty list')
            object.__setattr__(self, option, tuple(value))
        if not isinstance(self.blocks, str):
            object.__setattr__(self, 'blocks', _block_list(self.blocks))

    @property
    def config(self) -> dict[str, Any]:
        """The options that are not defaults, as plain data."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Selection:
        """Make a selection of what :attr:`config` gave; None is the default one.

        Raises:
            ValueError: It is no such config.
        """
        if not isinstance(config, (Mapping, type(None))):
            raise ValueError(f'selection must be a dict, got {config!r}')
        known = [f.name for f in fields(cls)]
        for name in config or {}:
            if name not in known:
                raise ValueError(f"unknown option '{name}' of a selection; known: {', '.join(known)}")
        return cls(**(config or {}))

    def chosen(self, sites: list[Site], backbone: str) -> list[Site]:
        """The blocks of a backbone that are adapted.

        Args:
            sites: All of its blocks.
            backbone: What it is, for errors.

        Raises:
            ValueError: The blocks asked for are not there.
        """
        return sites if self.blocks == 'all' else choose_blocks(sites, self.blocks, backbone)

    def trained_names(self, backbone: nn.Module, outside: Sequence[str] = ()) -> list[str]:
        """Names of a backbone's own parameters and statistics that are trained.

        Statistics are those of normalisations whose own parameters are all trained.

        Args:
            backbone: The backbone.
            outside: Its submodules that are heads.
        """
        if not self.unfreeze:
            return []
        own = [n for n, _ in backbone.named_parameters() if not is_adapter(n) and not is_below(n, outside)]
        trained = [n for n in own if any(matches(n, pattern) for pattern in self.unfreeze)]
        return trained + statistics_of(backbone, set(trained))

    def check_unfreeze(self, names: Iterable[str]) -> None:
        """Refuse patterns of which no name is one.

        Raises:
            ValueError: A pattern fits none of the names.
        """
        _check_patterns('unfreeze', self.unfreeze, names, 'no parameter of the backbone')

    def frozen_names(self, names: Sequence[str]) -> list[str]:
        """Those names of parameters beside the backbones that are frozen.

        Raises:
            ValueError: A pattern fits none of the names.
        """
        _check_patterns('freeze', self.freeze, names, 'no parameter beside the backbone')
        return [n for n in names if any(matches(n, pattern) for pattern in self.freeze)]


def statistics_of(module: nn.Module, parameters: set[str]) -> list[str]:
    """Names of the buffers of those modules whose parameters, of which there are some, are all among the given."""
    names = []
    for name, layer in module.named_modules():
        own = [f'{name}.{n}'.removeprefix('.') for n, _ in layer.named_parameters(recurse=False)]
        if own and all(n in parameters for n in own):
            names += [f'{name}.{n}'.removeprefix('.') for n in layer.state_dict() if n in layer._buffers]
    return names


def _check_patterns(option: str, patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            words = sorted({'.'.join(parts[:end]) for parts in map(_parts, names) for end in range(1, len(parts) + 1)})
            hint = near(pattern.rstrip('.*'), words)
            top = ', '.join(dict.fromkeys(name.partition('.')[0] for name in names)) or 'nothing'
            raise ValueError(f'{option}: {what} fits {pattern!r}{hint}; there is: {top}')


def _parts(name: str) -> list[str]:
    return name.split('.')


def _block_list(blocks: Any) -> tuple[int | str, ...]:
    if isinstance(blocks, (int, Mapping)) or not isinstance(blocks, (Sequence, range)) or not len(blocks):
        raise ValueError(
            f"blocks must be 'all', 'first:N', 'last:N', 'stage:N', or a list of block numbers or names, got {blocks!r}"
        )
    for entry in blocks:
        if isinstance(entry, bool) or not isinstance(entry, (int, str)):
            raise ValueError(f'blocks must be numbers or names, got {entry!r} among them')
    return tuple(blocks)


def choose_blocks(sites: list[Site], blocks: str | Sequence[int | str], backbone: str) -> list[Site]:
    """Choose among the blocks of a backbone.

    Args:
        sites: All of its blocks, in order.
        blocks: ``'first:N'`` or ``'last:N'`` blocks; ``'stage:N'``, the blocks of a stage of a pyramid, counted from
            0; a name or shell pattern (``'stages.2'``, ``'layers.1?'``); or a list of such and of block numbers,
            negative ones from the end.
        backbone: What it is, for errors.

    Returns:
        Those chosen, in order.

    Raises:
        ValueError: There are no such blocks.
    """
    if not sites:
        raise ValueError(
            f'blocks={blocks!r}: {backbone} has no known Transformer blocks to choose among. Name layers of a tower by '
            "where=['decoder.layers.[45]']"
        )
    names = [site.name for site in sites]
    stages: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        stages.setdefault(name.rpartition('.')[0], []).append(index)
    there = f'{backbone} has {len(names)} blocks, {names[0]} to {names[-1]}'
    if len(stages) > 1:
        there += f', in {len(stages)} stages, {next(iter(stages))} to {list(stages)[-1]}'

    def indices(entry: int | str) -> list[int]:
        if isinstance(entry, int):
            if not -len(names) <= entry < len(names):
                raise ValueError(f'blocks: there is no block {entry}; {there}')
            return [entry % len(names)]
        word, colon, number = entry.partition(':')
        if not colon:
            found = [i for i, name in enumerate(names) if matches(name, entry)]
            if not found:
                raise ValueError(f'blocks: no block fits {entry!r}{near(entry, [*names, *stages])}; {there}')
            return found
        count = int(number) if number.isdecimal() else -1
        if word == 'stage' and len(stages) > 1 and 0 <= count < len(stages):
            return list(stages.values())[count]
        if word in ('first', 'last') and 1 <= count <= len(names):
            return list(range(len(names)))[:count] if word == 'first' else list(range(len(names)))[-count:]
        raise ValueError(f'blocks: there is no {entry!r}; {there}')

    wanted = {i for entry in ([blocks] if isinstance(blocks, str) else blocks) for i in indices(entry)}
    return [site for i, site in enumerate(sites) if i in wanted]
