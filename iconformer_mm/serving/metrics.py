"""What a server counts, for Prometheus.

If the environment variable ``PROMETHEUS_MULTIPROC_DIR`` names a folder, all replicas on a machine count together there.
"""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = 'PROMETHEUS_MULTIPROC_DIR'
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server process.

    Attributes:
        requests: Finished requests for predictions, by adapter and by code (``ok`` or the error's).
        seconds: Seconds from the first byte of a request to its answer.
        batch_size: Images per batch.
        adapters_per_batch: Different adapters per batch.
        waiting: Requests that wait for a batch.
        loaded: Adapters in memory.
        loads: Adapters that were loaded into memory.
    """

    def __init__(self) -> None:
        if os.environ.get(FOLDER_VARIABLE):
            os.makedirs(os.environ[FOLDER_VARIABLE], exist_ok=True)
        self._registry = CollectorRegistry()
        kind = dict(registry=self._registry, namespace='iconformer')
        live = dict(kind, multiprocess_mode='livesum')
        self.requests = Counter('requests', 'Requests for predictions.', ['adapter', 'code'], **kind)
        self.seconds = Histogram(
            'request_seconds',
            'Seconds per request.',
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            **kind,
        )
        self.batch_size = Histogram('batch_size', 'Images per batch.', buckets=(1, 2, 4, 8, 16, 32, 64), **kind)
        self.adapters_per_batch = Histogram(
            'adapters_per_batch', 'Different adapters per batch.', buckets=(1, 2, 4, 8, 16, 32), **kind
        )
        self.waiting = Gauge('waiting_requests', 'Requests that wait for a batch.', **live)
        self.loaded = Gauge('loaded_adapters', 'Adapters in memory.', **live)
        self.loads = Counter('adapter_loads', 'Adapters loaded into memory.', **kind)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        registry = self._registry
        if os.environ.get(FOLDER_VARIABLE):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
