"""A page about a training run, from its work directory. Missing or damaged files become notes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from iconformer_mm.checkpoint import AdapterFileError, read_adapter
from iconformer_mm.inference.predictions import caption
from iconformer_mm.tuning import Summary
from iconformer_mm.tuning.summary import SUMMARY_FILE, TowerSummary

from .figures import HistoryPanel, draw_history
from .report_page import IMAGE_KINDS, Page, Picture, ReportError, Section, Table, format_value, read_picture

MAX_PICTURES = 48
MAX_PANELS = 12
TIMESTAMP = re.compile(r'\d{8}_\d{6}')  # MMEngine's folder name for one start of a run
NO_METRIC = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory', 'lr', 'base_lr', 'grad_norm'}
# Matched against the last part of a metric's name, such as top1 in accuracy/top1.
LOWER_IS_BETTER = re.compile(r'loss|rmse|_rel$|log10|silog')
HIGHER_IS_BETTER = re.compile(r'[aA]cc|^top|precision|recall|f1|AP|AR@|IoU|Dice|auc|^d[123]$')


@dataclass
class Run:
    """A training run.

    Attributes:
        folder: The work directory.
        starts: Folders of its starts, in order. A resumed run has several.
        train: Training logs, one dictionary every few steps.
        val: Validation logs, one dictionary per validation.
        config: The dumped config of the last start that has one.
        log: The log of the last start that has one.
        problems: Messages about what could not be read.
    """

    folder: Path
    starts: list[Path]
    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)
    config: str | None = None
    log: str = ''
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the config that MMEngine dumped into the folder, or the name of the folder."""
        configs = sorted(self.folder.glob('*.py'), key=lambda path: path.stat().st_mtime)
        return configs[-1].stem if configs else self.folder.resolve().name

    @property
    def unit(self) -> str:
        """The unit in which validations are counted."""
        return 'epoch' if any('epoch' in record for record in self.train) else 'iteration'


# Reading


def read_run(folder: Path) -> Run:
    """Read a work directory of ``tools/train.py``.

    Args:
        folder: The work directory.

    Raises:
        ReportError: It contains no folder of a start.
    """
    starts = sorted(path for path in folder.iterdir() if path.is_dir() and TIMESTAMP.fullmatch(path.name))
    if not starts:
        raise ReportError(
            f'{folder} is neither a work directory of tools/train.py (it has no folder such as 20250131_120000) nor an '
            '--out folder of tools/compare.py (it has no results.json)'
        )
    run = Run(folder, starts)
    for start in starts:
        _append_start(run, read_scalars(start / 'vis_data' / 'scalars.json', run.problems))
        config, log = start / 'vis_data' / 'config.py', start / f'{start.name}.log'
        if config.is_file():
            run.config = config.read_text(encoding='utf-8', errors='replace')
        if log.is_file():
            run.log = log.read_text(encoding='utf-8', errors='replace') or run.log
    return run


def read_scalars(path: Path, problems: list[str]) -> list[dict]:
    """Read MMEngine's log of scalars, one JSON object per line.

    Args:
        path: The file. A missing file gives no records.
        problems: A message about unreadable lines is appended to it.

    Returns:
        The objects that have a step.
    """
    records, damaged = [], []
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and _is_number(record.get('step')):
            records.append(record)
        else:
            damaged.append(number)
    if damaged:
        where = f'{path.parent.parent.name}/{path.parent.name}/{path.name}'
        problems.append(f'damaged lines left out of {where}: {len(damaged)}, the first is line {damaged[0]}')
    return records


def _append_start(run: Run, records: list[dict]) -> None:
    """Add the records of a start. They replace the records of earlier starts for the same steps."""
    train = [record for record in records if 'iter' in record]
    val = [record for record in records if 'iter' not in record]
    begin = min((record['step'] for record in train), default=math.inf)
    begin_val = min([record['step'] for record in val] + [r.get('epoch', r['step']) for r in train], default=math.inf)
    run.train = [record for record in run.train if record['step'] < begin] + train
    run.val = [record for record in run.val if record['step'] < begin_val] + val


