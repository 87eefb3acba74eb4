"""What becomes of the stock configs of MMPretrain, MMDetection and MMSegmentation: adapted, refused, or crashed.

Each distinct backbone is built once, without its weights, with at most two blocks a stage where its config allows
that, and adapted. The largest are built only. All others also run on one image, adapted and not, and the outputs
have to be equal to the last bit. Of a class without attention one backbone stands for all.

    python benchmarks/stock_configs.py
    python benchmarks/stock_configs.py --library mmseg --only segformer --out stock.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import re
import sys
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import iconformer_mm  # noqa: F401 - registers what configs name
from iconformer_mm import inject
from iconformer_mm.tuning.sites import find_sites

LIBRARIES = ('mmpretrain', 'mmdet', 'mmseg')
# Where models keep their encoder of images; the first that is there counts.
PLACES = ('backbone', 'image_encoder', 'vision_encoder', 'visual_encoder', 'vision_backbone', 'visual', 'encoder')
# The first that a backbone takes says how far it is adapted.
METHODS = ('icon', 'adaptformer', 'lora', 'bitfit')
ATTENTION = re.compile(r'(attention|attn|msa)$|transformer', re.IGNORECASE)
# Beyond this many parameters a backbone is not run.
LIMIT = 60_000_000


def image_encoder(model: Any) -> Any:
    """The config of a model's encoder of images, None where there is none."""
    if not isinstance(model, dict):
        return None
    for place in PLACES:
        if isinstance(model.get(place), dict):
            inner = model[place]
            return image_encoder(inner) or inner if 'backbone' in inner else inner
    inner = model.get('detector', model.get('model'))
    return image_encoder(inner)


def narrowed(cfg: dict, library: str) -> dict:
    """The config of a backbone of at most two blocks a stage; the config itself where it is not clear how."""
    cfg = copy.deepcopy(cfg)
    kind = cfg['type']
    cls = MODELS.get(kind if '.' in kind else f'{library}.{kind}') if isinstance(kind, str) else kind
    zoo = getattr(cls, 'arch_zoo', getattr(cls, 'arch_settings', {}))
    arch = cfg.get('arch')
    settings = copy.deepcopy(zoo.get(arch.lower())) if isinstance(arch, str) else copy.deepcopy(arch)
    plain = False
    for values in (settings, cfg):
        if not isinstance(values, dict) or 'downscale_indices' in values:
            continue
        for key in ('num_layers', 'depth', 'depths', 'layers'):
            if isinstance(values.get(key), int):
                values[key], plain = 2, True
            elif isinstance(values.get(key), (list, tuple)):
                values[key] = [min(number, 2) for number in values[key]]
        if 'global_attn_indexes' in values:
            values['global_attn_indexes'] = [1]
    if isinstance(settings, dict):
        cfg['arch'] = settings
    if plain:
        cfg.pop('out_indices', None)
    return cfg


def build(cfg: dict, library: str) -> nn.Module:
    """A backbone without its weights."""
    cfg = copy.deepcopy(cfg)
    for key in ('init_cfg', 'pretrained', 'checkpoint'):
        cfg.pop(key, None)
    if 'TIMM' in str(cfg.get('type')):
        cfg['pretrained'] = False
    init_default_scope(library)
    model = MODELS.build(cfg)
    model.eval()
    return model


def has_attention(model: nn.Module) -> bool:
    """Whether there is attention or a known block in a model."""
    return bool(find_sites(model)) or any(ATTENTION.search(type(m).__name__) for m in model.modules())


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of a nested output."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [t for value in values for t in tensors(value)]


def run(model: nn.Module, cfg: dict) -> list[Tensor]:
    """Outputs for one image."""
    size = cfg.get('img_size', 224)
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    image = torch.rand(1, cfg.get('in_channels', 3), *size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # of masks
    with torch.no_grad():
        return tensors(model(image))


def classify(cfg: dict, library: str) -> tuple[str, str]:
    """What becomes of a backbone, with a note."""
    with contextlib.suppress(Exception), torch.device('meta'):  # where this does, it takes no time
        if not has_attention(build(cfg, library)):
            return 'convolutional', ''
    model = None
    with contextlib.suppress(Exception):
        small = narrowed(cfg, library)
        made = build(small, library)
        run(made, small)
        model, cfg = made, small
    try:
        model = model or build(cfg, library)
    except Exception as error:
        return 'not built', f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:120]}'
    model.requires_grad_(False)
    if not has_attention(model):
        return 'convolutional', ''
    before, how = None, 'built only'
    if sum(p.numel() for p in model.parameters()) <= LIMIT:
        try:
            before, how = run(model, cfg), 'run'
        except Exception as error:  # pre-training asks for masks, and the like
            how = f'built only, since it does not run by itself: {type(error).__name__}'
    reasons = []
    # As in a model: pre-training that drops tokens is refused there, and not where the backbone stands alone.
    holder = nn.Module()
    holder.backbone = model
    for method in METHODS:
        try:
            inject(holder, method)
        except ValueError as error:
            reasons.append(str(error).splitlines()[0])
            continue
        except Exception as error:
            return 'crashed', f'{method}: {type(error).__name__}: {error}'
        model.eval()
        try:
            after = None if before is None else run(model, cfg)
        except Exception as error:
            return 'crashed', f'{method}: {type(error).__name__}: {error}'
        if before is not None and not all(torch.equal(a, b) for a, b in zip(after or [], before, strict=True)):
            return 'crashed', f'{method}: outputs are others than before'
        if method == 'bitfit':
            return 'refused', reasons[0]
        return 'adapted', how if method == METHODS[0] else f'{how}; by {method}, not by icon: {reasons[0]}'
    return 'refused', reasons[0]


def main() -> int:
    """Classify all; 1 if anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--library', choices=LIBRARIES, action='append', help='only these libraries')
    parser.add_argument('--only', default='', help='only files with this in their path')
    parser.add_argument('--out', type=Path, help='write all results to a JSON file')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    known: dict[str, tuple[str, str]] = {}
    results: dict[str, tuple[str, str]] = {}
    without: dict[str, tuple[str, str]] = {}
    for library in args.library or LIBRARIES:
        spec = find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            print(f'{library} is not installed')
            continue
        root = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
        for path in sorted(root.rglob('*.py')):
            name = f'{library}/{path.relative_to(root).as_posix()}'
            if '_base_' in path.parts or args.only not in name:
                continue
            try:
                cfg = image_encoder(Config.fromfile(path, lazy_import=False).get('model'))
            except Exception as error:
                results[name] = 'not read', f'{type(error).__name__}: {str(error)[:100]}'
                continue
            if cfg is None or 'type' not in cfg:  # a config that is made to be completed by another
                results[name] = 'no image encoder', ''
                continue
            kind = f'{library} {cfg["type"]}'
            if kind in without:
                results[name] = without[kind]
                continue
            key = library + json.dumps(cfg, sort_keys=True, default=str)
            if key not in known:
                known[key] = classify(cfg, library)
                if known[key][0] == 'convolutional' and 'TIMM' not in kind:
                    without[kind] = known[key]
                gc.collect()
                print(f'{known[key][0]:<14} {name}: {known[key][1]}', flush=True)
            results[name] = known[key]
    counts = Counter(result for result, _ in results.values())
    distinct = Counter(result for result, _ in known.values())
    print()
    for result in counts:
        print(f'{result}: {counts[result]} files, {distinct[result]} distinct backbones')
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1), encoding='utf-8')
    return int(counts['crashed'] > 0)


if __name__ == '__main__':
    sys.exit(main())
