"""Serve the adapters of a folder over HTTP, from one base.

iconformer serve --config CONFIG --adapters DIR [--base BASE]
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from iconformer_mm.engine import load_config
from iconformer_mm.extras import require_extra
from iconformer_mm.files import expanded
from iconformer_mm.inference.ray_cluster import connected
from iconformer_mm.messages import one_line
from iconformer_mm.serving.folder import check_readable
from iconformer_mm.serving.settings import FIELDS, TOKEN_VARIABLE, Settings

from .errors import user_errors
from .parser import TRUST, Parser, guard

LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('--config', required=True, help='config of the model: path or library::path')
    parser.add_argument(
        '--adapters', required=True, help='folder of adapter files; it may change while they are served'
    )
    parser.add_argument('--base', help="checkpoint with the base weights (default: the config's pre-trained ones)")
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: 127.0.0.1, this machine)')
    parser.add_argument('--port', type=int, default=8000, help='port to listen on (default: 8000)')
    parser.add_argument('--token-file', help=f'file with the bearer token (default: the variable {TOKEN_VARIABLE})')
    parser.add_argument('--allow-empty', action='store_true', help='start even if there is no adapter file yet')
    parser.add_argument('--device', help='where to run (default: the best there is)')
    parser.add_argument('--threads', type=int, default=FIELDS['threads'].default, help='threads of torch')
    parser.add_argument('--ray-address', help='address of a Ray cluster to serve on (default: one on this machine)')
    parser.add_argument(
        TRUST, action='store_true', help='unpickle the base (.pth) even if that could execute code in it'
    )
    for name, text in (
        ('max-batch', 'images per batch'),
        ('batch-wait-ms', 'milliseconds to wait for a full batch'),
        ('max-adapters', 'adapters in memory'),
        ('max-waiting', 'requests that may wait'),
        ('max-body-mb', 'megabytes per request'),
        ('max-pixels', 'pixels per image'),
        ('timeout-s', 'seconds per request'),
        ('rescan-s', 'seconds between two looks at the folder'),
        ('replicas', 'copies of the model'),
        ('cpus', 'CPU cores per copy'),
        ('gpus', 'GPUs per copy'),
    ):
        default = FIELDS[name.replace('-', '_')].default
        parser.add_argument(f'--{name}', type=type(default), default=default, help=f'{text} (default: {default:g})')
    return parser.parse_args(argv)


def check_port(host: str, port: int) -> None:
    """Check that a port can be listened on.

    Raises:
        ValueError: It is in use, or the address is not one of this machine.
    """
    if not 0 < port < 65536:
        raise ValueError(f'--port must be from 1 to 65535, got {port}')
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f'cannot listen on {host}:{port} ({error.strerror}); give another --port or --host') from None


def settings_of(args: argparse.Namespace) -> Settings:
    """Make settings of the command line."""
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Settings) if hasattr(args, field.name)
    }
    return Settings(**given, trust=args.trust_checkpoints)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command until SIGTERM or Ctrl-C; requests that were accepted are answered first."""
    args = parse_args(argv)
    require_extra('ray', 'serving')
    guard(args)
    console = Console(stderr=True)
    settings = settings_of(args)
    settings.check_folder()
    if not settings.allow_empty:
        check_readable(settings.adapters)
    token = settings.token()
    load_config(settings.config)
    if settings.base is not None and not expanded(settings.base).is_file():
        raise FileNotFoundError(f'the base {settings.base} does not exist')
    if args.ray_address is None:
        check_port(args.host, args.port)
    if token is None and args.host not in LOOPBACK:
        console.print(
            f'warning: anyone who reaches {args.host} can use the server; give a token (--token-file)', style='yellow'
        )
    with tempfile.TemporaryDirectory(prefix='iconformer-metrics-') as counts:
        if args.ray_address is None:  # replicas on other machines have no such folder
            settings = dataclasses.replace(settings, metrics_dir=counts)
        cpus = max(2, math.ceil(settings.replicas * settings.cpus) + 1)
        with connected(args.ray_address, **({} if args.ray_address else dict(num_cpus=cpus))):
            _serve(args, settings, console)


def _serve(args: argparse.Namespace, settings: Settings, console: Console) -> None:
    """Serve until a signal comes. Ray is connected."""
    from ray import serve

    from iconformer_mm.serving.deployment import NAME, build

    logging.getLogger('ray.serve').setLevel(logging.ERROR)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(number, lambda *_: stop.set())
    try:
        console.print('loading the base ...')
        serve.start(http_options=dict(host=args.host, port=args.port))
        try:
            serve.run(build(dataclasses.asdict(settings)), name=NAME)
        except RuntimeError:
            raise ValueError(_reason(serve, NAME)) from None
        host = f'[{args.host}]' if ':' in args.host else args.host
        console.print(f'serving {settings.adapters} on http://{host}:{args.port}', soft_wrap=True, markup=False)
        stop.wait()
        console.print('finishing the requests that were accepted ...')
        serve.delete(NAME)
    finally:
        if args.ray_address is None:
            serve.shutdown()


def _reason(serve: Any, name: str) -> str:
    """Why an application could not be started: the last line of what its replica raised."""
    application = serve.status().applications.get(name)
    messages = [application.message] if application else []
    messages += [deployment.message for deployment in application.deployments.values()] if application else []
    for message in reversed(messages):
        lines = [line.strip() for line in message.splitlines() if 'Error: ' in line]
        if lines:
            return one_line(lines[-1].partition('Error: ')[2])
    return 'the server could not be started: ' + one_line(messages[0] if messages else 'Ray gave no reason')[:500]
