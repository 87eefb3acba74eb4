"""Methods that tune weights of the backbone without changing the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from iconformer_mm.adapters import DeltaAdapter, DoRAAdapter, LoRAAdapter, SSFAdapter, Target, WeightAdapter
from iconformer_mm.adapters.base import check_count, check_flag, check_number
from iconformer_mm.registry import PEFT_METHODS

from ..attachments import Attachment, LinearAttachment, LowRankAttachment, WeightAttachment
from ..quantised_weight import own_weights
from ..replacement import parameter_of
from ..sites import Site, host_modules, host_parameters
from ..structure import OTHER, find_linear_units, role_of, roles_of, whole_or_leaf
from .base import PEFTMethod, TrackerOf

_LINEAR = (nn.Linear, _ConvNd)
_NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
_NORM_NAMES = re.compile(r'(rms|layer)_?norm(2d)?$', re.IGNORECASE)  # names of the libraries' own norm classes


@dataclass(frozen=True)
class Layer:
    """A layer within a module.

    Attributes:
        weight: Name of its weight.
        bias: Name of its bias, or None if it has none.
        outputs: Number of its outputs.
        is_norm: Whether it is a normalisation.
    """

    weight: str
    bias: str | None
    outputs: int
    is_norm: bool


def find_layers(module: nn.Module, idle: Sequence[str] = ()) -> list[Layer]:
    """List the linear, convolution and normalisation layers of a module, including itself.

    Args:
        module: The module.
        idle: Submodules to leave out. Defaults to none.
    """
    layers = []
    layer: Any
    for name, layer in host_modules(module):
        if name.partition('.')[0] in idle:
            continue
        names = {n: f'{name}.{n}'.removeprefix('.') for n in own_weights(layer)}
        is_norm = isinstance(layer, _NORMS) or bool('weight' in names and _NORM_NAMES.search(type(layer).__name__))
        if isinstance(layer, nn.MultiheadAttention) and 'in_proj_weight' in names:
            rows = layer.in_proj_weight.shape[0]
            layers.append(Layer(names['in_proj_weight'], names.get('in_proj_bias'), rows, False))
        elif 'weight' in names and (is_norm or isinstance(layer, _LINEAR)):
            layers.append(Layer(names['weight'], names.get('bias'), layer.weight.shape[0], is_norm))
    return layers


class WeightMethod(PEFTMethod):
    """Runs modules with weights computed from their own. The result can be merged into them."""

    needs_blocks = False

    def make_adapter(self, module: nn.Module, idle: Sequence[str]) -> WeightAdapter | None:
        """Create the adapter of a module.

        Args:
            module: A block, or a leaf module outside the blocks.
            idle: Names of its submodules that never run.

        Returns:
            The adapter, or None if the module has nothing to adapt.
        """
        raise NotImplementedError

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Adapt every block as a whole, and every leaf module outside the blocks."""
        families = {site.name: site.family for site in sites}
        within = tuple(f'{name}.' for name in families)
        units = dict(whole_or_leaf(backbone))
        attachments: list[Attachment] = []
        for name, module in host_modules(backbone):
            if name in families:
                kind, adapter = families[name].name, self.make_adapter(module, families[name].idle)
            elif name.startswith(within) or name not in units:
                continue
            else:
                kind, adapter = type(module).__name__, self.make_adapter(module, ())
            if adapter is not None:
                attachments.append(WeightAttachment(name, module, kind, adapter))
        return attachments


def _deltas(module: nn.Module, names: Iterable[str]) -> DeltaAdapter | None:
    shapes = {name: parameter_of(module, name).shape for name in names}
    return DeltaAdapter(shapes) if shapes else None


@PEFT_METHODS.register_module(name='bitfit')
class BitFitMethod(WeightMethod):
    """BitFit (Ben Zaken et al., ACL 2022): the biases of all layers.

    Tables of relative position biases are not biases of a layer, so they stay frozen.
    """

    def make_adapter(self, module: nn.Module, idle: Sequence[str]) -> WeightAdapter | None:
        """Tune the biases."""
        names = [n for n, _ in host_parameters(module) if n.partition('.')[0] not in idle]
        return _deltas(module, [n for n in names if n.rpartition('.')[2].endswith('bias')])


@PEFT_METHODS.register_module(name='norm')
class NormMethod(WeightMethod):
    """Normalisation layers: their weights and biases (as in Basu et al., AAAI 2024, for ViTs)."""

    def make_adapter(self, module: nn.Module, idle: Sequence[str]) -> WeightAdapter | None:
        """Tune the norms."""
        norms = [layer for layer in find_layers(module, idle) if layer.is_norm]
        return _deltas(module, [name for layer in norms for name in (layer.weight, layer.bias) if name])


