"""Time training steps and inference of whole models with PEFT methods. Optionally measure peak memory.

    python benchmarks/step.py --out work_dirs/step
    python benchmarks/step.py --cases upernet-swin-b --methods full icon adaptformer --memory --rounds 0
    python benchmarks/step.py --cases swin-t --methods icon adaptformer --rounds 0 --growth 7

A step is forward, backward and an AdamW update of the trained parameters, without gradient clipping. Weights and
images are random. GFLOP are billions of floating-point operations per image, as torch counts them. Their ratio would be
the ratio of the times if nothing else took time.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from rich.progress import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from iconformer_mm import inject
from measure import (
    DTYPES,
    Panel,
    Table,
    build_model,
    interleave,
    make_parser,
    precision,
    prepare,
    progress_bar,
    rows_of,
    series_of,
    settings_of,
    write_results,
)

UNADAPTED = 'unadapted'
# The arguments of inject, by contestant.
METHODS: dict[str, dict[str, Any]] = {
    **{name: dict(method=name) for name in ('full', 'frozen', 'icon', 'icon-static', 'adaptformer', 'lora', 'mona')},
    'icon at the FFN': dict(method=dict(type='icon', sites=['ffn'])),  # the position of AdaptFormer's adapters
    'icon, with_cp': dict(method='icon', with_cp=True),
    'icon, bfloat16 base': dict(method='icon', frozen_dtype='bfloat16'),
}
DEFAULT_METHODS = ('full', 'frozen', 'icon', 'icon-static', 'adaptformer', 'lora', 'mona')
CLASSES = 5  # labels are drawn from these; every head has at least as many, and the label does not change the work
BOXES = 8  # per image
MEMORY_STEPS = 3
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model and its images.

    Attributes:
        config: Path of the config under ``configs/``.
        size: Height and width of the images in pixels.
        batch: Number of images per step.
        changes: Settings that override those of the config, with dotted keys.
    """

    config: str
    size: tuple[int, int]
    batch: int
    changes: Mapping[str, Any] = field(default_factory=dict)


_VIT = 'cifar100/vit-base-p16-mae_full_8xb128-100e_cifar100.py'
_SWIN = 'cifar100/swin-base-in21k_full_1xb128-100e_cifar100.py'
_VIT_S = {'model.backbone.arch': 'deit-small', 'model.neck.input_features': 384, 'model.head.in_channels': 384}
_VIT_G = {
    'model.backbone.arch': 'dinov2-giant',
    'model.backbone.patch_size': 14,
    'model.backbone.layer_scale_init_value': 1e-5,
    'model.neck.input_features': 1536,
    'model.head.in_channels': 1536,
}
_SWIN_T = {'model.backbone.arch': 'tiny', 'model.head.in_channels': 768}
CASES = {
    'vit-s': Case(_VIT, (224, 224), 8, _VIT_S),
    'swin-t': Case(_SWIN, (224, 224), 8, _SWIN_T),
    'vit-b': Case(_VIT, (224, 224), 8),
    'swin-b': Case(_SWIN, (224, 224), 8),
    'vit-g': Case(_VIT, (224, 224), 1, _VIT_G),
    'upernet-swin-b': Case('ade20k/swin-base-in22k_upernet_full_8xb2-160k_ade20k-512x512.py', (512, 512), 2),
    'upernet-swin-l': Case('ade20k/swin-large-in22k_upernet_full_8xb2-160k_ade20k-512x512.py', (512, 512), 2),
    # Untrained scores are below the detection threshold, so its mask heads do no work at inference.
    'cascade-swin-b': Case('coco/cascade-mask-rcnn_swin-b-in22k_fpn_full_1x_coco.py', (800, 1333), 1),
}
DEFAULT_CASES = ('vit-s', 'swin-t')
# Image sizes and images per step, to show how time grows with each.
GROWTH = [((224, 224), 1), ((448, 448), 1), ((224, 224), 4), ((224, 224), 16), ((800, 1333), 1)]  # sorted by pixels


def _labelled(size: tuple[int, int]) -> Any:
    """Make an MMPretrain data sample with a random label."""
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(int(torch.randint(CLASSES, ())))


