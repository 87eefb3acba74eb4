"""Accounting of loaded weights: every tensor is loaded, or new and trained, or an error.

OpenMMLab loads non-strictly and only logs mismatches. For a trained backbone this costs
accuracy. A frozen tensor that keeps its random values never recovers, so it is an error
here. Two classes watch the loads:

- :class:`BaseAccount` watches an adapted backbone as long as it is adapted. It checks each load on its own.
- :class:`LoadRecord` watches a whole model while it is loaded. It then lists the tensors that no load contained.

The functions compare a checkpoint's PEFT method with the model's before anything is loaded.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backbones import is_below
from .freezing import is_adapter
from .methods import build_method
from .packing import is_packed, kind_of
from .selection import Selection

NOTE = 'iconformer_mm'  # the key of our entry in checkpoints
NO_WEIGHTS = (
    "no pre-trained weights are named (init_cfg of the backbone with type='Pretrained', or load_from): the "
    'frozen backbone would stay random'
)

# Tensors that weights may lack, by the last part of their names. None of them is learned.
DERIVED = {
    'relative_position_index': 'indices, computed from the window size',
    'relative_coords_table': 'coordinates, computed from the window size',
    'attention_bias_idxs': 'indices, computed from the resolution',
    'attn_mask': 'computed from the input size and the shift',
    'freqs_cos': 'angles of rotary embeddings, computed from the resolution',
    'freqs_sin': 'angles of rotary embeddings, computed from the resolution',
    'position_ids': 'places in a text, counted',
    'num_batches_tracked': 'a counter, which evaluation does not read',
}
# Norms after the blocks, by their names in the backbone. Dense tasks add them (Swin's norm0 to norm3), and so
# do other kinds of pooling (ln2, fc_norm). A classifier's weights do not contain them, so they are trained.
OUTPUT_NORM = re.compile(r'(?:timm_model\.)?(?:norm\d*|ln\d+|fc_norm|norm_list\.\d+)\.(?:weight|bias)')


# How torch's loader reports a tensor that it cannot copy.
_ERROR = re.compile(r'(?:size mismatch for |parameter named ")([^\s":]+)')


class WeightsError(RuntimeError, ValueError):
    """Weights do not fit the model, or a tensor is in none of the files.

    It is both a RuntimeError and a ValueError, because earlier releases raised these.
    """


def is_derived(name: str) -> bool:
    """Whether weights may lack a tensor, because it is computed from the geometry or counts steps."""
    return name.rpartition('.')[2] in DERIVED


def output_norms(backbone: nn.Module) -> set[str]:
    """List the names of the parameters of a backbone's output norms.

    Args:
        backbone: The backbone.
    """
    names = set()
    for name, module in backbone.named_modules():
        # A BatchNorm would also need running statistics, which a frozen backbone does not update.
        if 'norm' in type(module).__name__.lower() and not isinstance(module, _BatchNorm):
            names |= {f'{name}.{local}' for local, _ in module.named_parameters(recurse=False)}
    return {name for name in names if OUTPUT_NORM.fullmatch(name)}


def base_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that weights must provide for a backbone, by their names in it.

    These are parameters and buffers, without adapters and computed tensors (:data:`DERIVED`).

    Args:
        backbone: The backbone.
    """
    state = backbone.state_dict()
    return {name: value for name, value in state.items() if not is_adapter(name) and not is_derived(name)}


