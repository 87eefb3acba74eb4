"""The web application. It knows nothing of Ray, so any ASGI server can run it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from mmengine.registry import init_default_scope
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from iconformer_mm.inference.predictions import (
    SCORE_THRESHOLD,
    TOP_LABELS,
    check_finite,
    draw_prediction,
    encode_prediction,
)
from iconformer_mm.messages import one_line
from iconformer_mm.version import __version__

from .batching import Batcher
from .errors import RequestError
from .images import decode_base64, decode_image
from .metrics import CONTENT_TYPE, Metrics
from .model import Job, Prediction, ServedModel
from .settings import Settings

_LOG = logging.getLogger(__name__)
_CODES = {404: 'not_found', 405: 'method_not_allowed'}


class Options(BaseModel):
    """What to answer with."""

    model_config = ConfigDict(extra='forbid')

    score: float = Field(SCORE_THRESHOLD, ge=0, le=1, description='Smallest score of instances.')
    top_k: int = Field(TOP_LABELS, ge=1, le=1000, description='Number of labels of a classification.')
    maps: bool = Field(True, description='Whether to include masks and maps.')
    picture: bool = Field(False, description='Whether to include a drawing of the prediction.')


class PredictionRequest(BaseModel):
    """The JSON form of a request."""

    model_config = ConfigDict(extra='forbid')

    image: str = Field(description='Base64 of a JPEG, PNG, WebP or BMP file.')
    options: Options = Options()


class Service:
    """Answers requests for predictions.

    Args:
        settings: The settings.

    Raises:
        ValueError: The settings, the config or the base are wrong, or none of the adapter files can be served.
        FileNotFoundError: The config or the base does not exist.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.token = settings.token()
        settings.check_folder()
        self.model = ServedModel(settings)
        self.model.folder.scan()
        entries = self.model.folder.entries
        if entries and all(entry.refused for entry in entries) and not settings.allow_empty:
            raise ValueError(
                f'none of the adapter files in {settings.adapters} can be served: {entries[0].name}: '
                f'{entries[0].refused}'
            )
        self.metrics = Metrics()
        self._drawing = threading.Lock()
        wait_s = settings.batch_wait_ms / 1000
        self.batcher = Batcher(self._run, settings.max_batch, wait_s, settings.max_waiting)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix='images', initializer=self._enter_scope)
        self._scanning: asyncio.Task | None = None

    def _enter_scope(self) -> None:
        init_default_scope(self.model.scope)

    async def start(self) -> None:
        """Begin to answer, and to follow the folder."""
        self.batcher.start()
        self._scanning = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Finish what waits, and end."""
        if self._scanning is not None:
            self._scanning.cancel()
            with suppress(asyncio.CancelledError):
                await self._scanning
        await self.batcher.close()
        self._pool.shutdown()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.rescan_s)
            try:
                await loop.run_in_executor(None, self.model.folder.scan)
            except Exception:
                _LOG.exception('the folder of adapters cannot be looked at')

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self.batcher.alive

    def _run(self, jobs: list[Job]) -> list[Any]:
        loads = self.model.num_loads
        results = self.model.predict(jobs)
        self.metrics.batch_size.observe(len(jobs))
        self.metrics.adapters_per_batch.observe(len({job.adapter for job in jobs}))
        self.metrics.loads.inc(self.model.num_loads - loads)
        self.metrics.loaded.set(len(self.model.loaded))
        return results

    async def predict(self, adapter: str, image: Callable[[], bytes], options: Options) -> dict[str, Any]:
        """Predict on an image.

        Args:
            adapter: Name of the adapter.
            image: Returns the bytes of the image. It is called once.
            options: What to answer with.

        Raises:
            RequestError: The request cannot be answered.
        """
        self.model.folder.get(adapter)  # before anything is decoded
        loop = asyncio.get_running_loop()
        size, pixels, batch = await loop.run_in_executor(self._pool, self._prepare, image, options.picture)
        self.metrics.waiting.set(self.batcher.waiting + 1)
        try:
            prediction = await self.batcher.submit(Job(adapter, batch))
        finally:
            self.metrics.waiting.set(self.batcher.waiting)
        answer = await loop.run_in_executor(self._pool, self._encode, pixels, prediction, options)
        return dict(adapter=adapter, version=prediction.version, **size, **answer)

    def _prepare(
        self, image: Callable[[], bytes], keep: bool
    ) -> tuple[dict[str, int], np.ndarray | None, dict[str, Any]]:
        """Decode an image and run the pipeline; return its size, its pixels if they are kept, and the batch."""
        pixels = decode_image(image(), self.settings.max_pixels)
        height, width = pixels.shape[:2]
        return dict(width=width, height=height), pixels if keep else None, self.model.prepare(pixels)

    def _encode(self, image: np.ndarray | None, prediction: Prediction, options: Options) -> dict[str, Any]:
        classes = prediction.meta.get('classes')
        encoded = encode_prediction(prediction.sample, classes, options.score, options.top_k, options.maps)
        try:
            check_finite(encoded)
        except ValueError as error:
            raise RequestError(500, 'not_finite', str(error)) from None
        if image is not None:
            encoded['picture'] = self._draw(image, prediction, options.score)
        return encoded

    def _draw(self, image: np.ndarray, prediction: Prediction, score: float) -> str:
        """Draw a prediction; return base64 of a PNG."""
        with self._drawing, tempfile.TemporaryDirectory() as folder:  # the visualizers share figures
            path = Path(folder, 'picture.png')
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            draw_prediction(rgb, prediction.sample, path, prediction.meta, score)
            return base64.b64encode(path.read_bytes()).decode('ascii')


def create_app(service: Service) -> FastAPI:
    """Make the web application of a service.

    Args:
        service: The service. The application starts and closes it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title='iconformer_mm',
        version=__version__,
        description='Predictions by the adapters of one base.',
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from another server
        redoc_url=None,
    )
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _refuse_unknown)

    async def authorised(request: Request) -> None:
        if service.token is None:
            return
        scheme, _, given = request.headers.get('authorization', '').partition(' ')
        given_bytes = given.strip().encode('utf-8', 'replace')
        if scheme.lower() != 'bearer' or not hmac.compare_digest(given_bytes, service.token.encode()):
            raise RequestError(401, 'unauthorized', 'a valid bearer token is needed: Authorization: Bearer TOKEN')

    protected = [Depends(authorised)]

    @app.post(
        '/v1/predict/{adapter}', dependencies=protected, summary='Predict on an image', openapi_extra=_request_body()
    )
    async def predict(adapter: str, request: Request) -> JSONResponse:
        """Send the bytes of an image with the options in the query, or JSON with both."""
        began = time.perf_counter()
        code, name = 'internal', ''
        try:
            service.model.folder.get(adapter)
            name = adapter  # of those that exist, or metrics would grow with each misspelt one
            image, options = await _within(_read(request, service.settings), service.settings, 408, 'reading')
            content = await _within(service.predict(adapter, image, options), service.settings, 504, 'answering')
            code = 'ok'
            return JSONResponse(content)
        except RequestError as error:
            code = error.code
            raise
        finally:
            service.metrics.requests.labels(name, code).inc()
            service.metrics.seconds.observe(time.perf_counter() - began)

    @app.get('/v1/adapters', dependencies=protected, summary='List the adapters')
    async def adapters() -> dict[str, Any]:
        """List the adapters of the folder. ``refused`` says why one is not served."""
        loaded = set(service.model.loaded)
        entries = service.model.folder.entries
        return dict(adapters=[dict(entry.describe(), loaded=entry.name in loaded) for entry in entries])

    @app.get('/healthz', summary='Whether the server answers requests')
    async def healthz() -> JSONResponse:
        """200 if requests are answered, else 503."""
        status = 'ok' if service.healthy else 'draining'
        served = sum(entry.refused is None for entry in service.model.folder.entries)
        return JSONResponse(dict(status=status, adapters=served), 200 if service.healthy else 503)

    @app.get('/metrics', dependencies=protected, summary="Metrics in Prometheus's format")
    async def metrics() -> Response:
        """Counters of all replicas on the machine that answers."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    for path, page in (('/', 'index.html'), ('/docs', 'docs.html')):
        app.get(path, include_in_schema=False)(_page(page))
    return app


def _page(name: str) -> Callable[[], Awaitable[HTMLResponse]]:
    """Make an endpoint of a page. The browser may run the page's own script only."""
    text = files(__package__).joinpath('pages', name).read_text(encoding='utf-8')
    script = re.findall(r'<script>(.*?)</script>', text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    async def endpoint() -> HTMLResponse:
        return HTMLResponse(text, headers={'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff'})

    return endpoint


async def _within(work: Awaitable[Any], settings: Settings, status: int, what: str) -> Any:
    """Wait for something, but not for long.

    Raises:
        RequestError: It took too long.
    """
    try:
        return await asyncio.wait_for(work, settings.timeout_s)
    except asyncio.TimeoutError:
        message = f'{what} the request took longer than {settings.timeout_s:g} s'
        raise RequestError(status, 'timeout', message) from None


async def _read(request: Request, settings: Settings) -> tuple[Callable[[], bytes], Options]:
    """Read a request: what returns its image, and its options.

    The image is returned once and then forgotten, so that requests which wait hold no more than the model needs.

    Raises:
        RequestError: It is too large or not of the right form.
    """
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    is_json = kind == 'application/json'
    if not is_json and not kind.startswith('image/') and kind != 'application/octet-stream':
        raise RequestError(
            415,
            'unsupported_type',
            f'the content type {one_line(kind)[:100]!r} is not supported; send image/*, application/octet-stream or '
            'application/json',
        )
    body = await _body(request, settings.max_body)
    try:
        if is_json:
            if request.query_params:
                raise RequestError(422, 'bad_options', 'a JSON request has its options in `options`, not in the query')
            content = PredictionRequest.model_validate_json(body)
            texts, options = [content.image], content.options
            return lambda: decode_base64(texts.pop()), options
        return [body].pop, Options.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise _invalid(error) from None


async def _body(request: Request, limit: int) -> bytes:
    """Read the body, up to a limit.

    Raises:
        RequestError: It is larger.
    """
    too_large = RequestError(413, 'body_too_large', f'the body is larger than {limit} bytes')
    declared = request.headers.get('content-length', '')
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = '.'.join(map(str, first['loc']))
    if first['type'] == 'json_invalid':
        return RequestError(400, 'bad_json', one_line(first['msg'])[:300])
    return RequestError(422, 'bad_options', one_line(f'{where}: {first["msg"]}' if where else first['msg'])[:300])


def _request_body() -> dict[str, Any]:
    """The part of the OpenAPI description that FastAPI cannot see."""
    schema = PredictionRequest.model_json_schema()
    options = schema.pop('$defs')['Options']
    schema['properties']['options'] = options
    binary = dict(schema=dict(type='string', format='binary'))
    content = {'application/json': dict(schema=schema), 'image/*': binary, 'application/octet-stream': binary}
    query = [
        {'in': 'query', 'name': name, 'description': each['description'], 'schema': each}
        for name, each in options['properties'].items()
    ]
    return dict(requestBody=dict(content=content, required=True), parameters=query)


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(dict(error=dict(code=code, message=one_line(message))), status, headers)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {401: {'WWW-Authenticate': 'Bearer'}, 429: {'Retry-After': '1'}}.get(error.status)
    return _error(error.status, error.code, str(error), headers)


async def _refuse_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, f'http_{error.status_code}')
    return _error(error.status_code, code, str(error.detail), dict(error.headers or {}))


async def _refuse_unknown(request: Request, error: Exception) -> JSONResponse:
    _LOG.error('a request failed', exc_info=error)
    return _error(500, 'internal', f'the server failed ({type(error).__name__}); its log says more')
