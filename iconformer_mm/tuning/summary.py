"""Trained, frozen and the backbone share, as data and as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

SUMMARY_FILE = 'peft_summary.json'  # in a work directory


@dataclass(frozen=True)
class Summary:
    """What a model trains. All counts are numbers of scalar parameters.

    Attributes:
        method: Name of the PEFT method, None for a model without one.
        trainable: Parameters that get a gradient, in the whole model.
        frozen: Parameters that get none.
        adapters: Adapter parameters.
        backbone: The backbone's own parameters, adapters not counted.
        backbone_share: Trained parameters on the backbone's side (adapters, or
            all of it in full fine-tuning) by ``backbone``; heads never count.
        sites: Names of the adapted modules, by block family or class.
        parts: For each part of the model its trained and its whole count: the backbone, the adapters, and the
            outermost modules that hold no backbone.
        backbones: Paths of the backbones in the model.
        unfrozen: Names of the backbone's own parameters and statistics that are trained.
        following: Paths of copies of the backbones that follow them by averaging, adapters included.
    """

    method: str | None
    trainable: int
    frozen: int
    adapters: int
    backbone: int
    backbone_share: float
    sites: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    backbones: list[str] = field(default_factory=list)
    unfrozen: list[str] = field(default_factory=list)
    following: list[str] = field(default_factory=list)

    @property
    def num_sites(self) -> int:
        """Number of adapted modules."""
        return sum(len(names) for names in self.sites.values())

    @property
    def rows(self) -> dict[str, tuple[int, int, int]]:
        """Of each part of the model, and of the whole, the parameters: trained, frozen, all."""
        rows = {part: (trained, total - trained, total) for part, (trained, total) in self.parts.items()}
        return {**rows, 'whole model': (self.trainable, self.frozen, self.trainable + self.frozen)}

    @property
    def adapted(self) -> str:
        """The adapted modules in words."""
        return ', '.join(f'{len(names)} x {family}' for family, names in self.sites.items()) or 'none'

    def __str__(self) -> str:
        table = Table(title=f'PEFT method: {self.method or "none"}', title_justify='left')
        table.add_column('part')
        for column in ('trained', 'frozen', 'parameters'):
            table.add_column(column, justify='right')
        *parts, whole = self.rows.items()
        for part, counts in parts:
            table.add_row(part, *(f'{count:,}' for count in counts))
        table.add_section()
        table.add_row(whole[0], *(f'{count:,}' for count in whole[1]), style='bold')
        text = io.StringIO()
        # In a notebook rich would display the table, and write nothing into the text.
        console = Console(file=text, width=88, color_system=None, force_jupyter=False)
        console.print(table)
        console.print(f'trained share of the backbone: {self.backbone_share:.3%}; adapted: {self.adapted}')
        if self.backbones not in ([''], ['backbone'], []):
            console.print(f'backbones: {", ".join(self.backbones)}')
        if self.unfrozen:
            console.print(f'trained of the backbone itself: {", ".join(self.unfrozen)}')
        if self.following:
            console.print(f'following by averaging: {", ".join(self.following)}')
        return text.getvalue().rstrip()
