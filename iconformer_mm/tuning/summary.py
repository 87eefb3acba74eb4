"""Counts of trained and frozen parameters, as data and as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

SUMMARY_FILE = 'peft_summary.json'  # in the work directory


@dataclass(frozen=True)
class TowerSummary:
    """What is trained in one adapted module. All counts are numbers of scalar parameters.

    Attributes:
        method: Name of its PEFT method.
        trained: Its trained parameters, adapters included.
        parameters: Its own parameters, without adapters.
        adapted: Number of adapted modules of each kind.
    """

    method: str
    trained: int
    parameters: int
    adapted: dict[str, int]

    @property
    def share(self) -> float:
        """Ratio of the trained parameters to its own."""
        return self.trained / max(self.parameters, 1)

    def __str__(self) -> str:
        adapted = ', '.join(f'{count} x {kind}' for kind, count in self.adapted.items()) or 'nothing'
        return f'{self.method}, {self.trained:,} of {self.parameters:,} trained ({self.share:.3%}), adapted: {adapted}'


@dataclass(frozen=True)
class Summary:
    """What a model trains. All counts are numbers of scalar parameters.

    Attributes:
        method: Name of the PEFT method, or None if the model has none.
        trainable: Trained parameters in the whole model.
        frozen: Frozen parameters in the whole model.
        adapters: Adapter parameters.
        backbone: The backbone's own parameters, without adapters.
        backbone_share: Ratio of the backbone's trained parameters to ``backbone``. The trained
            parameters include adapters, and the whole backbone in full fine-tuning, but no heads.
        sites: Names of the adapted modules, by block family or class. Defaults to none.
        parts: Trained and total count of each part: the backbone, the adapters, and the outermost
            modules without a backbone. Defaults to none.
        backbones: Paths of the backbones in the model. Defaults to none.
        unfrozen: Names of the backbone's own parameters and statistics that are trained. Defaults to none.
        following: Paths of copies that follow the backbones by averaging, adapters included. Defaults to none.
        towers: What is trained in each adapted module, by its path in the model. Defaults to none.
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
    towers: dict[str, TowerSummary] = field(default_factory=dict)

    @property
    def num_sites(self) -> int:
        """Number of adapted modules."""
        return sum(len(names) for names in self.sites.values())

    @property
    def rows(self) -> dict[str, tuple[int, int, int]]:
        """Trained, frozen and total parameters of each part and of the whole model."""
        rows = {part: (trained, total - trained, total) for part, (trained, total) in self.parts.items()}
        return {**rows, 'whole model': (self.trainable, self.frozen, self.trainable + self.frozen)}

    @property
    def adapted(self) -> str:
        """The adapted modules as text."""
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
        # In a notebook, rich would display the table instead of writing it to the text.
        console = Console(file=text, width=88, color_system=None, force_jupyter=False)
        console.print(table)
        console.print(f'trained share of the backbone: {self.backbone_share:.3%}; adapted: {self.adapted}')
        if len(self.towers) > 1:
            for path, tower in self.towers.items():
                console.print(f'{path}: {tower}')
        elif self.backbones not in ([''], ['backbone'], []):
            console.print(f'backbones: {", ".join(self.backbones)}')
        if self.unfrozen:
            console.print(f'trained of the backbone itself: {", ".join(self.unfrozen)}')
        if self.following:
            console.print(f'following by averaging: {", ".join(self.following)}')
        return text.getvalue().rstrip()
