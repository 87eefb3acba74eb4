"""Blocks in which each sample of a batch goes through an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters.stacked import kind_of, stack

from ..calls import Frame, Passage, run_in_frame
from ..replacement import Replacement
from .base import Attachment, BlockAttachment, Joint, Override
from .branch import BranchAttachment
from .linear import LinearAttachment, LowRankAttachment
from .module_branch import ModuleBranchAttachment
from .prompts import PromptAttachment


def why_not_mixed(attachment: Attachment) -> str | None:
    """Return why an attachment cannot run on some samples of a batch only, None if it can."""
    if isinstance(attachment, BranchAttachment):
        return None
    if isinstance(attachment, LowRankAttachment):
        if not attachment.reads:
            return None
        return (
            f'{attachment.family.name} blocks read the weight {attachment.reads[0]} instead of calling its layer, so '
            'all samples of a batch have the same weight'
        )
    if isinstance(attachment, PromptAttachment):
        return 'it adds tokens to the sequence, whose length all samples of a batch share'
    if isinstance(attachment, (LinearAttachment, ModuleBranchAttachment)):
        return f'it acts in {attachment.name}, in a module without known blocks'
    return 'it runs modules with other weights, which all samples of a batch share'


@dataclass(frozen=True)
class Rows:
    """Some samples of a batch, in order.

    Attributes:
        samples: Their numbers in the batch.
        batch: Number of samples of the batch.
    """

    samples: tuple[int, ...]
    batch: int

    @property
    def span(self) -> tuple[int, int] | None:
        """First number and last + 1, None if the numbers are not consecutive."""
        first, last = self.samples[0], self.samples[-1] + 1
        return (first, last) if self.samples == tuple(range(first, last)) else None

    def each(self, x: Tensor) -> int:
        """Return the number of rows of a sample in a tensor, such as its windows. They lie next to one another."""
        return len(x) // self.batch

    def indices(self, x: Tensor) -> Tensor:
        """Return the numbers of the rows in a tensor."""
        each = self.each(x)
        first = torch.tensor(self.samples, device=x.device) * each
        return (first[:, None] + torch.arange(each, device=x.device)).flatten()

    def take(self, x: Tensor) -> Tensor:
        """Return their rows of a tensor (batch * m, ...). Consecutive samples give a view."""
        if len(self.samples) == self.batch:
            return x
        if self.span is None:
            return x.index_select(0, self.indices(x))
        each, (first, last) = self.each(x), self.span
        return x[first * each : last * each]


def put(x: Tensor, parts: Sequence[tuple[Rows, Tensor]]) -> Tensor:
    """Return a tensor with other values in some rows. Nothing is copied if the values are those of all rows."""
    if not parts:
        return x
    if len(parts) == 1 and len(parts[0][0].samples) == parts[0][0].batch:
        return parts[0][1]
    spans = [(span, part) for rows, part in parts if (span := rows.span) is not None]
    if len(spans) < len(parts):
        out = x.to(torch.result_type(x, parts[0][1]), copy=True)
        for rows, part in parts:
            out.index_copy_(0, rows.indices(x), part.to(out.dtype))
        return out
    pieces, end = [], 0
    each = parts[0][0].each(x)
    for (first, last), part in sorted(spans, key=lambda item: item[0]):
        pieces += [x[end : first * each], part]
        end = last * each
    return torch.cat([piece for piece in (*pieces, x[end:]) if len(piece)])


@dataclass(frozen=True)
class Group:
    """Adapters of one kind that act at a block.

    Attributes:
        attachment: The attachment of the first, whose functions run for all.
        adapters: What runs in the place of its adapters, by their names.
        rows: Their samples.
    """

    attachment: Any
    adapters: Mapping[str, Any]
    rows: Rows


class MixedPassage:
    """The handler of a submodule for several groups, each on its own rows.

    Args:
        passages: Handlers of the groups that have one, with the number of the group and its rows.
    """

    def __init__(self, passages: Sequence[tuple[int, Rows, Passage]]) -> None:
        self.passages = passages
        self.splits = any(passage.splits for _, _, passage in passages)

    def __call__(self, host_forward: Callable, frame: Frame, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the submodule once, between the functions of all groups."""
        frames: list[Frame] = frame.values['frames']
        changed = []
        for number, rows, passage in self.passages:
            part = given = rows.take(x)
            for function in passage.before:
                part = function(frames[number], part)
            if part is not given:
                changed.append((rows, part))
        x = put(x, changed)
        identity = kwargs.get('identity') if self.splits else None
        if not isinstance(identity, Tensor):
            identity = None
        else:
            kwargs['identity'] = identity.new_zeros(())
        out = host_forward(x, *args, **kwargs)
        changed = []
        for number, rows, passage in self.passages:
            residual = None if identity is None else rows.take(identity)
            part = rows.take(out)
            if residual is not None and not passage.splits:
                part, residual = residual + part, None
            given = part
            for function in passage.after:
                part = function(frames[number], part)
            if part is not given:
                changed.append((rows, part if residual is None else residual + part))
        covers = sum(len(rows.samples) for rows, _ in changed) == self.passages[0][1].batch
        return put(out if identity is None or covers else identity + out, changed)