def base_buffers(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers among :func:`base_tensors`, such as running statistics.

    Args:
        backbone: The backbone.
    """
    parameters = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    return {n: v for n, v in base_tensors(backbone).items() if n not in parameters and v.is_floating_point()}


def parameters_from_hub(model: nn.Module) -> set[str]:
    """List the tensors of Hugging Face models, which load their weights while they are built, before any hook exists.

    Args:
        model: The model.
    """
    modules: list[tuple[str, Any]] = list(model.named_modules())
    hub = [n for n, m in modules if hasattr(m, 'from_pretrained') and getattr(m, 'name_or_path', None)]
    return {name for name in model.state_dict() if hub and (is_below(name, hub) or '' in hub)}


class BaseAccount:
    """Watches loads into an adapted backbone, and rejects those that leave frozen tensors random.

    A load that contains any tensor of the base must contain all its parameters and buffers.
    Exceptions are computed tensors (:data:`DERIVED`), tensors that are trained in place, and
    output norms (:data:`OUTPUT_NORM`). Output norms that the weights lack are trained.
    Loads of adapters alone, or of modules outside the backbone, pass.

    In timm hosts, position embeddings of another size are resized by timm's own functions,
    as timm does when it loads weights itself.

    Args:
        backbone: The backbone.
        injection: The backbone's injection.
        blocks: Names of the adapted blocks. Defaults to none.
    """

    def __init__(self, backbone: nn.Module, injection: Any, blocks: Iterable[str] = ()) -> None:
        self._backbone = backbone
        self._injection = injection
        self._blocks = tuple(f'{name}.' for name in blocks)
        # timm loads `pretrained` and `checkpoint_path` while it builds a model, before any hook exists.
        self.given = bool(getattr(backbone, 'is_init', False))
        self.loaded: set[str] = parameters_from_hub(backbone)
        # Output norms that the weights lack. `pinned` means that a file specified which are trained.
        self.norms: set[str] = set()
        self.pinned = False
        self._norm_values: dict[str, Tensor] = {}
        self._prefix = ''
        self._errors: list[str] = []
        self._offered = False
        self._handles = [
            backbone._register_load_state_dict_pre_hook(self._begin),
            backbone.register_load_state_dict_post_hook(self._end),
        ]

    def release(self, restore: bool = True) -> None:
        """Stop watching.

        Args:
            restore: Whether trained output norms get their initial values back. Defaults to True.
        """
        for handle in self._handles:
            handle.remove()
        parameters = dict(self._backbone.named_parameters())
        for name in self.norms if restore else ():
            parameters[name].data.copy_(self._norm_values[name])

    def norm_values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the initial and the current values of the trained output norms."""
        parameters = dict(self._backbone.named_parameters())
        begun = {name: self._norm_values[name].clone() for name in sorted(self.norms)}
        return begun, {name: parameters[name].detach().clone() for name in sorted(self.norms)}

    def train_norms(self, names: set[str]) -> None:
        """Train exactly these output norms, in place.

        Args:
            names: Names of their parameters in the backbone.
        """
        parameters = dict(self._backbone.named_parameters())
        for name in names - self.norms:
            self._norm_values[name] = parameters[name].detach().clone()
            parameters[name].requires_grad_(True)
        for name in self.norms - names:
            parameters[name].requires_grad_(False)
        self.norms.intersection_update(names)  # in place, because the backbone's Freezing shares this set
        self.norms.update(names)

    def note(self, arrived: set[str]) -> None:
        """Record tensors that were put in place by other means than a state dict.

        Args:
            arrived: Their names in the backbone.
        """
        norms = output_norms(self._backbone) & (self._needed() | self.norms)
        self._settle_norms(norms - arrived, norms & arrived)
        self.loaded |= arrived & set(self._backbone.state_dict())

    @property
    def missing(self) -> list[str]:
        """Frozen tensors that no load has contained."""
        return [] if self.given else sorted(self._needed() - self.loaded)

    def _needed(self) -> set[str]:
        heads = self._injection.outside[self._injection.path_of(self._backbone)]
        trained = set(self._injection.trained_of(self._backbone))
        return {n for n in base_tensors(self._backbone) if n not in trained and not is_below(n, heads)}

    def _begin(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        self._prefix, self._errors = prefix, errors
        self._offered = any(key.startswith(prefix) for key in state_dict)
        trained = set(self._injection.trained_of(self._backbone))
        for name, own in self._backbone.state_dict().items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.shape == own.shape:
                continue
            if is_packed(value):
                raise WeightsError(
                    f'the weights hold the base in {kind_of(value)}, such as {name}, and the model does not. Adapt it '
                    f'with frozen_dtype={kind_of(value)!r}, or load the base in floating point'
                )
            if is_derived(name):
                del state_dict[prefix + name]  # the model's own tensor is correct for its size
            elif name in trained:
                del state_dict[prefix + name]
                print_log(
                    f'{name} is trained from scratch: its shape is {tuple(value.shape)} in the weights and '
                    f'{tuple(own.shape)} in the model',
                    logger='current',
                )
            else:
                state_dict[prefix + name] = _resized(self._backbone, name, value, own)

    def _end(self, backbone: nn.Module, incompatible_keys: Any) -> None:
        prefix, errors, self._errors = self._prefix, self._errors, []
        missing = {key.removeprefix(prefix) for key in incompatible_keys.missing_keys if key.startswith(prefix)}
        unexpected = list(incompatible_keys.unexpected_keys)
        own = set(backbone.state_dict())
        named = ((_ERROR.search(error), error) for error in errors)
        unfit = {m[1].removeprefix(prefix): error for m, error in named if m and m[1].startswith(prefix)}
        arrived = own - missing - unfit.keys() if self._offered else set()
        self._judge_adapters(self._adapter_names(), arrived, unfit, unexpected)
        self._judge_base(arrived, missing, unfit, unexpected)
        self.loaded |= arrived

    def _adapter_names(self) -> set[str]:
        """Names of the active adapter's tensors in the backbone."""
        injection = self._injection
        path = injection.path_of(self._backbone)
        start = len(path) + 1 if path else 0
        return {name[start:] for name in injection.adapter_names() if not path or name.startswith(f'{path}.')}

    def _judge_adapters(
        self, adapters: set[str], arrived: set[str], unfit: dict[str, str], unexpected: list[str]
    ) -> None:
        foreign = [key for key in unexpected if is_adapter(key) and key.startswith(self._prefix)]
        absent = adapters - arrived - unfit.keys() if adapters & arrived else set()
        for names, what in (
            (foreign, 'are not in the model'),
            (sorted(adapters & unfit.keys()), 'have another shape'),
            (sorted(absent), 'of the model are missing'),
        ):
            if names:
                raise WeightsError(
                    f'the weights hold adapters of another method or with other options: {len(names)} tensors {what}, '
                    f'such as {names[0]}; the model is adapted by {self._injection.method.config}. Adapt the model as '
                    'it was when the weights were saved'
                )

    def _judge_base(self, arrived: set[str], missing: set[str], unfit: dict[str, str], unexpected: list[str]) -> None:
        needed = self._needed()
        kind = type(self._backbone).__name__
        wrong = sorted(needed & unfit.keys())
        if wrong:
            raise WeightsError(
                f'wrong pre-trained weights for {kind}: {len(wrong)} frozen tensors have another shape, among them: '
                f'{unfit[wrong[0]].strip()} Use weights of exactly the architecture in the '
                f'config{self._remedy(wrong)}.'
            )
        norms = output_norms(self._backbone) & (needed | self.norms)
        if not needed & arrived:
            if not unexpected and (self._prefix or arrived):
                return  # adapters alone, or weights of a module outside the backbone
            absent = sorted(needed)
        else:
            absent = sorted((needed & missing) - norms)
        if absent:
            raise WeightsError(
                f'wrong pre-trained weights for {kind}: {len(absent)} of {len(needed)} frozen tensors are missing, '
                f'among them {some(absent)}'
                + (f'; the file has {some(unexpected)} instead' if unexpected else '')
                + '. They would keep their random values. Convert the file to the names of this class, or set '
                "the right `prefix` in `init_cfg=dict(type='Pretrained', ...)`"
                f'{self._remedy(absent)}.'
            )
        self._settle_norms(norms & missing, norms & arrived)

    def _settle_norms(self, new: set[str], loaded: set[str]) -> None:
        """Train the output norms that the weights lack, and freeze those again that later weights contain."""
        if self.pinned or not new | (loaded & self.norms):
            return
        if new:
            print_log(f'the weights have no {some(sorted(new))}: these output norms are trained', logger='current')
        self.train_norms((self.norms - loaded) | new)

    def _remedy(self, names: list[str]) -> str:
        """Suggest unfreezing the tensors, if none of them is in an adapted block."""
        if not self._blocks or any(name.startswith(self._blocks) for name in names):
            return ''
        patterns = dict.fromkeys(name.partition('.')[0] + ('.*' if '.' in name else '') for name in names)
        return f', or train those tensors from scratch, with unfreeze={list(patterns)}'


def adopt_output_norms(injection: Any, names: Iterable[str]) -> None:
    """Train exactly the output norms that one of our files records as trained.

    Args:
        injection: The model's injection.
        names: Base parameters that the file records as trained, by their names in the file.
    """
    wanted = set(names)
    for path, account in injection.accounts.items():
        backbone = injection.backbones[path]
        named = injection.trained[path].names if path in injection.trained else ()
        norms = {n for n in output_norms(backbone) if injection.full_name(path, n) in wanted} - set(named)
        account.train_norms(norms)
        account.pinned = True


def _resized(backbone: nn.Module, name: str, value: Tensor, own: Tensor) -> Tensor:
    """Resize a position embedding to the model's size, with timm's function for the host's class."""
    path, _, local = name.rpartition('.')
    if local not in ('pos_embed', 'relative_position_bias_table'):
        return value
    owner = backbone.get_submodule(path)
    # Looked up, not imported: a timm host has imported it already.
    module = type(owner).__module__
    resize = getattr(sys.modules[module], 'checkpoint_filter_fn', None) if module.startswith('timm.') else None
    if resize is None:
        return value
    try:
        resized = resize({local: value}, owner).get(local)
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError, AssertionError):
        return value  # torch rejects it for its shape
    if resized is None or resized.shape != own.shape:
        return value
    print_log(f'{name} is resized from {tuple(value.shape)} to {tuple(own.shape)}', logger='current')
    return resized


class _Ledger:
    """The tensors loaded so far, by identity. It refers to no module, since hooks are copied with their module."""

    def __init__(self) -> None:
        self.begun = False
        self.loaded: set[int] = set()
        self.unfit: dict[int, tuple[int, ...]] = {}

    def enter(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Record what a load contains for a module's own tensors."""
        self.begun = True
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            value = state_dict.get(prefix + name)
            if own is None or not isinstance(value, Tensor):
                continue
            if value.shape == own.shape or (own.dim() == 0 and value.shape == (1,)):
                self.loaded.add(id(own))
            else:
                self.unfit[id(own)] = tuple(value.shape)


class LoadRecord:
    """Records which tensors of a model were loaded, no matter at which module the loads started.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._ledger = _Ledger()
        self._handles = [
            module._register_load_state_dict_pre_hook(self._ledger.enter, with_module=True)
            for module in model.modules()
        ]

    @property
    def begun(self) -> bool:
        """Whether anything was loaded."""
        return self._ledger.begun

    @property
    def size(self) -> int:
        """Number of tensors in the model."""
        return len(self._tensors())

    def note(self, names: Iterable[str]) -> None:
        """Record tensors that were filled by other means, by their names in the model. Unknown names are ignored."""
        self._ledger.begun = True
        own = self._tensors()
        self._ledger.loaded |= {id(own[name]) for name in names if name in own}

    def restart(self) -> None:
        """Forget the loads so far. The loads that follow must be complete."""
        self._ledger.loaded.clear()
        self._ledger.unfit.clear()

    def loaded(self) -> list[str]:
        """List the names of the loaded tensors."""
        return [name for name, tensor in self._tensors().items() if id(tensor) in self._ledger.loaded]

    def missing(self) -> dict[str, str]:
        """Return the tensors that were not loaded, with a description of what the files contained instead."""
        return {
            name: self._says(name, tensor)
            for name, tensor in self._tensors().items()
            if id(tensor) not in self._ledger.loaded and not is_derived(name)
        }

    def _says(self, name: str, tensor: Tensor) -> str:
        shape = self._ledger.unfit.get(id(tensor))
        return name if shape is None else f'{name} ({shape} in the file, {tuple(tensor.shape)} in the model)'

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    def close(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def require_all(record: LoadRecord, source: str) -> None:
    """Reject a test or a resumed run if the files contained only part of the model.

    Args:
        record: The record of what was loaded.
        source: Name of the file, for the error.

    Raises:
        WeightsError: A tensor was not loaded.
    """
    missing = record.missing()
    if not missing:
        return
    adapters = [name for name in missing if is_adapter(name)]
    hint = (
        'Use the checkpoint that was trained with this PEFT method, or leave the method out'
        if len(adapters) == len(missing)
        else 'Use a checkpoint of exactly the model in the config'
    )
    raise WeightsError(
        f'{source} lacks {len(missing)} of the {record.size} tensors of the model, such as '
        f'{some(list(missing.values()))}; they would keep their initial values. {hint}'
    )


def describe_training(injection: Any) -> dict[str, Any]:
    """Describe how a model was adapted, as plain data for a checkpoint's ``meta['iconformer_mm']``."""
    return dict(
        method=injection.method.config,
        base_dtype=injection.frozen_dtype,
        trained=injection.trained_norms(),
        selection=injection.selection.config,
        sites=list(injection.named_attachments()),
    )


def check_selection(note: Mapping[str, Any], injection: Any, source: str) -> None:
    """Check that a file adapts and trains the same parts as the model.

    Args:
        note: Result of :func:`describe_training`, or metadata that contains it.
        injection: The model's injection.
        source: Name of the file, for the error.

    Raises:
        WeightsError: The file selects other blocks or unfreezes other parameters.
    """
    try:
        theirs, ours = Selection.from_config(note.get('selection')), injection.selection
    except (ValueError, TypeError) as error:
        raise WeightsError(f'{source}: {error}') from error
    for option in ('blocks', 'unfreeze'):
        there, here = getattr(theirs, option), getattr(ours, option)
        same_blocks = option == 'blocks' and set(note.get('sites') or ()) == set(injection.named_attachments())
        if there != here and not same_blocks:
            raise WeightsError(
                f'{source} was trained with {option}={there!r}, but the model is adapted with {option}={here!r}. Use '
                'the config that it was trained with'
            )


def tell_precision(note: Mapping[str, Any], own: str | None, source: str) -> None:
    """Log a warning if a file was trained over a base in another precision than the model's.

    Args:
        note: Result of :func:`describe_training`, or metadata of an adapter file. Older ones do not say.
        own: Name of the precision of the model's base, None for that of its weights.
        source: Name of the file.
    """
    theirs = note.get('base_dtype')
    if 'base_dtype' not in note or theirs == own:
        return
    there, here = (f'a base in {name}' if name else 'a base in full precision' for name in (theirs, own))
    print_log(
        f'{source} was trained over {there}, and the model has {here}: outputs differ by rounding. For the same ones, '
        f'adapt the model with frozen_dtype={theirs!r}',
        logger='current',
        level=logging.WARNING,
    )


def recorded_training(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a checkpoint's record of how its model was adapted, or None if it has none."""
    places = [checkpoint.get('adapter_file'), checkpoint.get(NOTE), (checkpoint.get('meta') or {}).get(NOTE)]
    return next((p for p in places if isinstance(p, Mapping) and isinstance(p.get('method'), Mapping)), None)


def complete_method(method: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Complete the config of a recorded method with options that newer releases added.

    Args:
        method: The recorded config.
        source: Name of the file, for the error.

    Raises:
        WeightsError: The method or an option is unknown.
    """
    try:
        return build_method(dict(method)).config
    except (ValueError, TypeError) as error:
        raise WeightsError(f'{source}: its method {dict(method)} cannot be built: {error}') from error


def method_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Describe the difference between two complete configs of methods; empty if they are equal."""
    if theirs == ours:
        return ''
    if theirs['type'] != ours['type']:
        return f"'{theirs['type']}' there, '{ours['type']}' here"
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return f"'{ours['type']}' with " + ', '.join(f'{n}={theirs.get(n)!r} there, {ours.get(n)!r} here' for n in names)


def check_training(checkpoint: Mapping[str, Any], model: nn.Module, injection: Any, source: str, whole: bool) -> None:
    """Check that a checkpoint's PEFT method matches the model's, before anything is loaded.

    Args:
        checkpoint: The checkpoint.
        model: The bare model.
        injection: The model's injection, or None if the model is not adapted.
        source: Name of the file, for errors.
        whole: Whether the checkpoint must provide the whole model, as in tests and on resuming. If False,
            it may hold only a base.

    Raises:
        WeightsError: The methods differ.
    """
    note = recorded_training(checkpoint)
    state = checkpoint.get('state_dict', checkpoint)
    theirs = None if note is None else complete_method(note['method'], source)
    held = {re.sub(r'^module\.', '', n): v for n, v in state.items() if is_adapter(n) and isinstance(v, Tensor)}
    own = model.state_dict()
    if injection is None:
        if held.keys() - own.keys():
            how = f'with the PEFT method {theirs}' if theirs else f'with adapters, such as {min(held)}'
            raise WeightsError(
                f'{source} was trained {how}, but the model is not adapted. Name the method with --peft, or with a '
                'PEFTHook in the config'
            )
        return
    ours = injection.method.config
    own = {n: own[n] for n in injection.adapter_names() if n in own}
    if 'adapter_file' not in checkpoint:  # load_adapter compares the names in adapter files
        held = {n: v for n, v in held.items() if n in own or is_below(n, injection.backbones)}
    if not held and not whole:
        return  # a base
    if note is not None and theirs is not None:
        difference = method_difference(theirs, ours)
        if difference and (held or own):
            raise WeightsError(
                f'{source} was trained with another PEFT method: {difference}. Use the method and the options that '
                'it was trained with'
            )
        check_selection(note, injection, source)
        if 'adapter_file' not in checkpoint:
            tell_precision(note, injection.frozen_dtype, source)
    if not held and own:
        raise WeightsError(
            f"{source} holds no adapters, but the model is adapted by '{ours['type']}'. Leave the method out, or use "
            'a checkpoint that was trained with it'
        )
    if 'adapter_file' in checkpoint:
        return
    layout = [{n: tuple(v.shape) for n, v in adapters.items()} for adapters in (held, own)]
    if layout[0] != layout[1]:
        name = min(n for n in held.keys() | own.keys() if layout[0].get(n) != layout[1].get(n))
        there, here = (shapes.get(name, 'missing') for shapes in layout)
        raise WeightsError(
            f'{source} was trained with another PEFT method, or with other options than {ours}: {name} is {there} '
            f'there, {here} here. Use the method and the options that it was trained with'
        )


def check_averages(checkpoint: Mapping[str, Any], source: str, averages: bool) -> None:
    """Check the averaged weights (EMA) of a checkpoint that a run resumes from.

    Args:
        checkpoint: The checkpoint.
        source: Name of the file, for errors.
        averages: Whether the run averages weights.

    Raises:
        WeightsError: The averages are of another model, or the run would use them as raw weights.
    """
    slot = checkpoint.get('ema_state_dict')
    if slot is None:
        return
    if not averages:
        raise WeightsError(
            f'{source} was written by a run with EMAHook, so its weights are averages. Resume with the same EMAHook'
        )
    own = {f'module.{n}': tuple(v.shape) for n, v in checkpoint['state_dict'].items()}
    held = {n: tuple(v.shape) for n, v in slot.items() if n.startswith('module.')}
    wrong = sorted(n for n in own.keys() | held.keys() if own.get(n) != held.get(n) and not is_derived(n))
    if wrong:
        raise WeightsError(
            f'{source} is not a checkpoint of one model: its averaged weights (ema_state_dict) and its weights differ '
            f'in {len(wrong)} names or shapes, such as {some(wrong)}. Use another checkpoint'
        )


def some(names: list[str], limit: int = 3) -> str:
    """Join the first names for a message."""
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')
