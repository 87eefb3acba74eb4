"""Finding a model's backbones, the copies that follow them, and classifiers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.model import BaseAveragedModel, BaseModel, BaseTTAModel, is_model_wrapper
from torch import nn

from .families import class_path, family_of, why_refused

# Attributes that hold an image encoder of any kind.
_VISION = re.compile(
    r'(?!(text|lang|language|multimodal|mm)_)'
    r'(backbone|vit|visual|(image|img|vision|visual)_(encoder|backbone|model|tower)|[a-z0-9]+_backbone)$'
)
# Attributes whose modules may hold Transformer blocks but do not encode images.
_BESIDE = re.compile(r'head|neck|decoder|text|lang|loss|preprocessor|tokenizer|adapter')
# Attributes that hold a model whose weights are averages of a trained model's weights.
_FOLLOWER = re.compile(r'(teacher|target_net(work)?|(momentum|ema|key)_.+|.+_(m|k|ema|momentum)|ema)$')
# Attributes that hold a model that provides fixed targets.
_FIXED = re.compile(r'(teacher_.+|.+_teacher|target_generator|.*discriminator.*)$')
_CLASSIFIERS = ('head', 'head_dist', 'heads', 'fc', 'classifier')
# Modules that a host registers in a part of the model while it trains, though they are another part's, by class.
_BORROWED = {'mmdet.models.layers.transformer.ddq_detr_layers.DDQTransformerDecoder': ('aux_reg_branches',)}
_LORA_MODEL = 'mmpretrain.models.peft.lora.LoRAModel'


@dataclass
class Found:
    """Result of a search in a model.

    Attributes:
        learning: Backbones by path.
        followers: Root modules whose weights follow others by averaging, by path.
        blocks: Names of all known blocks in the model.
    """

    learning: dict[str, nn.Module] = field(default_factory=dict)
    followers: dict[str, nn.Module] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside distributed, averaging and test-time-augmentation wrappers."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, (BaseTTAModel, BaseAveragedModel)):
        inner = inner.module
    return inner


def join(path: str, name: str) -> str:
    """Join a path and a name. Either may be empty."""
    return f'{path}.{name}' if path and name else path or name


def is_below(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a name is one of the prefixes or lies below one of them."""
    return any(name == prefix or name.startswith(f'{prefix}.') for prefix in prefixes)


def near(word: str, words: Iterable[str]) -> str:
    """Return a hint for errors with the known names closest to a word; empty if there are none."""
    close = difflib.get_close_matches(word, list(words), n=3)
    return f' (did you mean {" or ".join(map(repr, close))}?)' if close else ''


def _is_container(module: nn.Module) -> bool:
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return any(isinstance(module, c) and type(module).forward is c.forward for c in containers)


