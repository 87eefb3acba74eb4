"""What hosts write to in a forward pass, and share among all threads."""

from __future__ import annotations

import functools
import threading
from typing import Any, Protocol

from torch import nn

from .calls import PerThread
from .families import class_path

_DDQ = 'mmdet.models.detectors.ddq_detr.DDQDETR'
_DDQ_VALUES = 'cache_dict'
_TOKENIZER = 'PreTrainedTokenizerBase'  # of transformers, whose module differs among releases
_tokenizing = threading.RLock()


class SharedState(Protocol):
    """A part of a host that threads share safely until it is released."""

    def release(self) -> None:
        """Restore what the host had."""


class CallValues:
    """Stands for the dictionary that all modules of a DDQ-DETR share, with values of its own for every thread.

    The decoder notes there which queries are distinct, and the head reads that. With one dictionary, the head of one
    thread would read what the decoder of another has noted.

    Args:
        detector: The DDQ-DETR. All its modules get this object in the place of the dictionary.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._shared: dict[str, Any] = vars(detector)[_DDQ_VALUES]
        self._own = PerThread()
        self._users = [module for module in detector.modules() if vars(module).get(_DDQ_VALUES) is self._shared]
        self._put(self)

    def __getitem__(self, key: str) -> Any:
        own = self._own.value or {}
        return own[key] if key in own else self._shared[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._own.value = {**(self._own.value or {}), key: value}

    def release(self) -> None:
        """Restore the dictionary, with the values of the calling thread."""
        self._shared.update(self._own.value or {})
        self._put(self._shared)

    def _put(self, values: Any) -> None:
        for module in self._users:
            vars(module)[_DDQ_VALUES] = values


class SerialTokenizer:
    """Stands for a tokenizer of transformers, which one thread at a time calls.

    Each call sets the padding and truncation of the tokenizer. If another thread encodes with it, it raises
    "Already borrowed".

    Args:
        module: The module that has the tokenizer.
        name: Name of the attribute.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._tokenizer: Any = vars(module)[name]
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize."""
        with _tokenizing:
            return self._tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):  # also while a copy has no attributes yet
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        found = getattr(self._tokenizer, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _tokenizing:
                return found(*args, **kwargs)

        return call

    def release(self) -> None:
        """Restore the tokenizer."""
        vars(self._module)[self._name] = self._tokenizer


def make_shareable(model: nn.Module) -> list[SharedState]:
    """Let threads share the DDQ-DETRs and the tokenizers of a model."""
    found: list[SharedState] = []
    for module in model.modules():
        if any(class_path(cls) == _DDQ for cls in type(module).__mro__) and type(vars(module).get(_DDQ_VALUES)) is dict:
            found.append(CallValues(module))
        for name, value in list(vars(module).items()):
            if any(cls.__name__ == _TOKENIZER for cls in type(value).__mro__):
                found.append(SerialTokenizer(module, name))
    return found