def _segmented(size: tuple[int, int]) -> Any:
    """Make an MMSegmentation data sample with a random label map."""
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
    sample.gt_sem_seg = PixelData(data=torch.randint(CLASSES, (1, *size)))
    return sample


def _detected(size: tuple[int, int]) -> Any:
    """Make an MMDetection data sample with random boxes and masks that fill them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    lower = torch.rand(BOXES, 2) * 0.5
    upper = lower + 0.1 + torch.rand(BOXES, 2) * 0.4
    boxes = torch.cat((lower, upper), dim=1) * torch.tensor([width, height, width, height])
    masks = np.zeros((BOXES, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top : bottom + 1, left : right + 1] = 1
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0))
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.randint(CLASSES, (BOXES,)), masks=BitmapMasks(masks, height, width)
    )
    return sample


SAMPLES = {'mmpretrain': _labelled, 'mmseg': _segmented, 'mmdet': _detected}


def make_data(model: BaseModel, case: Case, batch: int, training: bool) -> dict[str, Any]:
    """Random images and their truth, through the model's own data preprocessor."""
    torch.manual_seed(0)
    make_sample = SAMPLES[DefaultScope.get_current_instance().scope_name]
    images = [torch.randint(256, (3, *case.size), dtype=torch.uint8) for _ in range(batch)]
    samples = [make_sample(case.size) for _ in range(batch)]
    return model.data_preprocessor(dict(inputs=images, data_samples=samples), training)


def build(case: Case, device: str) -> BaseModel:
    """The model of a case, with its random initialisation."""
    MMLogger.get_current_instance().setLevel('WARNING')  # of which it reports every tensor
    model = build_model(case.config, case.changes)
    model.init_weights()
    return model.to(device)


def adapt(model: BaseModel, method: str) -> BaseModel:
    """Put a method into a model, unless it is to stay as it is."""
    if method != UNADAPTED:
        device = next(model.parameters()).device
        inject(model, **METHODS[method])
        model.to(device)
    return model


def build_all(case: Case, methods: Sequence[str], device: str) -> dict[str, BaseModel]:
    """A model a method.

    Methods that do not change the backbone's parameters share them, so that several large models fit into memory.
    """
    base = build(case, device)
    shared = {id(parameter): parameter for parameter in base.backbone.parameters()}
    own = [m for m in methods if m == 'full' or 'frozen_dtype' in METHODS.get(m, {})]
    # Make all copies before a method freezes the shared parameters.
    copies = {m: copy.deepcopy(base, {} if m in own else dict(shared)) for m in methods}
    return {method: adapt(model, method) for method, model in copies.items()}


def inference(model: BaseModel, data: dict, dtype: torch.dtype) -> Callable[[], None]:
    """Prediction of a batch by a model in eval mode."""
    model.eval()
    device = data['inputs'].device.type

    def step() -> None:
        with torch.no_grad(), precision(device, dtype):
            model(**data, mode='predict')

    return step


def training(model: BaseModel, data: dict, dtype: torch.dtype) -> Callable[[], None]:
    """A training step of a model in train mode."""
    model.train()
    device = data['inputs'].device.type
    # The work of the heads depends on the weights. This rate is small enough to keep it the same.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-8)

    def step() -> None:
        with precision(device, dtype):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_case(
    name: str,
    case: Case,
    methods: Sequence[str],
    batch: int,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    progress: Progress,
    compiled: bool = False,
) -> tuple[list[dict], list[dict]]:
    """Measure a case, its backbones compiled or not. Return the rows of training steps and those of inference."""
    adapted = [method for method in methods if method != 'full']
    models = build_all(case, [*methods, UNADAPTED], device)
    # Measure inference first: untrained adapters add nothing, so all models have the same predictions to process.
    data = make_data(models[UNADAPTED], case, batch, training=False)
    steps = {method: inference(models[method], data, dtype) for method in [UNADAPTED, *adapted]}
    operations = count_operations(steps, batch)  # compiled code cannot be counted
    if compiled:
        for model in models.values():
            model.backbone.compile()
    times = interleave(steps, rounds, progress, f'{name}, inference', device, min_seconds=0)
    inferred = rows_of(times, {'to unadapted': UNADAPTED}, case=name)
    add_operations(inferred, operations, UNADAPTED)

    data = make_data(models.pop(UNADAPTED), case, batch, training=True)
    steps = {method: training(model, data, dtype) for method, model in models.items()}
    times = interleave(steps, rounds, progress, f'{name}, training', device, min_seconds=0)
    trained = rows_of(times, {'to full': 'full', 'to adaptformer': 'adaptformer'}, case=name)
    if not compiled:
        add_operations(trained, count_operations(steps, batch), 'full', 'adaptformer')
    for row in (*inferred, *trained):
        row['images/s'] = 1000 * batch / row['ms']
    return trained, inferred


