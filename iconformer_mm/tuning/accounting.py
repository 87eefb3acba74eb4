"""After weights are loaded, every tensor is loaded, new and trained, or an error.

OpenMMLab loads non-strictly and only logs what did not fit. For a backbone that is trained
this costs accuracy. A frozen tensor that kept its random values can never recover, so it is
an error here. Two objects watch:

- :class:`BaseAccount` stands at an adapted backbone for as long as it is adapted, and judges each load by itself.
- :class:`LoadRecord` stands at a whole model while it is loaded, and knows afterwards what was in no file.

The functions compare what a checkpoint says of its PEFT method with the model's, before anything is loaded.
"""

from __future__ import annotations

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
from .selection import Selection

NOTE = 'iconformer_mm'  # where checkpoints keep what is ours
NO_WEIGHTS = (
    "no pre-trained weights are named (init_cfg of the backbone with type='Pretrained', or load_from): the "
    'frozen backbone would stay random'
)

# Tensors that weights may lack, by the last part of their names. None of them is learnt.
DERIVED = {
    'relative_position_index': 'indices, computed from the window size',
    'relative_coords_table': 'coordinates, computed from the window size',
    'attention_bias_idxs': 'indices, computed from the resolution',
    'attn_mask': 'computed from the input size and the shift',
    'freqs_cos': 'angles of rotary embeddings, computed from the resolution',
    'freqs_sin': 'angles of rotary embeddings, computed from the resolution',
    'num_batches_tracked': 'a counter, which no evaluation reads',
}
# Norms behind the blocks, by their names in the backbone. A dense task adds them (Swin's norm0 to norm3),
# or another pooling does (ln2, fc_norm). The weights of a classifier cannot have them, so they are trained.
OUTPUT_NORM = re.compile(r'(?:timm_model\.)?(?:norm\d*|ln\d+|fc_norm|norm_list\.\d+)\.(?:weight|bias)')


# How torch's loader reports a tensor that it could not copy.
_ERROR = re.compile(r'(?:size mismatch for |parameter named ")([^\s":]+)')


class WeightsError(RuntimeError, ValueError):
    """Weights do not fit the model, or a tensor is in none of them.

    Earlier releases raised a RuntimeError or a ValueError, so it is both.
    """


def is_derived(name: str) -> bool:
    """Whether a tensor is computed from the model's geometry or counts steps, so that weights may lack it."""
    return name.rpartition('.')[2] in DERIVED


def output_norms(backbone: nn.Module) -> set[str]:
    """Names of the parameters of a backbone's output norms.

    Args:
        backbone: The backbone.
    """
    names = set()
    for name, module in backbone.named_modules():
        # A BatchNorm would also need statistics, which a frozen backbone does not gather.
        if 'norm' in type(module).__name__.lower() and not isinstance(module, _BatchNorm):
            names |= {f'{name}.{local}' for local, _ in module.named_parameters(recurse=False)}
    return {name for name in names if OUTPUT_NORM.fullmatch(name)}


