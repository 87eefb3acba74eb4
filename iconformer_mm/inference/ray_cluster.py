"""Connecting to Ray: a cluster, or one that is started on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from iconformer_mm.extras import require_extra
from iconformer_mm.messages import one_line

_WAIT_S = 5.0
_TRIES = 3


@contextmanager
def connected(address: str | None = None, **options: Any) -> Iterator[None]:
    """Be connected to a Ray cluster within the context, or to one that is started for it.

    A cluster that is started here listens on the loopback interface, sends no usage statistics and has no dashboard. It
    ends with the context.

    Args:
        address: ``HOST:PORT`` of the cluster's head, ``ray://HOST:PORT``, or ``'auto'`` for one that runs on this
            machine. Defaults to None: start one.
        **options: Options of ``ray.init`` for a cluster that is started here.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: No cluster answers at the address.
    """
    require_extra('ray', 'Ray')
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    if address is None:
        # Whoever reaches the ports of a cluster can run code on it. Ray asks for a token, which other users of this
        # machine lack. And the ports are on the loopback interface, if Ray is imported here first.
        os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'
        if not os.environ.keys() & {'RAY_AUTH_MODE', 'RAY_AUTH_TOKEN', 'RAY_AUTH_TOKEN_PATH'}:
            os.environ['RAY_AUTH_TOKEN'] = secrets.token_hex(32)
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')  # keep GPUs visible to tasks that reserve none
    import ray

    quiet = dict(logging_level=logging.ERROR, log_to_driver=False)
    if address is not None:
        _join(ray, address, quiet)
    else:
        _start(ray, dict(include_dashboard=False, **quiet, **options))
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, options: dict[str, Any]) -> None:
    """Start a cluster on this machine. Ray gives up after 30 s, which a busy machine exceeds.

    Raises:
        ValueError: It cannot be started.
    """
    for attempt in range(_TRIES):
        try:
            ray.init(**options)
            return
        except Exception as error:  # plain exceptions, with all kinds of reasons
            ray.shutdown()
            if attempt == _TRIES - 1:
                raise ValueError(f'Ray cannot be started on this machine: {one_line(error)[:500]}') from error


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    if address != 'auto':
        _probe(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"no Ray cluster was found at '{address}' ({one_line(error)[:200]}); start one with `ray start "
            '--head`, or leave the address out to use this machine'
        ) from None


def _probe(address: str) -> None:
    """Check that something listens at an address, since Ray tries for minutes.

    Raises:
        ValueError: The address is not HOST:PORT, or nothing listens.
    """
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"the address of a Ray cluster must be HOST:PORT, ray://HOST:PORT or auto, got '{address}'")
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=_WAIT_S).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at '{address}' ({error.strerror or error}); start one with `ray start --head`, or "
            'leave the address out to use this machine'
        ) from None
