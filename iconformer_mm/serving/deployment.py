"""The server on Ray Serve.

On a cluster: ``serve run iconformer_mm.serving.deployment:build config=CONFIG adapters=DIR``.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from .app import Service, create_app
from .metrics import FOLDER_VARIABLE
from .settings import TOKEN_VARIABLE, Settings

NAME = 'iconformer'


class Replica:
    """A copy of the model with the web application.

    Args:
        settings: The settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._service = Service(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Make the application, as Ray asks for it once per replica."""
        return create_app(self._service)

    def check_health(self) -> None:
        """Have Ray replace a replica that no longer answers.

        Raises:
            RuntimeError: It does not.
        """
        if not self._service.healthy:
            raise RuntimeError('the model thread has ended')


def build(options: dict[str, Any]) -> serve.Application:
    """Make the application of a server.

    Args:
        options: :class:`~iconformer_mm.serving.settings.Settings` by name, as text or of their types.

    Raises:
        ValueError: An option is unknown, missing or wrong, or there is no adapter file.
    """
    settings = Settings.from_options(options)
    settings.check_folder()
    settings.token()
    names = (TOKEN_VARIABLE, 'ICONFORMER_MM_CACHE')
    variables = {name: os.environ[name] for name in names if os.environ.get(name)}
    if settings.metrics_dir is not None:
        variables[FOLDER_VARIABLE] = settings.metrics_dir
    deployment = serve.deployment(
        name=NAME,
        num_replicas=settings.replicas,
        # The batcher counts what waits and answers for itself. Ray's limit is above, so its own is never reached.
        max_ongoing_requests=settings.max_waiting + 4 * settings.max_batch,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=2 * settings.timeout_s,
        health_check_period_s=2,
        max_constructor_retry_count=1,  # a wrong config stays wrong
        ray_actor_options=dict(num_cpus=settings.cpus, num_gpus=settings.gpus, runtime_env=dict(env_vars=variables)),
    )
    return deployment(serve.ingress()(Replica)).bind(settings)