def base_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that weights have to give a backbone, by their names in it.

    Parameters and buffers, without adapters and without what is computed (:data:`DERIVED`).

    Args:
        backbone: The backbone.
    """
    state = backbone.state_dict()
    return {name: value for name, value in state.items() if not is_adapter(name) and not is_derived(name)}


def base_buffers(backbone: nn.Module) -> dict[str, Tensor]:
    """The buffers among :func:`base_tensors`: running statistics and the like.

    Args:
        backbone: The backbone.
    """
    parameters = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    return {n: v for n, v in base_tensors(backbone).items() if n not in parameters and v.is_floating_point()}


class BaseAccount:
    """Watches what is loaded into an adapted backbone, and refuses loads that leave frozen tensors random.

    A load that brings any of the base has to bring all of it: parameters and buffers. Excepted are
    tensors that are computed (:data:`DERIVED`), those that are trained in place, and
    output norms (:data:`OUTPUT_NORM`): where the weights lack those, they are trained.
    Loads of adapters alone, or of what stands beside the backbone, pass.

    Position embeddings of another size are resized by timm's own functions where the host is
    one of timm's, as timm does when it loads weights itself.

    Args:
        backbone: The backbone.
        injection: What was injected into it.
        blocks: Names of the adapted blocks.
    """

    def __init__(self, backbone: nn.Module, injection: Any, blocks: Iterable[str] = ()) -> None:
        self._backbone = backbone
        self._injection = injection
        self._blocks = tuple(f'{name}.' for name in blocks)
        # timm loads `pretrained` and `checkpoint_path` as it builds a model, which no hook sees.
        self.given = bool(getattr(backbone, 'is_init', False))
        self.loaded: set[str] = set()
        # Output norms that the weights lack. Pinned, a file has said which are trained.
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
            restore: Whether output norms that were trained get the values back that they began with.
                Defaults to True.
        """
        for handle in self._handles:
            handle.remove()
        parameters = dict(self._backbone.named_parameters())
        for name in self.norms if restore else ():
            parameters[name].data.copy_(self._norm_values[name])

    def norm_values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the output norms that are trained: those that they began with, and the present ones."""
        parameters = dict(self._backbone.named_parameters())
        begun = {name: self._norm_values[name].clone() for name in sorted(self.norms)}
        return begun, {name: parameters[name].detach().clone() for name in sorted(self.norms)}

    def train_norms(self, names: set[str]) -> None:
        """Train these output norms in place, and no others.

        Args:
            names: Names of their parameters in the backbone.
        """
        parameters = dict(self._backbone.named_parameters())
        for name in names - self.norms:
            self._norm_values[name] = parameters[name].detach().clone()
            parameters[name].requires_grad_(True)
        for name in self.norms - names:
            parameters[name].requires_grad_(False)
        self.norms.intersection_update(names)  # in place: what freezes the backbone knows this very set
        self.norms.update(names)

    @property
    def missing(self) -> list[str]:
        """Frozen tensors that no load has brought."""
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
            if is_derived(name):
                del state_dict[prefix + name]  # the model's own is right for its size
            elif name in trained:
                del state_dict[prefix + name]
                print_log(
                    f'{name} is trained anew: the weights have it as {tuple(value.shape)}, the model as '
                    f'{tuple(own.shape)}',
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
        """Names in the backbone of the active adapter's tensors."""
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
            (foreign, 'that the model has not'),
            (sorted(adapters & unfit.keys()), 'of another shape'),
            (sorted(absent), 'less than the model has'),
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
                f'{unfit[wrong[0]].strip()} Give the weights of the very architecture in the '
                f'config{self._remedy(wrong)}.'
            )
        norms = output_norms(self._backbone) & (needed | self.norms)
        if not needed & arrived:
            if not unexpected and (self._prefix or arrived):
                return  # adapters alone, or the weights of something beside the backbone
            absent = sorted(needed)
        else:
            absent = sorted((needed & missing) - norms)
        if absent:
            raise WeightsError(
                f'wrong pre-trained weights for {kind}: {len(absent)} of {len(needed)} frozen tensors are missing, '
                f'among them {some(absent)}'
                + (f'; the file has {some(unexpected)} instead' if unexpected else '')
                + '. They would stay at their random values for good. Convert the file to the names of this '
                "class, or give the right `prefix` in `init_cfg=dict(type='Pretrained', ...)`"
                f'{self._remedy(absent)}.'
            )
        self._settle_norms(norms & missing, norms & arrived)

    def _settle_norms(self, new: set[str], loaded: set[str]) -> None:
        """Train the output norms that the weights lack, and freeze again those that later weights have."""
        if self.pinned or not new | (loaded & self.norms):
            return
        if new:
            print_log(f'the weights have no {some(sorted(new))}: these output norms are trained', logger='current')
        self.train_norms((self.norms - loaded) | new)

    def _remedy(self, names: list[str]) -> str:
        """What else can be done where the blocks are whole."""
        if not self._blocks or any(name.startswith(self._blocks) for name in names):
            return ''
        patterns = dict.fromkeys(name.partition('.')[0] + ('.*' if '.' in name else '') for name in names)
        return f', or train those tensors from scratch, with unfreeze={list(patterns)}'