class MixedBlock:
    """What runs in the place of one block, for batches whose samples have adapters of their own.

    Args:
        groups: The groups of adapters that act at the block.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        passages: dict[str, list[tuple[int, Rows, Passage]]] = {}
        for number, group in enumerate(groups):
            for name, passage in group.attachment.handlers.items():
                passages.setdefault(name, []).append((number, group.rows, passage))
        self.handlers = {name: MixedPassage(each) for name, each in passages.items()}

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the block."""
        args, kwargs = joint.input_first(args, kwargs)
        block: BlockAttachment = self.groups[0].attachment
        x = args[block.family.stream]
        frames = [
            group.attachment.begin(group.rows.take(x), group.attachment.adapter_grid(args, kwargs), group.adapters)
            for group in self.groups
        ]
        frame = Frame(self.handlers, values={'frames': frames})
        outputs = run_in_frame(frame, joint.host_forward, *args, **kwargs)
        out = block.stream_of(outputs)
        changed = []
        for group, inner in zip(self.groups, frames):
            given = group.rows.take(out)
            part = group.attachment.end(inner, given)
            if part is not given:
                changed.append((group.rows, part))
        return block.with_stream(outputs, put(out, changed))


def _kind(attachment: Any) -> tuple:
    """What attachments at one block have in common that can run as one."""
    own = sorted((key, kind_of(attachment.part(key))) for key in attachment.adapters)
    return (type(attachment), getattr(attachment, 'input', None), *own)


def mix(joint: Joint, samples: Mapping[str, Sequence[int]], batch: int) -> MixedBlock | None:
    """Make what runs in the place of a module, None if none of the adapters acts there.

    Args:
        joint: The joint of the module.
        samples: Numbers of the samples of each adapter, by its name, in order.
        batch: Number of samples of the batch.
    """
    kinds: dict[tuple, list[str]] = {}
    for name in samples:
        if name in joint.attachments:
            kinds.setdefault(_kind(joint.attachments[name]), []).append(name)
    groups = []
    for names in kinds.values():
        attachments = [joint.attachments[name] for name in names]
        counts = [len(samples[name]) for name in names]
        adapters = {
            key: stack([attachment.part(key) for attachment in attachments], counts) for key in attachments[0].adapters
        }
        rows = Rows(tuple(number for name in names for number in samples[name]), batch)
        groups.append(Group(attachments[0], adapters, rows))
    return MixedBlock(groups) if groups else None


class Mixing(Override):
    """Runs mixed blocks in the places of blocks.

    Args:
        blocks: What runs in the place of each module, by its joint.
        classifiers: For each classifier within the backbone those of all adapters, with their samples.

    Attributes:
        places: Names of the modules in whose inputs and outputs each sample has rows of its own.
    """

    def __init__(
        self,
        blocks: Mapping[Joint, MixedBlock],
        classifiers: Mapping[nn.Module, Sequence[tuple[Replacement, Rows]]],
    ) -> None:
        self.blocks = blocks
        self.classifiers = classifiers
        self.places = {block.groups[0].attachment.name for block in blocks.values()}
        self.places.update(name for block in blocks.values() for name in block.handlers)

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module of a joint."""
        block = self.blocks.get(joint)
        if block is None:
            return joint.host_forward(*args, **kwargs)
        return block.run(joint, args, kwargs)


class RowProbe(Override):
    """Finds out whether the rows of each sample lie next to one another, wherever mixed blocks look.

    The base runs on two samples, the second of which is NaN. Then everything that depends on the second is NaN, and
    nothing else. Rows of the first sample must come first.

    Args:
        blocks: The mixed blocks, by their joints.

    Attributes:
        wrong: Where rows do not lie in this order.
    """

    def __init__(self, blocks: Mapping[Joint, MixedBlock]) -> None:
        self.blocks = blocks
        self.wrong: list[str] = []

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the base, and look at the rows."""
        block = self.blocks.get(joint)
        if block is None:
            return joint.host_forward(*args, **kwargs)
        args, kwargs = joint.input_first(args, kwargs)
        attachment = block.groups[0].attachment
        self.look(attachment.name or type(joint.module).__name__, args[attachment.family.stream])
        frame = Frame({name: partial(self._pass, name) for name in block.handlers})
        outputs = run_in_frame(frame, joint.host_forward, *args, **kwargs)
        self.look(attachment.name, attachment.stream_of(outputs))
        return outputs

    def _pass(self, name: str, host_forward: Callable, frame: Frame, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.look(name, x)
        out = host_forward(x, *args, **kwargs)
        self.look(name, out)
        return out

    def look(self, name: str, x: Tensor) -> None:
        """Look at a tensor of which each sample has some rows."""
        half = len(x) // 2
        if 2 * half != len(x) or x[:half].isnan().any() or not x[half:].isnan().any():
            self.wrong.append(name)
