"""Compare LoRA here with LoRA in Hugging Face's peft and in MMPretrain's ``LoRAModel``, on ViT-B.

    python benchmarks/lora.py --out work_dirs/lora
    python benchmarks/lora.py --rounds 3 --batch 4 --width small

peft is no dependency: install it beside the package, or put it on PYTHONPATH. Contestants whose library is missing are
left out by name. Every contestant adapts the same maps with the same rank, so the number of trained parameters is the
same. peft adapts timm's ViT, ``LoRAModel`` MMPretrain's, and the package both.

A step is forward, backward and an AdamW update, without a data loader. Loading is from a base in memory to a model that
computes with the file's adapter. What the package does beside reading is included: it verifies that the base is the one
that the adapter was trained on. The peak is that of live tensors, see ``step.LiveTensors``, each contestant in a fresh
process. Before anything is timed, the file of each library is converted, and the package's outputs with it have to be
those of the library.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn

from iconformer_mm import inject, load_adapter, save_adapter
from iconformer_mm.checkpoint.foreign_adapters import inject_foreign, read_hf_lora, read_mmpretrain_lora
from measure import (
    Panel,
    Table,
    interleave,
    make_parser,
    prepare,
    progress_bar,
    ratio,
    rows_of,
    series_of,
    settings_of,
)
from measure import write_results as write_tables
from step import MIB, LiveTensors

RANK, ALPHA = 8, 16
CLASSES = 100
STEPS = 2  # the optimizer's state appears in the first
# Width, depth, heads and width of the FFN.
WIDTHS = {'base': (768, 12, 12, 3072), 'small': (192, 2, 3, 768)}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Contestant:
    """One implementation on one library's ViT.

    Attributes:
        library: ``timm`` or ``mmpretrain``, whose ViT is adapted.
        adapt: Adapts a base and returns what computes.
        save: Writes the adapter of what ``adapt`` returned into a folder, and returns the file.
        load: Adapts a base from that file.
        needs: A package beside those that are always there. Defaults to none.
    """

    library: str
    adapt: Callable[[nn.Module], nn.Module]
    save: Callable[[nn.Module, Path], Path]
    load: Callable[[nn.Module, Path], nn.Module]
    needs: str | None = None


def build_base(library: str, width: str) -> nn.Module:
    """Build a ViT of 16-pixel patches that returns the class token, with random weights. The same one each time."""
    dims, depth, heads, hidden = WIDTHS[width]
    torch.manual_seed(0)
    if library == 'timm':
        from timm.models import VisionTransformer

        return VisionTransformer(
            embed_dim=dims, depth=depth, num_heads=heads, mlp_ratio=hidden / dims, num_classes=0, global_pool='token'
        )
    init_default_scope('mmpretrain')
    arch = dict(embed_dims=dims, num_layers=depth, num_heads=heads, feedforward_channels=hidden)
    model = MODELS.build(dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=224, patch_size=16))
    model.init_weights()
    return model


class Classifier(nn.Module):
    """A backbone with a linear head, which is trained, too."""

    def __init__(self, backbone: nn.Module, dims: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(dims, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (B, CLASSES)."""
        return self.head(features(self.backbone, images))


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the class tokens of either library's ViT, shape (B, d)."""
    out = backbone(images)
    return out[-1] if isinstance(out, (tuple, list)) else out


def _inject(base: nn.Module) -> nn.Module:
    inject(base, dict(type='lora', rank=RANK, alpha=ALPHA, targets=['o', 'fc1', 'fc2']))
    return base


def _save(model: nn.Module, folder: Path) -> Path:
    path = folder / 'adapter.safetensors'
    save_adapter(model, path)
    return path


def _load(base: nn.Module, path: Path) -> nn.Module:
    load_adapter(base, path)
    return base


def _adapt_by_peft(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=['attn.proj', 'mlp.fc1', 'mlp.fc2'])
    )