def read_summary(folder: Path, problems: list[str]) -> Summary | None:
    """Read the summary that PEFTHook wrote of a training.

    Args:
        folder: The work directory.
        problems: A message is appended to it if the file cannot be read.

    Returns:
        The summary; None if the file is missing or unreadable.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        towers = {path: TowerSummary(**tower) for path, tower in content.pop('towers', {}).items()}
        summary = Summary(**{p.name: content[p.name] for p in fields(Summary) if p.name != 'towers'}, towers=towers)
        str(summary)  # fails if a value has the wrong type
        return summary
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f'{path.name} cannot be read: {type(error).__name__}: {error}')
        return None


def read_environment(log: str) -> dict[str, str]:
    """Read the versions of the environment from MMEngine's log.

    Args:
        log: The text of the log.
    """
    block = log.rpartition('System environment:\n')[2].partition('\n-----')[0] if 'System environment:' in log else ''
    facts = re.findall(r'^ {4}(\w[^:\n]*): (.*)$', block, re.MULTILINE)
    return {name: value for name, value in facts if name != 'PyTorch compiling details'}


def metrics_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics in log records, in order."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(n for n, value in record.items() if n not in NO_METRIC and _is_number(value)))
    return list(names)


def best_of(name: str, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the record with a metric's best value; None if the better direction is unknown."""
    last = name.rpartition('/')[2]
    sign = -1 if LOWER_IS_BETTER.search(last) else 1 if HIGHER_IS_BETTER.search(last) else 0
    known = [record for record in records if _is_number(record.get(name)) and math.isfinite(record[name])]
    return max(known, key=lambda record: sign * record[name], default=None) if sign else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Writing


def report_run(folder: Path, max_bytes: int) -> Page:
    """Build the page of a run.

    Args:
        folder: Work directory of ``tools/train.py``.
        max_bytes: Maximum total size of the pictures of predictions, in bytes.

    Raises:
        ReportError: The folder is not such a work directory.
    """
    run = read_run(folder)
    sections = [
        _summary(run),
        _curves(run),
        _metrics(run),
        _predictions(run, max_bytes),
        _adapter(run),
        _files(run),
        Section('Environment', facts=read_environment(run.log)),
        Section('Config', folded={'the config, as MMEngine wrote it': run.config} if run.config else {}),
    ]
    if not sections[-2].facts:
        sections[-2].notes.append('no log with an environment was found')
    if run.config is None:
        sections[-1].notes.append('no config was found: no start has a vis_data/config.py')
    return Page(run.name, f'training run in {run.folder}', sections)


def _summary(run: Run) -> Section:
    section = Section('Summary')
    summary = read_summary(run.folder, run.problems)
    section.notes.extend(run.problems)
    if summary is None:
        section.notes.append(f'there is no {SUMMARY_FILE}: no PEFTHook adapted the model in training')
    else:
        section.facts['method'] = format_value(summary.method)
        section.facts['trained share of the backbone'] = f'{summary.backbone_share:.3%}'
        section.facts['adapted modules'] = summary.adapted
        if len(summary.towers) > 1:
            section.facts.update({path: str(tower) for path, tower in summary.towers.items()})
        rows = [[name, *map(format_value, counts)] for name, counts in summary.rows.items()]
        section.tables.append(Table(['part', 'trained', 'frozen', 'parameters'], rows))
    if run.train:
        last = run.train[-1]
        epoch = f', epoch {last["epoch"]}' if 'epoch' in last else ''
        section.facts['trained until'] = f'iteration {format_value(last["step"])}{epoch}'
        times = [record['time'] for record in run.train if _is_number(record.get('time'))]
        if times:
            section.facts['seconds an iteration'] = f'{median(times):.3g} (median)'
        memory = [record['memory'] for record in run.train if _is_number(record.get('memory'))]
        if memory:
            section.facts['GPU memory'] = f'{max(memory):,} MiB'
    starts = [start.name for start in run.starts]
    listed = ', '.join(starts) if len(starts) < 4 else f'{starts[0]} to {starts[-1]}'
    section.facts['starts'] = f'{len(starts)}: {listed}'
    if run.val:
        section.tables.append(Table(['metric', 'last', 'best', f'best at {run.unit}'], list(_last_and_best(run))))
    return section


def _last_and_best(run: Run) -> Iterator[list[str]]:
    for name in metrics_of(run.val):
        last = [record[name] for record in run.val if name in record][-1]
        best = best_of(name, run.val)
        yield [name, format_value(last), *(format_value(best and best[key]) for key in (name, 'step'))]


def _curves(run: Run) -> Section:
    section = Section('Curves', look='plot')
    losses = [name for name in metrics_of(run.train) if 'loss' in name]
    losses.sort(key=lambda name: name != 'loss')  # the total first
    rates = ['lr'] if all(r.get('lr') == r.get('base_lr', r.get('lr')) for r in run.train) else ['base_lr', 'lr']
    panels = [
        (HistoryPanel('training loss', 'iteration', _series(run.train, losses)), True),
        (HistoryPanel('learning rate', 'iteration', _series(run.train, rates)), False),
        (HistoryPanel('gradient norm', 'iteration', _series(run.train, ['grad_norm'])), True),
    ]
    # A single value is not a curve. The tables show it.
    metrics = [name for name in metrics_of(run.val) if sum(name in record for record in run.val) > 1]
    panels += [(HistoryPanel(name, run.unit, _series(run.val, [name])), False) for name in metrics[:MAX_PANELS]]
    for panel, logarithmic in panels:
        if panel.curves:
            content = draw_history(panel, logarithmic).encode()
            section.pictures.append(Picture(f'{panel.title} over {panel.xlabel}', content, 'svg+xml'))
    if len(metrics) > MAX_PANELS:
        section.notes.append(f'{len(metrics) - MAX_PANELS} more metrics are in the table below, without a curve')
    if not section.pictures:
        section.notes.append('nothing was logged yet: no start has a vis_data/scalars.json with steps')
    return section