def measure_growth(
    name: str, case: Case, methods: Sequence[str], device: str, dtype: torch.dtype, rounds: int, progress: Progress
) -> list[dict]:
    """Measure training steps with larger and with more images, all interleaved."""
    models = build_all(case, methods, device)
    steps: dict[str, Callable[[], None]] = {}
    for size, batch in GROWTH:
        data = make_data(models[methods[0]], replace(case, size=size), batch, training=True)
        steps |= {f'{method} {size} {batch}': training(model, data, dtype) for method, model in models.items()}
    times = interleave(steps, rounds, progress, f'{name}, growth', device, min_seconds=0)
    rows = []
    for size, batch in GROWTH:
        own = {method: times[f'{method} {size} {batch}'] for method in methods}
        height, width = size
        columns = {
            'case': name,
            'pixels': f'{height} x {width}',
            'images': batch,
            'pixels a step': batch * height * width,
        }
        rows += rows_of(own, {'to adaptformer': 'adaptformer'}, **columns)
    for row in rows:
        row['ns a pixel'] = 1e6 * row['ms'] / row['pixels a step']
    return rows


def count_operations(steps: Mapping[str, Callable[[], None]], batch: int) -> dict[str, float]:
    """Count billions of floating-point operations per image, of matrix products, convolutions and attention."""
    counts = {}
    for method, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[method] = counter.get_total_flops() / batch / 1e9
    return counts


def add_operations(rows: list[dict], counts: Mapping[str, float], *references: str) -> None:
    """Add the numbers of operations and their ratios to the rows of a case."""
    for row in rows:
        row['GFLOP'] = counts[row['contestant']]
        row |= {f'GFLOP to {r}': row['GFLOP'] / counts[r] for r in references if r in counts}


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors that were created while it was active.

    Memory that an operator allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator. Count the tensors that it returns, unless they share memory with another tensor."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.alive += size
                    self.peak = max(self.peak, self.alive)
                    finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def resident_peak() -> int:
    """Return the peak resident set of this process in bytes.

    ``ru_maxrss`` is not used: it starts with the memory that the parent process had before ``exec``.
    """
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def peak_memory(case: Case, method: str, batch: int, device: str, dtype: torch.dtype, threads: int) -> dict[str, float]:
    """Measure the peak memory of a model and its training steps. Call it in a separate process.

    Returns:
        ``peak (MiB)``: on CUDA, the memory that the allocator handed out; on the CPU, the resident set of the process
        with all libraries, including Numba if used. On the CPU also ``live tensors (MiB)``, see :class:`LiveTensors`.
    """
    torch.set_num_threads(threads)
    live = LiveTensors()
    with nullcontext() if device == 'cuda' else live:
        model = adapt(build(case, device), method)
        step = training(model, make_data(model, case, batch, training=True), dtype)
        for _ in range(MEMORY_STEPS):
            step()
    if device == 'cuda':
        return {'peak (MiB)': torch.cuda.max_memory_allocated() / MIB}
    return {'peak (MiB)': resident_peak() / MIB, 'live tensors (MiB)': live.peak / MIB}