def _save_by_peft(model: Any, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder / 'adapter_model.safetensors'


def _load_by_peft(base: nn.Module, path: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(path.parent))


_TARGETS = ('attn.proj', 'ffn.layers.0.0', 'ffn.layers.1')


def _adapt_by_mmpretrain(base: Any) -> nn.Module:
    from mmpretrain.models import LoRAModel

    def given() -> nn.Module:
        return base  # LoRAModel wants a config, so it gets one of a function

    positions = base.pos_embed.detach().clone()
    model = LoRAModel(dict(type=given), alpha=ALPHA, rank=RANK, targets=[dict(type=name) for name in _TARGETS])
    with torch.no_grad():
        base.pos_embed.copy_(positions)  # LoRAModel has them drawn anew
    return model


def _save_by_mmpretrain(model: nn.Module, folder: Path) -> Path:
    path = folder / 'lora.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def _load_by_mmpretrain(base: nn.Module, path: Path) -> nn.Module:
    model = _adapt_by_mmpretrain(base)
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'], strict=False)
    return model


def _train_all(base: nn.Module) -> nn.Module:
    return base


OURS, PEFT, LORA_MODEL = 'iconformer_mm', 'peft', 'LoRAModel'
FULL = 'full fine-tuning'
CONTESTANTS: dict[str, Contestant] = {
    f'{OURS} on timm': Contestant('timm', _inject, _save, _load),
    f'{PEFT} on timm': Contestant('timm', _adapt_by_peft, _save_by_peft, _load_by_peft, 'peft'),
    f'{OURS} on MMPretrain': Contestant('mmpretrain', _inject, _save, _load, 'mmpretrain'),
    f'{LORA_MODEL} on MMPretrain': Contestant(
        'mmpretrain', _adapt_by_mmpretrain, _save_by_mmpretrain, _load_by_mmpretrain, 'mmpretrain'
    ),
}
LIBRARIES = {'timm': 'timm', 'mmpretrain': 'MMPretrain'}


def make_data(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw images of shape (batch, 3, 224, 224) and labels of shape (batch,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 224, 224, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def make_step(backbone: nn.Module, width: str, batch: int, device: str) -> Callable[[], None]:
    """Return a training step of a classifier on a backbone."""
    model = Classifier(backbone, WIDTHS[width][0]).to(device).train()
    images, labels = make_data(batch, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapt_of(name: str) -> tuple[str, Callable[[nn.Module], nn.Module]]:
    """Return the library of a contestant, full fine-tuning included, and how it adapts a base."""
    if name.startswith(FULL):
        return next(key for key, title in LIBRARIES.items() if name.endswith(title)), _train_all
    return CONTESTANTS[name].library, CONTESTANTS[name].adapt


def measure_peak(name: str, width: str, batch: int, threads: int) -> float:
    """Measure the peak of live tensors in training steps, in MiB. Call it in a separate process."""
    quiet()
    torch.set_num_threads(threads)
    live = LiveTensors()
    with live:
        library, adapt = adapt_of(name)
        step = make_step(adapt(build_base(library, width)), width, batch, 'cpu')
        for _ in range(STEPS):
            step()
    return live.peak / MIB


def measure_peaks(args: argparse.Namespace, names: list[str], progress: Progress) -> dict[str, float]:
    """Measure the peak of each contestant, in a fresh process each."""
    peaks = {}
    for name in progress.track(names, description='memory'):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            peaks[name] = pool.submit(measure_peak, name, args.width, args.batch, args.threads).result()
    return peaks


def quiet() -> None:
    """LoRAModel reports every layer."""
    MMLogger.get_current_instance().setLevel('ERROR')


def give_values(model: nn.Module) -> None:
    """Set all trained parameters to random values, as if they had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)


def check_equal(width: str, names: list[str], folder: Path) -> dict[str, float]:
    """Convert the files of the other libraries, and compare outputs.

    Returns:
        The largest difference of the outputs, to the largest output, by contestant.

    Raises:
        SystemExit: A difference is above the tolerance.
    """
    images, _ = make_data(2, 'cpu')
    differences = {}
    for name in names:
        if name.startswith(OURS):
            continue
        contestant = CONTESTANTS[name]
        theirs = contestant.adapt(build_base(contestant.library, width))
        give_values(theirs)
        own = folder / name.replace(' ', '_')
        own.mkdir()
        path = contestant.save(theirs, own)
        ours = build_base(contestant.library, width)
        if contestant.needs == 'peft':
            config = json.loads((own / 'adapter_config.json').read_text(encoding='utf-8'))
            foreign = read_hf_lora(load_file(path), config)
        else:
            state = {f'backbone.{n}': value for n, value in theirs.state_dict().items()}
            foreign = read_mmpretrain_lora(state, ours, dict(alpha=ALPHA, targets=[dict(type=n) for n in _TARGETS]))
        inject_foreign(ours, foreign)
        with torch.no_grad():
            expected, found = (features(model.eval(), images) for model in (theirs, ours))
        differences[name] = float((expected - found).abs().max() / expected.abs().max())
        if not differences[name] <= TOLERANCE:
            raise SystemExit(f'{name}: outputs differ by {differences[name]:.1e} of the largest; nothing is timed')
    return differences


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/lora', [*CONTESTANTS], [*CONTESTANTS])
    parser.add_argument('--batch', type=int, default=8, help='images per step (8)')
    parser.add_argument(
        '--width', choices=WIDTHS, default='base', help='ViT-B, or a small one to try the script (base)'
    )
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f'--batch must be at least 1, got {args.batch}')
    if args.dtype != 'float32':
        parser.error('--dtype: this comparison is made in float32')
    prepare(args, min_rounds=1)
    quiet()
    names = [name for name in args.cases if not missing(CONTESTANTS[name])]
    for name in set(args.cases) - set(names):
        print(f'{name}: left out, since {missing(CONTESTANTS[name])} is not installed')
    if not names:
        raise SystemExit('no contestant is left')
    write_results(args, measure(args, names))


def missing(contestant: Contestant) -> str | None:
    """Return the package that a contestant needs and that is not installed."""
    return contestant.needs if contestant.needs and find_spec(contestant.needs) is None else None


def measure(args: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Measure all contestants. Return a row of each."""
    libraries = dict.fromkeys(CONTESTANTS[name].library for name in names)
    everyone = [f'{FULL} of {LIBRARIES[library]}' for library in libraries] + names
    with progress_bar() as progress, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        differences = check_equal(args.width, names, folder)
        peaks = measure_peaks(args, everyone, progress) if args.device == 'cpu' else {}
        steps: dict[str, Callable[[], None]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name in everyone:
            library, adapt = adapt_of(name)
            model = adapt(build_base(library, args.width))
            facts[name] = dict(trained=sum(p.numel() for p in model.parameters() if p.requires_grad))
            facts[name]['peak (MiB)'] = peaks.get(name)
            steps[name] = make_step(model, args.width, args.batch, args.device)
            if name in CONTESTANTS:
                own = folder / f'timed_{len(facts)}'
                own.mkdir()
                path = CONTESTANTS[name].save(model, own)
                seconds = [load_seconds(name, args.width, path) for _ in range(args.rounds)]
                facts[name] |= {'file (kB)': path.stat().st_size / 1000, 'load (ms)': 1000 * median(seconds)}
        times = interleave(steps, args.rounds, progress, 'training', args.device, min_seconds=0)
    rows = []
    for row in rows_of(times, {}):
        name = row['contestant']
        reference = f'{FULL} of {LIBRARIES[adapt_of(name)[0]]}'
        row |= {**facts[name], 'to full': ratio(times[name], times[reference]), 'difference': differences.get(name)}
        rows.append(row)
    return rows


def load_seconds(name: str, width: str, path: Path) -> float:
    """Time the loading of a file into a base that nothing has touched."""
    base = build_base(CONTESTANTS[name].library, width)
    start = time.perf_counter()
    CONTESTANTS[name].load(base, path)
    return time.perf_counter() - start


def write_results(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table and a plot of it."""
    columns = {'contestant': '', 'trained': ',d', 'ms': '.0f', 'to full': '.3f', 'peak (MiB)': ',.0f'}
    columns |= {'file (kB)': ',.0f', 'load (ms)': '.0f', 'difference': '.1e'}
    rows = [dict(row, case=f'ViT {args.width}') for row in rows]
    versions: dict[str, Any] = {'rank': RANK, 'maps': 'o, fc1, fc2', 'batch': args.batch}
    if find_spec('peft'):
        versions['peft'] = version('peft')
    panels = [Panel('training step', series_of(rows, 'case', 'to full'), 'time to full fine-tuning', line=1)]
    write_tables(args.out, [Table('LoRA', columns, rows)], {**settings_of(args), **versions}, panels)


if __name__ == '__main__':
    main()