def _series(records: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, list[tuple[float, float]]]:
    series = {n: [(r['step'], r[n]) for r in records if _is_number(r.get(n))] for n in names}
    return {name: points for name, points in series.items() if points}


def _metrics(run: Run) -> Section:
    section = Section('Metrics')
    names = metrics_of(run.val)
    if names:
        rows = [[format_value(r['step']), *(format_value(r.get(name)) for name in names)] for r in run.val]
        section.tables.append(Table([run.unit, *names], rows))
    else:
        section.notes.append('no validation was logged')
    return section


def _predictions(run: Run, max_bytes: int) -> Section:
    section = Section('Predictions')
    folder = run.folder / 'predictions'
    files = [
        p for f in (folder, *reversed(run.starts)) for p in sorted(f.rglob('*')) if p.suffix.lower() in IMAGE_KINDS
    ]
    # tools/predict.py also writes maps of class indices next to its pictures.
    maps = {p.with_name(f'{p.stem}_labels.png') for p in files}
    files = [p for p in files if p not in maps]
    captions = _captions(folder / 'predictions.json', section.notes)
    left, damaged = 0, []
    for file in files:
        if len(section.pictures) == MAX_PICTURES or file.stat().st_size > max_bytes:
            left += 1
            continue
        name = str(file.relative_to(run.folder))
        words = f'{name}: {captions[file.stem]}' if folder in file.parents and file.stem in captions else name
        picture = read_picture(file, words, captioned=True)
        if picture is None:
            damaged.append(name)
            continue
        section.pictures.append(picture)
        max_bytes -= len(picture.content)
    if left:
        section.notes.append(
            f'pictures left out to limit the page (--max-mib; at most {MAX_PICTURES}): {left} of {len(files)}'
        )
    if damaged:
        section.notes.append(f'pictures that cannot be read: {len(damaged)}, such as {damaged[0]}')
    if not files:
        section.notes.append(
            'no pictures were found: neither from a visualization hook, nor in a folder `predictions` of '
            'tools/predict.py'
        )
    return section


def _captions(path: Path, notes: list[str]) -> dict[str, str]:
    """Describe the predictions of tools/predict.py, by the names of their pictures without suffix."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding='utf-8'))['predictions']
        return {Path(name).stem: caption(prediction) for name, prediction in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f'{path.name} cannot be read: {type(error).__name__}: {error}')
        return {}


def _adapter(run: Run) -> Section:
    section = Section('Adapter')
    path = run.folder / 'adapter.safetensors'
    try:
        content, tensors = read_adapter(path)
    except FileNotFoundError:
        section.notes.append(
            'there is no adapter.safetensors: training has not finished, or the method trains the backbone itself'
        )
        return section
    except AdapterFileError as error:
        section.notes.append(str(error))
        return section
    adapters = sum(value.numel() for name, value in tensors.items() if name.startswith('backbone.'))
    others = sum(value.numel() for value in tensors.values()) - adapters
    section.facts = {
        'file': f'{path.name}, {path.stat().st_size:,} bytes',
        'method': json.dumps(content['method']),
        'holds': f'{adapters:,} parameters of adapters, {others:,} values of neck and head',
        'adapted modules': _some(content['sites']),
        'base': f'fingerprint {content["base_fingerprint"]}, {len(content["base_parameters"])} tensors',
        'task': format_value(content.get('task')),
        'classes': _some(content.get('classes') or []),
        'written by': f'iconformer_mm {content.get("package_version")}',
    }
    if content.get('notes'):
        section.facts['notes'] = json.dumps(content['notes'])
    return section


def _some(names: Sequence[str]) -> str:
    shown = names if len(names) <= 12 else [*names[:12], '...']
    return f'{len(names)}: {", ".join(shown)}' if names else '–'


def _files(run: Run) -> Section:
    files = sorted(path for path in run.folder.iterdir() if path.suffix in ('.pth', '.safetensors'))
    section = Section('Files')
    if files:
        rows = [[path.name, format_value(path.stat().st_size)] for path in files]
        section.tables.append(Table(['file', 'bytes'], rows))
    else:
        section.notes.append('there are no checkpoints')
    return section
