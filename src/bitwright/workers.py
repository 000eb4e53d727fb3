"""Threads that never change a result.

Floating-point sums depend on how they are split, and torch splits its loops by the number of threads. Here the work is
cut into units that do not depend on the number of threads; each unit runs on one thread with torch's own pool held at
one; results come back in the order of the units. So the same recipe gives the same bytes on 1, 2 or 64 threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of `threads` threads, each running one unit of work at a time; a context manager."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or default_threads()
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="bitwright", initializer=_single_threaded)

    def __enter__(self) -> Workers:
        _single_threaded()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def map(self, unit: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results of `unit` in the order of `items`; the first exception is raised here."""

        def guarded(item: Item) -> Result:
            with torch.inference_mode():  # thread-local, so it has to be entered here
                return unit(item)

        return list(self._pool.map(guarded, items))


def _single_threaded() -> None:
    torch.set_num_threads(1)
