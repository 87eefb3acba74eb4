"""What can be adapted in a tower without known blocks: linear maps, attention and FFNs, found by structure.

A tower is any module that the user names: the encoder or decoder of a detector, a text encoder, a head. No model
library is imported. Linear maps are told apart by their names. Attention and FFNs with a residual sum are known by the
import path of their class, or by the layout that Hugging Face's encoders share.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from iconformer_mm.adapters import Target

from .families import class_path
from .sites import host_modules, host_parameters

# Modules of torch that read the weights of the layers within them. They are adapted as a whole.
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
OTHER = 'other'

# Roles by the end of a layer's name. The first that fits counts.
_ROLES = [
    ('v', r'values_[vl]_proj'),
    ('o', r'out_[vl]_proj'),
    # What a query decides in deformable attention: where it looks, and how much.
    ('q', r'query|q|q_proj|to_q|q_lin|wq|q(content|pos|pos_sine)_proj|sampling_offsets|attention_weights'),
    ('k', r'key|k|k_proj|to_k|k_lin|wk|k(content|pos)_proj|l_proj'),
    ('v', r'value|v|v_proj|to_v|v_lin|wv|value_proj'),
    ('o', r'out_proj|output_proj|o_proj|proj|to_out\.0|out_lin|wo|attention\.output\.dense'),
    ('fc1', r'fc1|linear1|lin1|c_fc|intermediate\.dense'),
    ('fc2', r'fc2|linear2|lin2|mlp\.c_proj|output\.dense'),
]
_PATTERNS = [(role, re.compile(rf'(^|\.)({pattern})$')) for role, pattern in _ROLES]
_FFN = re.compile(r'ffn|mlp', re.IGNORECASE)


@dataclass(frozen=True)
class LinearUnit:
    """A module whose linear maps are adapted together.

    Attributes:
        name: Its name in the tower.
        module: A linear layer that is called, or a module that reads the weights of its layers.
        targets: Its maps. Names of weights are names in the module.
        called: Whether it is a linear layer that is called.
    """

    name: str
    module: nn.Module
    targets: tuple[Target, ...]
    called: bool


def find_linear_units(tower: nn.Module) -> list[LinearUnit]:
    """List the linear maps of a tower, by the modules that run them.

    Args:
        tower: The tower.
    """
    modules = dict(host_modules(tower))
    whole = [name for name, module in modules.items() if isinstance(module, WHOLE)]
    maps: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}
    for name, module in modules.items():
        owner = next((w for w in whole if name == w or not w or name.startswith(f'{w}.')), None)
        if owner is None and isinstance(module, nn.Linear):
            parent, _, last = name.rpartition('.')
            reads = bool(name) and reads_weight(modules[parent], last)
            owner = parent if reads else name
        elif owner is None or not isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            continue
        for weight, roles in _maps_of(modules, name, module).items():
            inside = f'{name}.{weight}'.strip('.')
            local = inside[len(owner) + 1 :] if owner else inside
            maps.setdefault(owner, {})[local] = roles
    return [_unit(name, modules[name], weights) for name, weights in maps.items()]


def _unit(name: str, module: nn.Module, weights: dict[str, dict[str, tuple[int, int]]]) -> LinearUnit:
    parameters = dict(host_parameters(module))
    targets: list[Target] = []
    for weight, roles in weights.items():
        width = parameters[weight].shape[1:].numel()
        for role, rows in roles.items():
            same = sum(t.role.partition('_')[0] == role for t in targets)
            targets.append(Target(weight, f'{role}_{same + 1}' if same else role, rows, width))
    return LinearUnit(name, module, tuple(targets), called=set(weights) == {'weight'} and isinstance(module, nn.Linear))


def role_of(target: Target) -> str:
    """Return the role of a map, without the number that tells maps of one role in a module apart."""
    return target.role.partition('_')[0]


def _maps_of(modules: dict[str, nn.Module], name: str, layer: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the maps in each own weight of a layer: their rows by role."""
    if isinstance(layer, nn.MultiheadAttention):
        width = layer.embed_dim
        if layer.in_proj_weight is not None:
            return {'in_proj_weight': {role: (i * width, (i + 1) * width) for i, role in enumerate('qkv')}}
        return {f'{role}_proj_weight': {role: (0, width)} for role in 'qkv'}
    rows, last = layer.out_features, name.rpartition('.')[2]
    if last == 'qkv' and rows % 3 == 0:
        return {'weight': {role: (i * rows // 3, (i + 1) * rows // 3) for i, role in enumerate('qkv')}}
    if last == 'kv' and rows % 2 == 0:
        return {'weight': {'k': (0, rows // 2), 'v': (rows // 2, rows)}}
    return {'weight': {_role(modules, name): (0, rows)}}


def _role(modules: dict[str, nn.Module], name: str) -> str:
    """Return the role of a linear layer by its name, and by the modules around it."""
    parent = name.rpartition('.')[0]
    if name.rpartition('.')[2] == 'v_proj' and hasattr(modules.get(parent), 'l_proj'):
        return 'q'  # attention between vision and language: q of the one is k of the other
    for role, pattern in _PATTERNS:
        if pattern.search(name):
            return role
    # Layers of an FFN that is a sequence: the last projects back.
    path = parent
    while path:
        kind = type(modules[path]).__name__
        named = kind.lower() == 'ffn' or bool(_FFN.search(path.rpartition('.')[2]))
        if named or _FFN.fullmatch(kind):
            inside = [n for n, m in modules.items() if n.startswith(f'{path}.') and isinstance(m, nn.Linear)]
            # The widths tell an FFN from other MLPs: predictors, and scales of positions (Conditional and DAB-DETR).
            first, last = (modules[inside[i]] for i in (0, -1))
            width, hidden = getattr(first, 'in_features', 0), getattr(first, 'out_features', 0)
            if len(inside) > 1 and width == getattr(last, 'out_features', 1) and (named or hidden > width):
                return 'fc2' if name == inside[-1] else 'fc1'
        path = path.rpartition('.')[0]
    return OTHER


@dataclass(frozen=True)
class Branch:
    """A module that computes a branch of a Transformer layer and its residual sum.

    Attributes:
        name: Its name in the tower.
        module: The module.
        kind: ``'attention'`` or ``'ffn'``.
        embed_dims: Width of its tokens.
        residual: Name of the argument that is added to the branch. If a call does not give it, the first argument is.
        reads_residual: Whether the branch begins before the module, so that only the residual is known there.
        has_levels: Whether the tokens are maps of several levels in one sequence, whose sizes the call gives.
    """

    name: str
    module: nn.Module
    kind: str
    embed_dims: int
    residual: str = 'identity'
    reads_residual: bool = False
    has_levels: bool = False


_MMCV = 'mmcv.'
_DEFORMABLE = _MMCV + 'ops.multi_scale_deform_attn.MultiScaleDeformableAttention'
# Import paths of modules that add their input to what they compute.
_BRANCHES = {
    _MMCV + 'cnn.bricks.transformer.FFN': 'ffn',
    _MMCV + 'cnn.bricks.transformer.MultiheadAttention': 'attention',
    _DEFORMABLE: 'attention',
    'mmdet.models.layers.transformer.utils.ConditionalAttention': 'attention',
}


def find_branches(tower: nn.Module) -> list[Branch]:
    """List attention and FFNs of a tower that have a residual sum of their own.

    Args:
        tower: The tower.
    """
    found = []
    for name, module in host_modules(tower):
        each: Any = module
        paths = [class_path(cls) for cls in type(module).__mro__]
        kind = next((_BRANCHES[path] for path in paths if path in _BRANCHES), None)
        if kind is not None and getattr(module, 'add_identity', True):
            # Self-attention over the maps themselves is what the encoders of the Deformable DETR family call so.
            levels = _DEFORMABLE in paths and name.rpartition('.')[2] == 'self_attn'
            found.append(Branch(name, module, kind, each.embed_dims, has_levels=levels))
        elif _ends_branch(module):
            attention = name.rpartition('.')[0].rpartition('.')[2].startswith(('attention', 'crossattention'))
            kind, width = 'attention' if attention else 'ffn', each.dense.out_features
            found.append(Branch(name, module, kind, width, residual='input_tensor', reads_residual=True))
    return found


def _ends_branch(module: nn.Module) -> bool:
    """Whether a module is the end of a branch as in BERT: ``LayerNorm(dropout(dense(hidden)) + input_tensor)``."""
    parts = getattr(module, 'dense', None), getattr(module, 'LayerNorm', None)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return isinstance(parts[0], nn.Linear) and parts[1] is not None and names == ['hidden_states', 'input_tensor']


def whole_or_leaf(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that run their own weights: leaves, and modules that read the weights of those within them.

    Args:
        module: The module to search.
    """
    whole: list[str] = []
    for name, child in host_modules(module):
        if any(name.startswith(f'{w}.') for w in whole):
            continue
        if isinstance(child, WHOLE):
            whole.append(name)
            yield name, child
        elif not any(True for _ in child.children()):
            yield name, child


def roles_of(units: Sequence[LinearUnit]) -> list[str]:
    """List the roles of the maps in some units, each once."""
    return list(dict.fromkeys(role_of(target) for unit in units for target in unit.targets))


def reads_weight(module: nn.Module, layer: str) -> bool:
    """Whether a method of a module, or of one in it, reads the weight of a layer with this name.

    A method that uses both names counts as reading. ``nn.MultiheadAttention`` reads the weight of its output
    projection.
    """
    return any(
        {layer, 'weight'} <= set(code.co_names)
        for cls in {type(each) for each in module.modules()}
        for code in _methods(cls)
    )


def _methods(cls: type) -> Iterator[CodeType]:
    """Yield the code of a class's methods that may run in a forward pass."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        for name, method in vars(base).items():
            code = getattr(method, '__code__', None)
            if code is not None and not any(word in name for word in ('init', 'reset', 'load')):
                yield code
                yield from (constant for constant in code.co_consts if isinstance(constant, CodeType))