def _is_stem(name: str) -> bool:
    return name.startswith('patch_embed')


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _Search:
    """Walks down a model to the modules that hold the blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.found = Found()
        self.blocks = self.found.blocks
        self.blocks += [name for name, module in model.named_modules() if family_of(module) is not None]
        self.visit(model, '')

    def has_blocks(self, path: str) -> bool:
        return any(is_below(block, [path]) for block in self.blocks) if path else bool(self.blocks)

    def visit(self, module: nn.Module, path: str) -> None:
        if self.has_blocks(path) and self._holds(module, path):
            self.found.learning[path] = module
            return
        for name, child in module.named_children():
            where = join(path, name)
            if _FIXED.match(name) or not _has_parameters(child):
                continue
            if isinstance(child, BaseAveragedModel) or self._follows(name, module):
                self.found.followers[where] = child
            elif _BESIDE.search(name):
                continue
            elif _VISION.match(name) and not _is_container(child) and not self._named_inside(child):
                self.found.learning[where] = child
            elif self.has_blocks(where) or self._named_inside(child):
                self.visit(child, where)
            elif _VISION.match(name):
                # Several modules in sequence: the first is the backbone, the others are a neck.
                first = next(n for n, c in child.named_children() if _has_parameters(c))
                self.found.learning[join(where, first)] = child.get_submodule(first)

    def _follows(self, name: str, parent: nn.Module) -> bool:
        if not _FOLLOWER.match(name):
            return False
        # Many names end in _m or _k. A momentum copy has its original as a sibling.
        original = re.sub(r'_(m|k)$', '', name)
        return original == name or hasattr(parent, original) or hasattr(parent, f'{original}_q')

    def _named_inside(self, module: nn.Module) -> bool:
        for name, _ in module.named_modules():
            *parents, last = name.split('.')
            if _VISION.match(last) and not any(_BESIDE.search(p) or _FIXED.match(p) for p in parents):
                return True
        return False

    def _complete(self, module: nn.Module, path: str, by_convolution: bool) -> bool:
        """Whether a module has both blocks and a stem before them."""
        for name, child in module.named_modules():
            *parents, last = name.split('.')
            inside = join(path, '.'.join(parents))
            if _is_stem(last) and self.has_blocks(inside):
                return True
            stem = by_convolution and isinstance(child, nn.Conv2d) and child.in_channels <= 4
            if stem and not is_below(join(path, name), self.blocks):
                return True
        return False

    def _holds(self, module: nn.Module, path: str) -> bool:
        """Whether a module with blocks is their backbone, not a model around the backbone."""
        if self._named_inside(module):
            return False
        children = dict(module.named_children())
        if any(map(_is_stem, children)):
            return True
        inner = {n: c for n, c in children.items() if self.has_blocks(join(path, n))}
        stages = {re.sub(r'\d+', '', name) for name in inner}
        if len(inner) > 1 and len(stages) == 1 and not _is_container(module):
            return not all(self._complete(c, join(path, n), False) for n, c in inner.items())
        for name, child in inner.items():
            container = _is_container(child) or family_of(child) is not None
            if self._complete(child, join(path, name), by_convolution=not container):
                return False
        return not _is_container(module)


def search(model: nn.Module) -> Found:
    """Find the backbones of an unwrapped model by structure.

    A backbone holds known blocks or has the name of a backbone. Heads, necks, decoders and text encoders are not
    backbones. Modules that follow others by averaging are listed separately. A module that only wraps a single
    backbone counts as that backbone.

    Args:
        model: The model.
    """
    found = _Search(model).found
    if len(found.learning) == 1 and not isinstance(model, BaseModel):
        ((path, backbone),) = found.learning.items()
        if not _VISION.match(path.rpartition('.')[2]):
            inside = {id(p) for p in backbone.parameters()}
            if all(id(p) in inside for p in model.parameters()):
                found.learning = {'': model}
    return found


def _describe(learning: dict[str, nn.Module]) -> str:
    return ', '.join(
        f"'{path}' ({type(module).__name__}, {sum(family_of(m) is not None for m in module.modules())} known blocks)"
        for path, module in learning.items()
    )


def find_backbones(model: nn.Module, paths: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the backbones to adapt in an unwrapped model.

    Args:
        model: The model.
        paths: Paths of the backbones in the model, ``''`` for the model itself. Defaults to None, the only backbone
            found by structure.

    Returns:
        The backbones by path.

    Raises:
        ValueError: There are several backbones and no paths, a path is wrong, or a model with other parts has no
            known backbone.
    """
    found = search(model)
    if paths is not None:
        return _take(model, paths, found)
    learning = found.learning
    trained = {n: m for n, m in learning.items() if any(p.requires_grad for p in m.parameters())}
    if len(learning) > 1 and len(trained) == 1 and not _same_make(*learning.values()):
        learning = trained  # the others are frozen
    if len(learning) > 1:
        raise ValueError(
            f'{type(model).__name__} has several backbones, {_describe(learning)}: say which to adapt, '
            f'e.g. backbones=[{next(iter(learning))!r}]. The others are then trained as they are'
        )
    if learning:
        return dict(learning)
    if isinstance(model, BaseModel) or found.followers or found.blocks:
        for path, reason in why_refused(model).items():
            raise ValueError(f'{type(model).__name__} has blocks ({path}) that take no adapters: {reason}')
        children = ', '.join(f"'{n}' ({type(m).__name__})" for n, m in model.named_children())
        raise ValueError(
            f'no backbone is found in {type(model).__name__}, which has {children}: say what to adapt with '
            "backbones=['path']"
        )
    return {'': model}


def _same_make(*modules: nn.Module) -> bool:
    first, *others = ([type(m), *((n, p.shape) for n, p in m.named_parameters())] for m in modules)
    return any(other == first for other in others)


