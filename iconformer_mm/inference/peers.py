"""The processes of one prediction under torchrun."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed
from torch.distributed import PrefixStore, Store

_PATIENCE = datetime.timedelta(days=7)  # a process that has finished its part waits for the others
_POLL_S = 0.1

Result = TypeVar('Result')


def in_torchrun() -> bool:
    """Whether torchrun started this process, beside others."""
    return 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1


class Peers:
    """This process and the others of the same run; one process alone without torchrun.

    There is no process group: in one, visualizers of the libraries draw in the first process only.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._store: Store | None = None
        self._calls = 0
        if in_torchrun():
            store, self.rank, self.size = next(torch.distributed.rendezvous('env://', timeout=_PATIENCE))
            # What processes of an earlier start left in the store is not read.
            self._store = PrefixStore(f'predict/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do something in the first process; return its result in all of them.

        Args:
            work: What to do. Its result is plain data that JSON can hold.

        Raises:
            Exception: What ``work`` raises, in the first process.
            SystemExit: In the others, when it raises.
        """
        if self._store is None:
            return work()
        self._calls += 1
        key = f'{self._calls}'
        if self.rank == 0:
            try:
                result = work()
            except BaseException:
                self._store.set(key, json.dumps([False, None]))
                self.meet()
                raise
            self._store.set(key, json.dumps([True, result]))
        # The store ends with the first process, so that one waits until the others have read.
        done, shared = json.loads(self._store.get(key))
        self.meet()
        if not done:
            raise SystemExit(1)
        return shared

    def meet(self) -> None:
        """Wait for all processes."""
        if self._store is None:
            return
        self._calls += 1
        key = f'{self._calls}'
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.size:
            time.sleep(_POLL_S)