@PEFT_METHODS.register_module(name='ssf')
class SSFMethod(WeightMethod):
    """SSF (Lian et al., NeurIPS 2022): the output of every layer is scaled and shifted.

    A layer without a bias is only scaled, so that it can be merged.

    Args:
        std: Standard deviation of the initial noise of scales and shifts. With 0, training
            starts at the pre-trained model. Defaults to 0.02, as in the paper's code.

    Raises:
        ValueError: ``std`` is not a finite number of at least 0.
    """

    def __init__(self, std: float = 0.02) -> None:
        check_number('std', std, low=0)
        self.std = std

    def make_adapter(self, module: nn.Module, idle: Sequence[str]) -> WeightAdapter | None:
        """Scale and shift the layers."""
        layers = [(layer.weight, layer.bias, layer.outputs) for layer in find_layers(module, idle)]
        return SSFAdapter(layers, self.std) if layers else None


@PEFT_METHODS.register_module(name='partial')
class PartialMethod(PEFTMethod):
    """Partial fine-tuning: all weights of the last blocks (as in Jia et al., ECCV 2022).

    Args:
        num_blocks: Number of blocks to tune. Defaults to 1.

    Raises:
        ValueError: ``num_blocks`` is not a positive integer, or exceeds the number of blocks.
    """

    def __init__(self, num_blocks: int = 1) -> None:
        check_count('num_blocks', num_blocks)
        self.num_blocks = num_blocks

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Tune all weights of the last blocks."""
        if self.num_blocks > len(sites):
            raise ValueError(f'num_blocks is {self.num_blocks}, but {type(backbone).__name__} has {len(sites)} blocks')
        attachments: list[Attachment] = []
        for site in sites[-self.num_blocks :]:
            # In evaluation, hosts cache values computed from attention_biases, so they would not see new ones.
            names = [
                n
                for n, _ in host_parameters(site.block)
                if n.partition('.')[0] not in site.family.idle and not n.endswith('attention_biases')
            ]
            adapter = _deltas(site.block, names)
            assert adapter is not None  # every block has weights
            attachments.append(WeightAttachment(site.name, site.block, site.family.name, adapter))
        return attachments


ROLES = ('q', 'k', 'v', 'o', 'fc1', 'fc2')
TARGETS = (*ROLES, OTHER)  # of towers beyond the backbone


def find_targets(site: Site, roles: Sequence[str]) -> list[Target]:
    """Find linear maps of a block.

    Args:
        site: The block.
        roles: Roles of the maps: ``'q'``, ``'k'``, ``'v'`` and output projection ``'o'`` of
            attention, first layer ``'fc1'`` and last layer ``'fc2'`` of the FFN.

    Raises:
        ValueError: The block has no map with a role.
    """
    weights = {name: p for name, p in host_parameters(site.block) if p.dim() > 1}
    found: dict[str, Target] = {}
    for name, weight in weights.items():
        for role, (first, last) in _roles(site, name, weight, found).items():
            found[role] = Target(name, role, (first, last), weight.shape[1:].numel())
    for role, (name, first, last, groups) in (site.family.rows(site.block) if site.family.rows else {}).items():
        found[role] = Target(name, role, (first, last), weights[name].shape[1:].numel(), groups)
    missing = [role for role in roles if role not in found]
    if missing:
        raise ValueError(
            f'no linear map {", ".join(missing)} in {site.name} ({site.family.name}); its weights: {", ".join(weights)}'
        )
    return [found[role] for role in roles]


def _branch(role: str) -> str:
    """Return the branch of a map."""
    return 'ffn' if role in ('fc1', 'fc2') else 'attention'


def _roles(site: Site, name: str, weight: nn.Parameter, found: dict[str, Target]) -> dict[str, tuple[int, int]]:
    """Return the roles of a weight's rows, by the name of the weight."""
    rows = weight.shape[0]
    if site.family.ffn and name.startswith(f'{site.family.ffn}.'):
        if 'ffn' not in site.branches or weight.shape[1] <= 1:  # a depth-wise convolution
            return {}
        return {'fc2' if 'fc1' in found else 'fc1': (0, rows)}
    if 'attention' not in site.branches:
        return {}
    if name.endswith(('qkv.weight', 'in_proj_weight')):
        return {role: (i * rows // 3, (i + 1) * rows // 3) for i, role in enumerate('qkv')}
    if name.endswith('.kv.weight'):
        return {'k': (0, rows // 2), 'v': (rows // 2, rows)}
    if name.endswith(('.proj.weight', 'out_proj.weight')):
        return {'o': (0, rows)}
    for role in 'qkv':
        if name.endswith((f'.{role}.weight', f'.{role}_proj.weight')):
            return {role: (0, rows)}
    return {}


class LowRankMethod(PEFTMethod):
    """Low-rank paths parallel to linear maps of every block. They can be merged into the maps."""

    adapter_class: type[LoRAAdapter]

    def __init__(self, rank: int, alpha: float, targets: Sequence[str], dropout: float, rank_stabilized: bool) -> None:
        if isinstance(targets, str) or not targets or not set(targets) <= set(TARGETS):
            raise ValueError(f'targets must be a list of {", ".join(TARGETS)}, got {targets!r}')
        check_count('rank', rank)
        check_number('alpha', alpha, above=0)
        check_number('dropout', dropout, low=0, below=1)
        check_flag('rank_stabilized', rank_stabilized)
        self.rank = rank
        self.alpha = alpha
        self.targets = [role for role in TARGETS if role in targets]
        self.dropout = dropout
        self.rank_stabilized = rank_stabilized

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Adapt the maps of every block. Blocks without attention or FFN get the maps that they have."""
        attachments: list[Attachment] = []
        for site in sites:
            roles = [role for role in self.targets if _branch(role) in site.branches]
            if roles:
                targets = find_targets(site, roles)
                adapter = self.adapter_class(targets, self.rank, self.alpha, self.dropout, self.rank_stabilized)
                attachments.append(LowRankAttachment(site, adapter))
        if sites and not attachments:
            block = sites[0]
            there = ['fc1', 'fc2'] if 'ffn' in block.branches else ['q', 'k', 'v', 'o']
            raise ValueError(
                f'{block.family.name} blocks have no linear map {", ".join(self.targets)}, since they have only '
                f'{", ".join(block.branches)}; set targets={there}'
            )
        return attachments

    def make_tower_attachments(self, tower: nn.Module) -> list[Attachment]:
        """Adapt the maps of a tower that are known by structure. A tower gets those of the targets that it has."""
        units = find_linear_units(tower)
        attachments: list[Attachment] = []
        for unit in units:
            targets = [target for target in unit.targets if role_of(target) in self.targets]
            if not targets:
                continue
            adapter = self.adapter_class(targets, self.rank, self.alpha, self.dropout, self.rank_stabilized)
            kind = type(unit.module).__name__
            if unit.called:
                attachments.append(LinearAttachment(unit.name, unit.module, kind, adapter))
            elif self.dropout > 0:
                raise ValueError(
                    f'{unit.name} ({kind}) reads the weights of its layers, so dropout cannot be applied to the input '
                    'of the path; set dropout=0'
                )
            else:
                attachments.append(WeightAttachment(unit.name, unit.module, kind, adapter))
        if not attachments:
            there = roles_of(units)
            raise ValueError(
                f"method '{self.name}' finds no linear map {', '.join(self.targets)} in {type(tower).__name__}"
                + (f'; set targets={there}' if there else ', which has no linear layers')
            )
        return attachments


@PEFT_METHODS.register_module(name='lora')
class LoRAMethod(LowRankMethod):
    """LoRA (Hu et al., ICLR 2022). The defaults are the paper's for RoBERTa.

    Args:
        rank: Rank of the paths. Defaults to 8.
        alpha: Factor of the paths before division by the rank. Defaults to 8.
        targets: Maps to adapt: ``'q'``, ``'k'``, ``'v'``, ``'o'`` (attention), ``'fc1'``, ``'fc2'``
            (FFN), and in towers beyond the backbone ``'other'``, linear layers of no known role.
            Defaults to q and v.
        dropout: Dropout probability of the input of the paths. Defaults to 0.
        rank_stabilized: Whether alpha is divided by the square root of the rank (rsLoRA,
            Kalajdzievski, 2023). Defaults to False.

    Raises:
        ValueError: An option is out of its range, or a block lacks one of the maps.
    """

    adapter_class = LoRAAdapter

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8,
        targets: Sequence[str] = ('q', 'v'),
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__(rank, alpha, targets, dropout, rank_stabilized)


@PEFT_METHODS.register_module(name='dora')
class DoRAMethod(LowRankMethod):
    """DoRA (Liu et al., ICML 2024). Except for dropout, the defaults are the paper's for LLaMA.

    Args:
        rank: Rank of the paths. Defaults to 16.
        alpha: Factor of the paths before division by the rank. Defaults to 32.
        targets: Maps to adapt: ``'q'``, ``'k'``, ``'v'``, ``'o'`` (attention), ``'fc1'``, ``'fc2'``
            (FFN), and in towers beyond the backbone ``'other'``, linear layers of no known role.
            Defaults to all except o.
        dropout: Dropout probability of the input of the paths. Defaults to 0.
        rank_stabilized: Whether alpha is divided by the square root of the rank. Defaults to False.

    Raises:
        ValueError: An option is out of its range, or a block lacks one of the maps.
    """

    adapter_class = DoRAAdapter

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32,
        targets: Sequence[str] = ('q', 'k', 'v', 'fc1', 'fc2'),
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__(rank, alpha, targets, dropout, rank_stabilized)