def _take(model: nn.Module, paths: Sequence[str], found: Found) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    taken: dict[str, nn.Module] = {}
    for path in paths:
        if path not in modules:
            raise ValueError(
                f'backbones: {type(model).__name__} has no module {path!r}{near(path, modules)}; found by structure: '
                f'{_describe(found.learning) or "none"}'
            )
        if is_below(path, found.followers):
            raise ValueError(
                f'backbones: {path!r} follows another module by averaging and is not trained itself; name one that '
                f'is trained: {_describe(found.learning) or "none was found"}'
            )
        if any(is_below(path, [other]) or is_below(other, [path]) or '' in (path, other) for other in taken):
            raise ValueError(f'backbones: {path!r} is given twice or is nested with another of {list(paths)}')
        taken[path] = modules[path]
    return taken


def find_copies(model: nn.Module, backbones: dict[str, nn.Module]) -> dict[str, str]:
    """Find the copies that follow backbones by averaging.

    Args:
        model: The model.
        backbones: Its backbones by path.

    Returns:
        The paths of the copies, with the paths of their originals.

    Raises:
        ValueError: It is not clear which of several originals a copy follows.
    """
    copies: dict[str, str] = {}
    own = {id(m) for m in backbones.values()}
    for root, follower in search(model).followers.items():
        for name, module in follower.named_modules():
            path = join(root, name)
            originals = [p for p, m in backbones.items() if _same_make(m, module)]
            if id(module) in own or not originals or is_below(path, copies):
                continue
            if len(originals) > 1:
                named = [p for p in originals if path.endswith(p.rpartition('.')[2]) or path.startswith(p)]
                if len(named) != 1:
                    raise ValueError(
                        f"it is not clear which of {', '.join(map(repr, originals))} '{path}' follows; adapt only one, "
                        'with backbones=[...]'
                    )
                originals = named
            copies[path] = originals[0]
    return copies


def averaged_models(model: nn.Module) -> list[BaseAveragedModel]:
    """List all of MMEngine's averaging models inside a model."""
    return [m for m in model.modules() if isinstance(m, BaseAveragedModel)]


def find_classifiers(backbone: nn.Module) -> list[str]:
    """List the names of the classifiers in a backbone: heads with parameters in the module that holds the blocks."""
    if type(backbone).__name__.endswith('Head'):
        return []  # a head that is adapted itself
    inner = search(backbone).learning
    path = ''
    if list(inner) == ['']:
        path = _innermost(backbone)
    holder = backbone.get_submodule(path)
    given: Any = getattr(holder, 'get_classifier', list)()
    given = [m for m in (given if isinstance(given, (tuple, list)) else [given]) if isinstance(m, nn.Module)]
    heads = [n for n, m in holder.named_children() if n in _CLASSIFIERS and _has_parameters(m)]
    # If a head has several layers, its classifier is inside the head.
    heads += [
        n
        for n, m in holder.named_modules()
        if n and any(m is g for g in given) and _has_parameters(m) and not is_below(n, heads)
    ]
    blocks = [n for n, m in holder.named_modules() if family_of(m) is not None]
    return [join(path, head) for head in heads if not any(is_below(block, [head]) for block in blocks)]


def borrowed_modules(tower: nn.Module) -> list[str]:
    """List the names of modules that lie in a tower and are another part's, whether they are there yet or not.

    The decoder of DDQ refers to branches of the head from the first training step on.

    Args:
        tower: The tower.
    """
    return [
        join(path, name)
        for path, module in tower.named_modules()
        for cls in type(module).__mro__
        for name in _BORROWED.get(class_path(cls), ())
    ]


def _innermost(backbone: nn.Module) -> str:
    """Return the path of the module that holds the blocks, e.g. in a TIMMBackbone; empty for the backbone itself."""
    found = _Search(backbone).found.learning
    return next(iter(found)) if len(found) == 1 else ''


def check_host(model: nn.Module) -> None:
    """Reject hosts whose state dict drops added modules.

    Raises:
        ValueError: The model is, holds or lies in MMPretrain's LoRAModel.
    """
    for name, module in model.named_modules():
        if any(class_path(cls) == _LORA_MODEL for cls in type(module).__mro__):
            where = f"'{name}'" if name else 'the model'
            raise ValueError(
                f"{where} is MMPretrain's LoRAModel, whose state_dict() drops everything except its own weights: "
                "adapters would be lost on saving. Adapt the module that it wraps, with method 'lora' if you want LoRA"
            )
