"""Settings of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from iconformer_mm.files import expanded
from iconformer_mm.messages import hint

TOKEN_VARIABLE = 'ICONFORMER_MM_TOKEN'


@dataclass(frozen=True)
class Settings:
    """Settings of a server, as its command line or ``serve run`` gives them.

    Attributes:
        config: The config of the model: a path or ``library::path``.
        adapters: Folder of adapter files. The name of a file without ``.safetensors`` is the adapter's name.
        base: Checkpoint with the base weights. Defaults to None: the weights that the config names.
        device: Device to run on. Defaults to None: the best one available.
        trust: Whether to unpickle a base that holds more than tensors and plain data. Defaults to False.
        allow_empty: Whether to start without any adapter file. Defaults to False.
        max_batch: Largest number of images per batch. Defaults to 16.
        batch_wait_ms: Milliseconds to wait for more images when a batch is not full. Defaults to 5.
        max_adapters: Number of adapters to keep in memory. The least recently used ones leave it. Defaults to 32.
        max_waiting: Number of requests that may wait. Further ones are refused. Defaults to 256.
        max_body_mb: Largest request body in megabytes (10^6 bytes). Defaults to 16.
        max_pixels: Largest number of pixels of an image. Defaults to 25 million.
        timeout_s: Seconds for reading a request, and again for answering it. Defaults to 30.
        rescan_s: Seconds between two looks at the folder. Defaults to 1.
        threads: Threads of torch. Defaults to 0: what torch chooses.
        token_file: File with the bearer token that requests must carry. Defaults to None: the environment variable
            ``ICONFORMER_MM_TOKEN``, and no token if that is not set.
        metrics_dir: Folder in which the replicas of a machine count together. Defaults to None: each counts alone.
        replicas: Number of copies of the model that answer requests. Defaults to 1.
        cpus: CPU cores that Ray reserves for a replica. Defaults to 1.
        gpus: GPUs that Ray reserves for a replica; parts of one are allowed. Defaults to 0.
    """

    config: str
    adapters: str
    base: str | None = None
    device: str | None = None
    trust: bool = False
    allow_empty: bool = False
    max_batch: int = 16
    batch_wait_ms: float = 5.0
    max_adapters: int = 32
    max_waiting: int = 256
    max_body_mb: float = 16.0
    max_pixels: int = 25_000_000
    timeout_s: float = 30.0
    rescan_s: float = 1.0
    threads: int = 0
    token_file: str | None = None
    metrics_dir: str | None = None
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} must be above 0, got {getattr(self, name)}')
        for name in ('batch_wait_ms', 'threads', 'cpus', 'gpus'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must be 0 or more, got {getattr(self, name)}')

    @property
    def max_body(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mb * 1e6)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Settings:
        """Make settings of options by name. Text is converted, as ``serve run`` gives ``key=value``.

        Raises:
            ValueError: An option is unknown, missing, or of the wrong type.
        """
        types = get_type_hints(cls)
        for name in options:
            if name not in types:
                raise ValueError(f"unknown option '{name}' of a server{hint(name, types) or '; see Settings'}")
        for name in ('config', 'adapters'):
            if name not in options:
                raise ValueError(f"a server needs the option '{name}'")
        return cls(**{name: _converted(name, types[name], value) for name, value in options.items()})

    def check_folder(self) -> None:
        """Check that the folder of adapters exists and holds some.

        Raises:
            ValueError: It does not.
        """
        folder = expanded(self.adapters)
        if not folder.is_dir():
            raise ValueError(f'the folder of adapters {self.adapters} does not exist')
        if not self.allow_empty and not any(folder.glob('*.safetensors')):
            raise ValueError(
                f'the folder of adapters {self.adapters} holds no adapter file (*.safetensors); to start without one '
                'and add files later, allow an empty folder (--allow-empty)'
            )

    def token(self) -> str | None:
        """Read the bearer token.

        Returns:
            The token; None if requests need none.

        Raises:
            ValueError: The file cannot be read, or the token is empty.
        """
        if self.token_file is None:
            token = os.environ.get(TOKEN_VARIABLE)
            source = f'the environment variable {TOKEN_VARIABLE}'
        else:
            source = f'the token file {self.token_file}'
            try:
                token = expanded(self.token_file).read_text(encoding='utf-8')
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f'{source} cannot be read: {error}') from error
        if token is None:
            return None
        token = token.strip()
        if not token or not token.isascii() or not token.isprintable() or ' ' in token:
            raise ValueError(f'{source} holds no token: one word of printable ASCII characters is expected')
        return token


_POSITIVE = (
    'max_batch',
    'max_adapters',
    'max_waiting',
    'max_body_mb',
    'max_pixels',
    'timeout_s',
    'rescan_s',
    'replicas',
)
_WORDS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def _converted(name: str, kind: Any, value: Any) -> Any:
    """Convert the value of an option to its type."""
    if value is None or (isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool)):
        return value
    if kind is bool:
        known = value if isinstance(value, bool) else _WORDS.get(str(value).lower())
        if known is None:
            raise ValueError(f"option '{name}' must be true or false, got {value!r}")
        return known
    if kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            what = 'a whole number' if kind is int else 'a number'
            raise ValueError(f"option '{name}' must be {what}, got {value!r}") from None
    return str(value)


FIELDS = {field.name: field for field in fields(Settings)}
