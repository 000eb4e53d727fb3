"""Searches for one clip ratio: over any objective, which is told a ratio in (0, 1] and says how bad it is.

`gradual_binary_search` is GBS's (arXiv 2504.13989, section 4.2) to the letter: a bracket a < m < b, cut by turns in the
middle of its left and of its right half. It assumes one valley, and it never tries 1 (the least cut that it can return
after k rounds is about 2^-(k / 2)). The others are cheaper or safer and always try 1: a golden section, which is as
narrow after as many evaluations but twice as fast where the best ratio is at an end, and a grid, which assumes nothing.
`ambiguous_search` has two objectives: the costly one is asked only where the cheap one leaves several ratios open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Objective = Callable[[float], float]

# 1 first: of ratios that are as good, the one that cuts least is taken.
GRID = tuple(round(1.0 - 0.05 * i, 2) for i in range(16))
GLOBAL = GRID[:5]
TOLERANCE = 1e-3
# Of an ambiguous search: ratios 1 down to 0.5, and how much more than the least error still says little.
HALF = GRID[:11]
IN_THE_RUNNING = 1.05


@dataclass(frozen=True)
class Found:
    """The ratio taken, its value, the bracket left around it, and all (ratio, value) tried, in order.

    Of an ambiguous search they are those of the objective that decided, and

    ambiguous  whether that was the costly one; None in other searches
    errors     (ratio, value) of the cheap objective where it did not decide
    """

    ratio: float
    value: float
    bracket: tuple[float, float]
    tried: tuple[tuple[float, float], ...]
    ambiguous: bool | None = None
    errors: tuple[tuple[float, float], ...] = ()


class _Tried:
    """An objective that keeps what it was asked, and calls infinite what is no number: worse than any that is one."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.pairs = objective, list[tuple[float, float]]()

    def __call__(self, ratio: float) -> float:
        value = self.objective(ratio)
        self.pairs.append((ratio, value))
        return _comparable(value)

    def found(self, ratio: float, value: float, low: float, high: float) -> Found:
        return Found(ratio, value, (low, high), tuple(self.pairs))

    def best(self) -> tuple[float, float]:
        """(ratio, value) of the least value; of several the largest ratio. What is no number is never the best."""
        return min(self.pairs, key=lambda pair: (_comparable(pair[1]), -pair[0]))


def _comparable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def gradual_binary_search(objective: Objective, iterations: int) -> Found:
    """Section 4.2: `iterations` + 1 evaluations, fewer once the bracket is narrower than 1e-3."""
    tried = _Tried(objective)
    low, high, middle = 0.0, 1.0, 0.5
    value = tried(middle)
    for k in range(iterations):
        if high - low <= TOLERANCE:
            break
        x = (low + middle) / 2 if k % 2 == 0 else (middle + high) / 2
        here = tried(x)
        if here < value:
            if x < middle:
                high = middle
            else:
                low = middle
            middle, value = x, here
        elif x < middle:
            low = x
        else:
            high = x
    return tried.found(middle, value, low, high)


def golden_section(objective: Objective, iterations: int) -> Found:
    """1, then `iterations` + 1 points inside: each but the first cuts the bracket to 0.618 of its width."""
    tried = _Tried(objective)
    share = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = 0.0, 1.0
    tried(1.0)
    left, right = 1.0 - share, share
    at_left: float | None = None
    at_right: float | None = tried(right)
    for _ in range(iterations):
        if high - low <= TOLERANCE:
            break
        if at_left is None:
            at_left = tried(left)
        elif at_right is None:
            at_right = tried(right)
        assert at_left is not None
        assert at_right is not None
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left, at_left = high - share * (high - low), None
        else:
            low, left, at_left = left, right, at_right
            right, at_right = low + share * (high - low), None
    return tried.found(*tried.best(), low, high)


def grid_search(objective: Objective, ratios: Sequence[float] = GRID) -> Found:
    """All of `ratios`; the bracket is that of the neighbours."""
    tried = _Tried(objective)
    for ratio in ratios:
        tried(ratio)
    ratio, value = tried.best()
    below = max((other for other in ratios if other < ratio), default=0.0)
    above = min((other for other in ratios if other > ratio), default=1.0)
    return tried.found(ratio, value, below, above)


def ambiguous_search(error: Objective, objective: Objective, ratios: Sequence[float] = HALF) -> Found:
    """The cheap `error` of all `ratios`; then `objective`, of those whose error is within 5 % of the least, and of 1.

    Where that leaves one ratio alone, `objective` is not asked. Where no error is a number, all ratios are open.
    Source: the survey of GBS's weak points behind section 4.2: a costly search for ambiguous sites alone, with 1 tried.
    """
    first = grid_search(error, ratios)
    bound = IN_THE_RUNNING * _comparable(first.value)
    running = [ratio for ratio, value in first.tried if _comparable(value) <= bound]
    if len(running) == 1:
        return replace(first, ambiguous=False)
    second = grid_search(objective, [ratio for ratio in ratios if ratio in running or ratio == 1.0])
    return replace(second, ambiguous=True, errors=first.tried)


def search(method: str, objective: Objective, iterations: int, error: Objective | None = None) -> Found:
    """By the names of recipes: gbs, golden, grid, global, ambiguous; the last has a cheap `error`, too."""
    if method == "gbs":
        return gradual_binary_search(objective, iterations)
    if method == "golden":
        return golden_section(objective, iterations)
    if method == "ambiguous":
        assert error is not None
        return ambiguous_search(error, objective)
    return grid_search(objective, GLOBAL if method == "global" else GRID)


def evaluations(method: str, iterations: int) -> int:
    """At most so many evaluations does a search take; of an ambiguous one the first half are of the cheap error."""
    counts = {"gbs": iterations + 1, "golden": iterations + 2, "grid": len(GRID), "global": len(GLOBAL)}
    return (counts | {"ambiguous": 2 * len(HALF)})[method]
