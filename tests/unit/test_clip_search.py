"""Searches for one clip ratio: the traces of GBS, brackets in closed form, and that 1 is tried where it should be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.activations.clip_search import (
    GRID,
    HALF,
    Objective,
    ambiguous_search,
    evaluations,
    golden_section,
    gradual_binary_search,
    grid_search,
    search,
)

from .twins import examples

METHODS = ("gbs", "golden", "grid", "global")


def valley(at: float) -> Objective:
    return lambda ratio: (ratio - at) ** 2


@pytest.mark.parametrize(("iterations", "expected"), [(3, 0.75), (5, 0.875), (8, 0.96875), (10, 0.984375)])
def test_gbs_for_a_valley_at_one(iterations: int, expected: float) -> None:
    found = gradual_binary_search(valley(1.0), iterations)
    assert found.ratio == expected
    assert all(ratio < 1.0 for ratio, _ in found.tried)


@pytest.mark.parametrize(("iterations", "expected"), [(3, 0.25), (5, 0.3125), (8, 0.296875), (10, 0.30078125)])
def test_gbs_for_a_valley_inside(iterations: int, expected: float) -> None:
    assert gradual_binary_search(valley(0.3), iterations).ratio == expected


@pytest.mark.parametrize(
    ("at", "tried", "expected"),
    [
        (0.3, [0.5, 0.25, 0.375, 0.125, 0.3125, 0.28125], 0.3125),
        (0.9, [0.5, 0.25, 0.75, 0.625, 0.875, 0.8125], 0.875),
    ],
)
def test_what_gbs_tries(at: float, tried: list[float], expected: float) -> None:
    found = gradual_binary_search(valley(at), 5)
    assert [ratio for ratio, _ in found.tried] == tried
    assert [value for _, value in found.tried] == [(ratio - at) ** 2 for ratio in tried]
    assert (found.ratio, found.value) == (expected, (expected - at) ** 2)


def test_brackets_after_eleven_evaluations() -> None:
    """0.0078 for the alternating halving of a valley inside, 0.618^10 = 0.0081 for the golden section, beside 1."""
    low, high = gradual_binary_search(valley(0.4), 10).bracket
    assert high - low == pytest.approx(2**-7, rel=0.55)
    found = golden_section(valley(0.3), 10)
    assert len(found.tried) == 12
    assert found.bracket[1] - found.bracket[0] == pytest.approx(0.61803399**10, rel=1e-6)


def test_gbs_stops_where_the_bracket_is_narrow() -> None:
    found = gradual_binary_search(valley(0.37), 100)
    assert found.bracket[1] - found.bracket[0] <= 1e-3
    assert len(found.tried) < 30


@given(at=st.floats(0.02, 1.0), iterations=st.integers(1, 14), method=st.sampled_from(["gbs", "golden"]))
@examples(150)
def test_the_bracket_holds_the_best(at: float, iterations: int, method: str) -> None:
    """Of any function with one valley; what is returned is the best of what was tried."""
    found = search(method, lambda ratio: math.sqrt(abs(ratio - at)), iterations)
    low, high = found.bracket
    assert low - 1e-12 <= at <= high + 1e-12
    assert found.value == min(value for _, value in found.tried)
    assert (found.ratio, found.value) in found.tried
    assert len(found.tried) <= evaluations(method, iterations)
    assert all(0.0 < ratio <= 1.0 for ratio, _ in found.tried)


def test_a_golden_section_asks_nothing_twice() -> None:
    for at in (0.05, 0.3, 0.62, 0.97, 1.0):
        tried = [round(ratio, 9) for ratio, _ in golden_section(valley(at), 8).tried]
        assert len(set(tried)) == len(tried) == 10


def test_grids_assume_nothing() -> None:
    values = dict.fromkeys(GRID, 1.0) | {0.9: 0.5, 0.35: 0.4}
    found = grid_search(values.__getitem__)
    assert (found.ratio, found.value, found.bracket) == (0.35, 0.4, (0.3, 0.4))
    assert [ratio for ratio, _ in found.tried] == list(GRID)
    assert (GRID[0], GRID[-1], len(GRID)) == (1.0, 0.25, 16)
    assert search("global", valley(0.2), 3).ratio == 0.8
    assert len(search("global", valley(0.2), 3).tried) == 5


ERRORS = dict(zip(HALF, (13.0, 11.0, 10.4, 10.0, 10.5, 10.6, 12.0, 14.0, 17.0, 21.0, 26.0), strict=True))


def test_the_costly_objective_is_asked_of_what_is_in_the_running() -> None:
    """Least error 10 at 0.85; within 5 %: 0.9 and 0.8 (10.5 exactly), not 0.75. 1 is asked, too."""
    losses = {1.0: 3.0, 0.9: 2.5, 0.85: 2.6, 0.8: 2.4}
    asked: list[float] = []
    found = ambiguous_search(ERRORS.__getitem__, lambda ratio: asked.append(ratio) or losses[ratio])  # type: ignore[func-returns-value]
    assert asked == [1.0, 0.9, 0.85, 0.8]
    assert (found.ratio, found.value, found.ambiguous) == (0.8, 2.4, True)
    assert found.tried == tuple(losses.items())
    assert found.errors == tuple(ERRORS.items())
    assert ambiguous_search(ERRORS.__getitem__, (losses | {1.0: 2.0}).__getitem__).ratio == 1.0
    assert (HALF[0], HALF[-1], len(HALF)) == (1.0, 0.5, 11)


def test_it_is_not_asked_where_the_error_decides() -> None:
    found = ambiguous_search((ERRORS | {0.85: 9.9}).__getitem__, {}.__getitem__)
    assert (found.ratio, found.value, found.ambiguous, found.errors) == (0.85, 9.9, False, ())
    assert [ratio for ratio, _ in found.tried] == list(HALF)
    assert ambiguous_search(lambda ratio: 2.0 - ratio, {}.__getitem__, (1.0, 0.5)).ratio == 1.0


def test_errors_that_are_no_numbers_decide_nothing() -> None:
    found = ambiguous_search(lambda _: math.nan, valley(0.7))
    assert (found.ratio, found.ambiguous, len(found.tried)) == (0.7, True, len(HALF))
    some = ambiguous_search(lambda ratio: math.nan if ratio > 0.6 else ratio, valley(0.7))
    assert (some.ratio, some.ambiguous) == (0.5, False)


@given(errors=st.lists(st.floats(0.0, 1e6), min_size=11, max_size=11), at=st.floats(0.4, 1.1))
@examples(150)
def test_an_ambiguous_search_and_its_slow_twin(errors: list[float], at: float) -> None:
    """The least loss of 1 and all ratios whose error is at most 1.05 times the least."""
    error = dict(zip(HALF, errors, strict=True)).__getitem__
    found = search("ambiguous", valley(at), 3, error)
    running = {ratio for ratio in HALF if error(ratio) <= 1.05 * min(errors)}
    if len(running) == 1:
        assert {found.ratio} == running
    else:
        expected = min(running | {1.0}, key=lambda ratio: (valley(at)(ratio), -ratio))
        assert found.ratio == expected
    assert found.ambiguous == (len(running) > 1)
    assert len(found.tried) + len(found.errors) <= evaluations("ambiguous", 3) == 22


@pytest.mark.parametrize("method", METHODS[1:])
def test_one_is_tried_and_kept_where_nothing_is_better(method: str) -> None:
    assert search(method, lambda _: 7.0, 6).ratio == 1.0
    assert search(method, valley(1.0), 6).ratio == 1.0


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_is_no_number_is_not_taken(method: str) -> None:
    found = search(method, lambda ratio: ratio if ratio > 0.85 else math.nan, 6)
    assert not math.isnan(found.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0.9, 0.97])
def test_what_is_no_number_is_worse_than_any(method: str, at: float) -> None:
    """NaN in the middle, where GBS begins, and below: the valley beside it is found as if there were infinity."""

    def broken(ratio: float, value: float) -> float:
        return value if ratio <= 0.5 else (ratio - at) ** 2

    found, expected = (search(method, lambda ratio, bad=bad: broken(ratio, bad), 12) for bad in (math.nan, math.inf))
    assert math.isfinite(found.value)
    assert (found.ratio, found.value, found.bracket) == (expected.ratio, expected.value, expected.bracket)
    assert [ratio for ratio, _ in found.tried] == [ratio for ratio, _ in expected.tried]
    assert found.ratio == pytest.approx(at, abs=0.03)


def test_a_golden_section_leaves_what_is_no_number() -> None:
    """Right of the valley, too."""
    found = golden_section(lambda ratio: math.nan if ratio > 0.5 else (ratio - 0.4) ** 2, 12)
    assert found.ratio == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_where_there_is_no_number_at_all_none_is_found(method: str) -> None:
    assert not math.isfinite(search(method, lambda _: math.nan, 5).value)
