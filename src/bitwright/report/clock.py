"""The time that a quantization takes, kept over kills."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bitwright.pipeline.plan import Plan
from bitwright.pipeline.run import Reporter


class Clock:
    """Passes on what a run reports, and after each block records the seconds that led to what is on disk."""

    def __init__(self, behind: Reporter, save: Callable[[float], None]) -> None:
        self._behind, self._save, self._since = behind, save, time.monotonic()

    def allocating(self, fraction: float) -> None:
        self.lap()
        self._behind.allocating(fraction)

    def begin(self, plan: Plan, completed: int) -> None:
        self._behind.begin(plan, completed)

    def advance(self, fraction: float) -> None:
        self._behind.advance(fraction)

    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        if found:
            self.lap()
        self._behind.searching(target, done, total, found)

    def note(self, message: str) -> None:
        self._behind.note(message)

    def lap(self) -> None:
        now = time.monotonic()
        self._save(now - self._since)
        self._since = now

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None:
        self.lap()
        self._behind.block_done(index, entries)

    def begin_tuning(self, intervals: int, completed: int) -> None:
        self._behind.begin_tuning(intervals, completed)

    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None:
        self.lap()
        self._behind.interval_done(number, intervals, losses)