def measure_memory(name: str, case: Case, methods: Sequence[str], *settings: Any, progress: Progress) -> list[dict]:
    """Measure the memory rows of a case: the peak of each method, in a fresh process each.

    Args:
        name: Name of the case.
        case: The case.
        methods: The methods.
        *settings: The other arguments of :func:`peak_memory`.
        progress: Display for the progress bar.

    Raises:
        RuntimeError: A process died, for example because memory ran out.
    """
    rows: list[dict[str, Any]] = []
    for method in progress.track(methods, description=f'{name}, memory'):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            try:
                peaks = pool.submit(peak_memory, case, method, *settings).result()
            except BrokenProcessPool:
                raise RuntimeError(f'{name}, {method}: the process died, possibly because memory ran out') from None
        rows.append(dict(case=name, contestant=method, **peaks))
    for column in ('peak (MiB)', 'live tensors (MiB)'):
        found = {row['contestant']: row.get(column) for row in rows}
        for row in rows:
            for reference in ('full', 'adaptformer'):
                if found.get(reference):
                    row[f'{column.removesuffix(" (MiB)")} to {reference}'] = row[column] / found[reference]
    return rows


def write(
    args: argparse.Namespace, trained: list[dict], inferred: list[dict], memory: list[dict], growth: list[dict]
) -> None:
    """Write tables and plots of the rows measured so far."""
    tables, panels = [], []
    for title, rows, references in (
        ('training step', trained, ('to full', 'to adaptformer')),
        ('inference', inferred, ('to unadapted',)),
    ):
        if rows:
            columns = {'case': '', 'contestant': '', 'ms': '.1f', **dict.fromkeys(references, '.3f'), 'images/s': '.2f'}
            columns |= {'GFLOP': '.2f', **{f'GFLOP {reference}': '.3f' for reference in references}}
            tables.append(Table(title, columns, rows))
            panels += [Panel(title, series_of(rows, 'case', r), f'time {r}', line=1) for r in references]
    if memory:
        columns = {'case': '', 'contestant': ''}
        for quantity in ('peak', 'live tensors'):
            columns[f'{quantity} (MiB)'] = ',.0f'
            columns |= {f'{quantity} to {reference}': '.3f' for reference in ('full', 'adaptformer')}
        tables.append(Table('memory of a training step', columns, memory))
        panels.append(Panel('memory of a training step', series_of(memory, 'case', 'peak (MiB)'), 'MiB'))
    if growth:
        columns = {'case': '', 'contestant': '', 'pixels': '', 'images': '', 'ms': '.1f', 'ns a pixel': '.1f'}
        tables.append(Table('growth', {**columns, 'to adaptformer': '.3f'}, growth))
        series = series_of(growth, 'pixels a step', 'ns a pixel')
        panels.append(Panel('growth of a training step', series, 'ns a pixel', xlabel='pixels a step', log='x'))
    write_results(args.out, tables, settings_of(args), [panel for panel in panels if panel.series])


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/step', [*CASES], DEFAULT_CASES)
    parser.add_argument(
        '--methods', nargs='+', choices=METHODS, default=DEFAULT_METHODS, metavar='METHOD', help=', '.join(METHODS)
    )
    parser.add_argument('--batch', type=int, help="images per step (default: the case's own number)")
    parser.add_argument('--memory', action='store_true', help='also measure peak memory; with --rounds 0 only that')
    parser.add_argument('--compile', action='store_true', help='compile the backbones by torch.compile')
    parser.add_argument(
        '--growth', type=int, metavar='ROUNDS', default=0, help='also time steps with larger and with more images'
    )
    args = parser.parse_args()
    if args.batch is not None and args.batch < 1:
        parser.error(f'--batch must be at least 1, got {args.batch}')
    prepare(args, min_rounds=0 if args.memory or args.growth else 1)
    dtype = DTYPES[args.dtype]
    trained, inferred, memory, growth = [], [], [], []
    with progress_bar() as progress:
        for name in args.cases:
            case = CASES[name]
            batch = args.batch or case.batch
            settings = (batch, args.device, dtype)
            if args.memory:  # before the models for timing occupy memory
                memory += measure_memory(name, case, args.methods, *settings, args.threads, progress=progress)
            if args.rounds:
                rows = measure_case(name, case, args.methods, *settings, args.rounds, progress, args.compile)
                trained += rows[0]
                inferred += rows[1]
            if args.growth:
                growth += measure_growth(name, case, args.methods, args.device, dtype, args.growth, progress)
            write(args, trained, inferred, memory, growth)  # after each case, because one may take an hour


if __name__ == '__main__':
    main()