def adopt_output_norms(injection: Any, names: Iterable[str]) -> None:
    """Train the output norms that a file of ours has as trained, and no others.

    Args:
        injection: What was injected into the model.
        names: Base parameters that the file has as trained, by their names in the backbone.
    """
    wanted = set(names)
    for path, account in injection.accounts.items():
        backbone = injection.backbones[path]
        named = injection.trained[path].names if path in injection.trained else ()
        norms = {n for n in output_norms(backbone) if injection.full_name(path, n) in wanted} - set(named)
        account.train_norms(norms)
        account.pinned = True


def _resized(backbone: nn.Module, name: str, value: Tensor, own: Tensor) -> Tensor:
    """A position embedding in the model's size, by the function that timm has beside the host's class."""
    path, _, local = name.rpartition('.')
    if local not in ('pos_embed', 'relative_position_bias_table'):
        return value
    owner = backbone.get_submodule(path)
    # Looked up, not imported: a host of timm's has loaded it.
    module = type(owner).__module__
    resize = getattr(sys.modules[module], 'checkpoint_filter_fn', None) if module.startswith('timm.') else None
    if resize is None:
        return value
    try:
        resized = resize({local: value}, owner).get(local)
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError, AssertionError):
        return value  # which is refused for its shape
    if resized is None or resized.shape != own.shape:
        return value
    print_log(f'{name} is resized from {tuple(value.shape)} to {tuple(own.shape)}', logger='current')
    return resized


class _Ledger:
    """What the loads so far brought, by the identity of tensors. It holds no module: hooks are copied with theirs."""

    def __init__(self) -> None:
        self.begun = False
        self.loaded: set[int] = set()
        self.unfit: dict[int, tuple[int, ...]] = {}

    def enter(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Enter what a load has for a module's own tensors."""
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
    """Knows which tensors of a model were loaded, whichever module the loads began at.

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
        """Whether there was any load."""
        return self._ledger.begun

    @property
    def size(self) -> int:
        """How many tensors there are."""
        return len(self._tensors())

    def note(self, names: Iterable[str]) -> None:
        """Enter tensors that were filled by other means, by their names in the model; others are passed over."""
        self._ledger.begun = True
        own = self._tensors()
        self._ledger.loaded |= {id(own[name]) for name in names if name in own}

    def restart(self) -> None:
        """Forget the loads so far: what comes now has to be complete."""
        self._ledger.loaded.clear()
        self._ledger.unfit.clear()

    def loaded(self) -> list[str]:
        """Names of the tensors that were loaded."""
        return [name for name, tensor in self._tensors().items() if id(tensor) in self._ledger.loaded]

    def missing(self) -> dict[str, str]:
        """Tensors that were not loaded, with what there was instead."""
        return {
            name: self._says(name, tensor)
            for name, tensor in self._tensors().items()
            if id(tensor) not in self._ledger.loaded and not is_derived(name)
        }

    def _says(self, name: str, tensor: Tensor) -> str:
        shape = self._ledger.unfit.get(id(tensor))
        return name if shape is None else f'{name} (there {shape}, here {tuple(tensor.shape)})'

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    def close(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def require_all(record: LoadRecord, source: str) -> None:
    """Refuse a model to be tested, or resumed, of which the files had only a part.

    Args:
        record: What was loaded.
        source: The file, for the error.

    Raises:
        WeightsError: A tensor was not loaded.
    """
    missing = record.missing()
    if not missing:
        return
    adapters = [name for name in missing if is_adapter(name)]
    hint = (
        'Give the checkpoint that was trained with this PEFT method, or leave the method out'
        if len(adapters) == len(missing)
        else 'Give a checkpoint of the very model in the config'
    )
    raise WeightsError(
        f'{source} lacks {len(missing)} of the {record.size} tensors of the model, such as '
        f'{some(list(missing.values()))}; they would stay as they were initialised. {hint}'
    )


def describe_training(injection: Any) -> dict[str, Any]:
    """What a checkpoint keeps of how its model was adapted: plain data, in ``meta['iconformer_mm']``."""
    return dict(
        method=injection.method.config,
        trained=injection.trained_norms(),
        selection=injection.selection.config,
        sites=list(injection.named_attachments()),
    )


def check_selection(note: Mapping[str, Any], injection: Any, source: str) -> None:
    """Compare what a file adapts and trains with what the model does.

    Args:
        note: What :func:`describe_training` gave, or metadata with it.
        injection: What was injected into the model.
        source: The file, for the error.

    Raises:
        WeightsError: It is something else.
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
                f'{source} was trained with {option}={there!r}, the model is adapted with {option}={here!r}: give the '
                'config that it was trained by'
            )


