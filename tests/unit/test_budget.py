"""Sharing out bytes: against every combination, and what it must keep to."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bitwright.pipeline.budget import allot, hull

from .twins import examples

site = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 8)), min_size=1, max_size=4)
sites = st.lists(site, min_size=1, max_size=5)


def columns(drawn: list[list[tuple[int, float]]]) -> tuple[list[list[int]], list[list[float]]]:
    return [[size for size, _ in one] for one in drawn], [[loss for _, loss in one] for one in drawn]


@given(sites, st.integers(0, 300))
@examples(200)
def test_beside_every_combination(drawn: list[list[tuple[int, float]]], budget: int) -> None:
    """Within the budget, and from the best of all combinations by less than the largest step along a hull."""
    sizes, losses = columns(drawn)
    fitting = [
        sum(losses[i][c] for i, c in enumerate(chosen))
        for chosen in itertools.product(*(range(len(one)) for one in sizes))
        if sum(sizes[i][c] for i, c in enumerate(chosen)) <= budget
    ]
    found = allot(sizes, losses, budget)
    if found is None:
        assert not fitting
        return
    assert sum(sizes[i][c] for i, c in enumerate(found)) <= budget
    steps = [
        losses[i][a] - losses[i][b] for i, one in enumerate(sizes) for a, b in itertools.pairwise(hull(one, losses[i]))
    ]
    assert sum(losses[i][c] for i, c in enumerate(found)) <= min(fitting) + max(steps, default=0.0) + 1e-9


@given(site)
@examples(200)
def test_hull(drawn: list[tuple[int, float]]) -> None:
    """Ends at the smallest choice and at the least loss, convex, and no choice is below a chord."""
    (sizes,), (losses,) = columns([drawn])
    points = hull(sizes, losses)
    assert sizes[points[0]] == min(sizes)
    assert losses[points[-1]] == min(losses)
    slopes = [(losses[a] - losses[b]) / (sizes[b] - sizes[a]) for a, b in itertools.pairwise(points)]
    assert sorted(slopes, reverse=True) == slopes
    assert all(slope > 0 for slope in slopes)
    for a, b in itertools.pairwise(points):
        for size, loss in drawn:
            if sizes[a] <= size <= sizes[b]:
                chord = losses[a] + (losses[b] - losses[a]) * (size - sizes[a]) / (sizes[b] - sizes[a])
                assert loss >= chord - 1e-9


def test_room_for_all_is_the_best_of_all() -> None:
    assert allot([[2, 1], [5, 3, 4]], [[0.0, 1.0], [1.0, 3.0, 2.5]], 100) == [0, 0]
    assert allot([[2, 1], [5, 3, 4]], [[0.0, 1.0], [1.0, 3.0, 2.5]], 4) == [1, 1]
    assert allot([[2, 1], [5, 3, 4]], [[0.0, 1.0], [1.0, 3.0, 2.5]], 3) is None


def test_a_step_that_does_not_fit_leaves_room_for_smaller_ones() -> None:
    assert allot([[0, 100], [0, 10]], [[50.0, 0.0], [1.0, 0.0]], 20) == [0, 1]
