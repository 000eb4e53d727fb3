"""Who is told how far a run has come."""

from __future__ import annotations

from typing import Any, Protocol

from bitwright.pipeline.plan import Plan


class Reporter(Protocol):
    """Told by a run, in this order: allocating, begin, advance and block_done for each block, the tuning, searching,
    and notes in between."""

    def allocating(self, fraction: float) -> None:
        """`fraction` of what the choice of each site's bits takes is done; the fractions add up to one."""

    def begin(self, plan: Plan, completed: int) -> None: ...
    def advance(self, fraction: float) -> None:
        """`fraction` of one block's work is done; the fractions of a block add up to one."""

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None: ...
    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        """The search for clip ratios: so far `done` of `total` targets; `found` is the entry of one that is done."""

    def note(self, message: str) -> None: ...
    def begin_tuning(self, intervals: int, completed: int) -> None:
        """From here on `fraction` is of an interval of the tuning; one more is there for writing what it found."""

    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None:
        """`losses` are the divergences so far, the one before the tuning first."""


class Silent:
    """A reporter that says nothing."""

    def allocating(self, fraction: float) -> None: ...
    def begin(self, plan: Plan, completed: int) -> None: ...
    def advance(self, fraction: float) -> None: ...
    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None: ...
    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None: ...
    def note(self, message: str) -> None: ...
    def begin_tuning(self, intervals: int, completed: int) -> None: ...
    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None: ...
