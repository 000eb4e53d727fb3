"""One way to store each site, so that the sum of what they lose is least and the sum of their bytes within a budget.

A multiple-choice knapsack. Its linear relaxation is solved by going along the lower convex hulls of (bytes, loss) of
all sites together, the steepest step first (Sinha and Zoltners, The multiple-choice knapsack problem, Operations
Research 27, 1979); whatever still fits when a step does not is taken in the same order. What is lost to the optimum is
less than one such step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def hull(sizes: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Indices of the choices on the lower convex hull, by rising size and falling loss; the first one is the smallest,
    of equally small ones that with the least loss."""
    found: list[int] = []
    for choice in sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i], i)):
        if found and losses[choice] >= losses[found[-1]]:
            continue
        while len(found) > 1 and slope(found[-2], found[-1], sizes, losses) <= slope(found[-2], choice, sizes, losses):
            found.pop()
        found.append(choice)
    return found


def slope(low: int, high: int, sizes: Sequence[int], losses: Sequence[float]) -> float:
    """Loss that is saved a byte between two choices."""
    return (losses[low] - losses[high]) / (sizes[high] - sizes[low])


def allot(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The choice of each site, None where the smallest ones together are over `budget` bytes."""
    hulls = [hull(*site) for site in zip(sizes, losses, strict=True)]
    chosen = [steps[0] for steps in hulls]
    left = budget - sum(size[choice] for size, choice in zip(sizes, chosen, strict=True))
    if left < 0:
        return None
    steps = [
        (slope(low, high, sizes[site], losses[site]), site, low, high)
        for site, points in enumerate(hulls)
        for low, high in pairwise(points)
    ]
    for _, site, low, high in sorted(steps, key=lambda step: (-step[0], step[1:])):
        more = sizes[site][high] - sizes[site][low]
        if chosen[site] == low and more <= left:  # a hull is climbed without leaving a step out
            chosen[site], left = high, left - more
    return chosen