def recorded_training(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a checkpoint says of how its model was adapted, None for one that does not."""
    places = [checkpoint.get('adapter_file'), checkpoint.get(NOTE), (checkpoint.get('meta') or {}).get(NOTE)]
    return next((p for p in places if isinstance(p, Mapping) and isinstance(p.get('method'), Mapping)), None)


def complete_method(method: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config of a recorded method, with options that came after it was written.

    Args:
        method: The config.
        source: The file, for the error.

    Raises:
        WeightsError: The method or an option is unknown here.
    """
    try:
        return build_method(dict(method)).config
    except (ValueError, TypeError) as error:
        raise WeightsError(f'{source}: its method {dict(method)} cannot be carried out: {error}') from error


def method_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What tells two complete configs of methods apart, in words; empty if nothing does."""
    if theirs == ours:
        return ''
    if theirs['type'] != ours['type']:
        return f"'{theirs['type']}' there, '{ours['type']}' here"
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return f"'{ours['type']}' with " + ', '.join(f'{n}={theirs.get(n)!r} there, {ours.get(n)!r} here' for n in names)


def check_training(checkpoint: Mapping[str, Any], model: nn.Module, injection: Any, source: str, whole: bool) -> None:
    """Compare a checkpoint's PEFT method with the model's, before anything is loaded.

    Args:
        checkpoint: The checkpoint.
        model: The bare model.
        injection: What was injected into it; None for an unadapted one.
        source: The file, for errors.
        whole: Whether the model has to come from this checkpoint alone, as in tests and on resuming; else it
            may be a base.

    Raises:
        WeightsError: They differ.
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
                f'{source} was trained {how}, but the model is not adapted. Name the method: --peft, or a PEFTHook in '
                'the config'
            )
        return
    ours = injection.method.config
    own = {n: own[n] for n in injection.adapter_names() if n in own}
    if 'adapter_file' not in checkpoint:  # its names are those of files, which load_adapter compares
        held = {n: v for n, v in held.items() if n in own or is_below(n, injection.backbones)}
    if not held and not whole:
        return  # a base
    if note is not None and theirs is not None:
        difference = method_difference(theirs, ours)
        if difference and (held or own):
            raise WeightsError(
                f'{source} was trained with another PEFT method: {difference}. Give the method and the options that '
                'it was trained with'
            )
        check_selection(note, injection, source)
    if not held and own:
        raise WeightsError(
            f"{source} holds no adapters, but the model is adapted by '{ours['type']}'. Leave the method out, or give "
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
            f'there, {here} here. Give the method and the options that it was trained with'
        )


def check_averages(checkpoint: Mapping[str, Any], source: str, averages: bool) -> None:
    """Check the averaged weights (EMA) of a checkpoint that a run resumes from.

    Args:
        checkpoint: The checkpoint.
        source: The file, for errors.
        averages: Whether the run averages weights.

    Raises:
        WeightsError: They are not those of the same model, or the run would take them for the raw ones.
    """
    slot = checkpoint.get('ema_state_dict')
    if slot is None:
        return
    if not averages:
        raise WeightsError(
            f'{source} was written by a run with EMAHook, and its weights are averages. Resume with the same EMAHook'
        )
    own = {f'module.{n}': tuple(v.shape) for n, v in checkpoint['state_dict'].items()}
    held = {n: tuple(v.shape) for n, v in slot.items() if n.startswith('module.')}
    wrong = sorted(n for n in own.keys() | held.keys() if own.get(n) != held.get(n) and not is_derived(n))
    if wrong:
        raise WeightsError(
            f'{source} is no checkpoint of one model: its averaged weights (ema_state_dict) and its weights differ in '
            f'{len(wrong)} names or shapes, such as {some(wrong)}. Take another checkpoint'
        )


def some(names: list[str], limit: int = 3) -> str:
    """The first of some names."""
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')
