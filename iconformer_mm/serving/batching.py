"""Batches made of requests that wait at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import RequestError


class Batcher:
    """Runs a function on batches of what several requests submit, in a thread of its own, one batch at a time.

    While a batch runs, requests gather for the next.

    Args:
        run: Takes a list of items. Returns one result or exception per item.
        max_size: Largest number of items per batch.
        wait_s: Seconds to wait for more items when the batch is not full.
        max_waiting: Number of items that may wait.
    """

    def __init__(
        self, run: Callable[[list[Any]], Sequence[Any]], max_size: int, wait_s: float, max_waiting: int
    ) -> None:
        self._run, self._max_size, self._wait_s, self._max_waiting = run, max_size, wait_s, max_waiting
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='model')
        self._task: asyncio.Task | None = None
        self._closing = False

    @property
    def waiting(self) -> int:
        """Number of items that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether batches are run."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to run batches, in the event loop of the caller."""
        self._task = asyncio.create_task(self._work())

    async def submit(self, item: Any) -> Any:
        """Wait for the result of an item.

        Raises:
            RequestError: Too many items wait, or the batcher is closing.
            Exception: What the function returned for the item.
        """
        if self._closing or not self.alive:
            raise RequestError(503, 'draining', 'the server is shutting down')
        if len(self._waiting) >= self._max_waiting:
            raise RequestError(429, 'overloaded', f'{len(self._waiting)} requests are waiting; try again later')
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._arrived.set()
        return await future

    async def close(self) -> None:
        """Refuse new items, finish those that wait, and end."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._closing and not self._waiting):
            await self._arrived.wait()
            if len(self._waiting) < self._max_size and self._wait_s and not self._closing:
                await asyncio.sleep(self._wait_s)
            batch: list[tuple[Any, asyncio.Future]] = []
            while self._waiting and len(batch) < self._max_size:
                item, future = self._waiting.popleft()
                if not future.done():  # its request may have timed out or gone away
                    batch.append((item, future))
            if not self._waiting and not self._closing:
                self._arrived.clear()
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self._run, [item for item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
