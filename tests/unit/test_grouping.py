"""Dynamic grouping: the three algorithms and the fast optimum against enumeration and a slow simulation of merging."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.solvers.grouping import (
    Magnitudes,
    describe,
    dynamic_grouping,
    merge_windows,
    optimal_grouping,
)

from .backends import needs_native, restore, use
from .twins import examples


def cost_of(members: Sequence[float], penalty: float) -> Fraction:
    """Squared error about the mean plus penalty / members, without rounding."""
    values = [Fraction(value) for value in members]
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) + Fraction(penalty) / len(values)


def least_cost(entries: Sequence[float], groups: int, penalty: float) -> Fraction:
    """Of all ways to cut the sorted entries into that many groups that do not part equal entries."""
    ordered = sorted(entries)
    places = [i for i in range(1, len(ordered)) if ordered[i] != ordered[i - 1]]
    cuts = itertools.combinations(places, min(groups, len(places) + 1) - 1)
    return min(
        sum(cost_of(ordered[a:b], penalty) for a, b in itertools.pairwise([0, *inner, len(ordered)])) for inner in cuts
    )


def merged_slowly(entries: Sequence[float], groups: int, window: int, penalty: float) -> list[list[float]]:
    """Algorithm 3 word by word: every pair is looked at again before each merging."""
    ordered = sorted(entries)
    parts = [ordered[i : i + window] for i in range(0, len(ordered), window)]
    while len(parts) > groups:
        costs = [cost_of(a + b, penalty) for a, b in itertools.pairwise(parts)]
        at = costs.index(min(costs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def generic(size: int, seed: int) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal(size))


def skewed(size: int, seed: int, distinct: int = 10**9) -> Magnitudes:
    """Heavy tails, with repeated entries where only few are distinct."""
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_t(3, min(size, distinct)))
    return Magnitudes.of(rng.choice(values, size) if distinct < size else values)


# Shifted by 5 so that none is negative: the optimum of four levels is known (-4.5, -0.5, 1.5, 6.5; error 2).
WORKED = np.array([0.0, 1.0, 4.0, 5.0, 6.0, 7.0, 11.0, 12.0])


@pytest.mark.parametrize("algorithm", [dynamic_grouping, optimal_grouping])
def test_worked_example(algorithm: object, backend: str) -> None:
    found = algorithm(Magnitudes.of(WORKED), 4, 0.0)  # type: ignore[operator]
    assert found.levels.tolist() == [0.5, 4.5, 6.5, 11.5]
    assert found.begins.tolist() == [0, 2, 4, 6]
    assert found.counts.tolist() == [2, 2, 2, 2]
    assert found.cost() == 2.0
    assert found.cost(0.75) == 2.0 + 4 * 0.375


@given(st.integers(1, 11), st.integers(1, 5), st.sampled_from([0.0, 0.75, 0.01]), st.integers(0, 10**6), st.booleans())
@examples(80)
def test_optimum_by_enumeration(size: int, groups: int, penalty: float, seed: int, repeated: bool) -> None:
    entries = generic(size, seed)
    if repeated:
        entries = np.random.default_rng(seed).choice(entries, size)
    least = float(least_cost(entries.tolist(), groups, penalty))
    for algorithm in (dynamic_grouping, optimal_grouping):
        found = algorithm(Magnitudes.of(entries), groups, penalty)
        assert found.cost(penalty) == pytest.approx(least, rel=1e-10, abs=1e-13)
        assert len(found.begins) == min(groups, len(set(entries.tolist())))


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.0, 0.75, 0.01]), st.integers(0, 10**6)
)
@examples(60)
def test_merging_step_by_step(size: int, groups: int, window: int, penalty: float, seed: int) -> None:
    entries = generic(size, seed)
    expected = merged_slowly(entries.tolist(), groups, window, penalty)
    found = merge_windows(Magnitudes.of(entries), groups, window, penalty)
    assert found.counts.tolist() == [len(part) for part in expected]
    np.testing.assert_allclose(found.levels, [np.mean(part) for part in expected], rtol=1e-12)
    exact = float(sum(cost_of(part, penalty) for part in expected))
    assert found.cost(penalty) == pytest.approx(exact, rel=1e-9, abs=1e-13)


@given(
    st.integers(1, 400),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.75]),
    st.integers(0, 10**6),
)
@examples(80)
def test_nothing_beats_the_optimum(
    size: int, distinct: int, window: int, groups: int, penalty: float, seed: int
) -> None:
    """Greedy and windowed merging never get below it; without a penalty more groups are never worse."""
    magnitudes = skewed(size, seed, distinct)
    least = optimal_grouping(magnitudes, groups, 0.0)
    for start in (1, window):
        found = merge_windows(magnitudes, groups, start, penalty)
        assert found.cost() >= least.cost() - 1e-9
        assert len(found.begins) == min(groups, -(-size // start))
        assert int(found.counts.sum()) == size
        assert (np.diff(found.levels) >= -1e-12).all()
    assert optimal_grouping(magnitudes, groups + 1, 0.0).cost() <= least.cost() + 1e-9
    assert least.cost(penalty) >= optimal_grouping(magnitudes, groups, penalty).cost(penalty) - 1e-9


@needs_native
@given(
    st.integers(1, 300), st.integers(1, 50), st.integers(1, 30), st.integers(1, 20), st.sampled_from([0.0, 0.75]),
    st.integers(0, 10**6),
)  # fmt: skip
@examples(60)
def test_native_is_the_reference(size: int, distinct: int, window: int, groups: int, penalty: float, seed: int) -> None:
    """Merging to the bit; the optimum in what it costs."""
    magnitudes = skewed(size, seed, distinct)
    patch = pytest.MonkeyPatch()
    try:
        ours = merge_windows(magnitudes, groups, window, penalty), optimal_grouping(magnitudes, groups, penalty)
        use("reference", patch)
        plain = merge_windows(magnitudes, groups, window, penalty), optimal_grouping(magnitudes, groups, penalty)
    finally:
        patch.undo()
        restore()
    assert ours[0].begins.tolist() == plain[0].begins.tolist()
    assert ours[0].levels.tobytes() == plain[0].levels.tobytes()
    assert ours[1].cost(penalty) == pytest.approx(plain[1].cost(penalty), rel=1e-10, abs=1e-12)


def test_fast_optimum_of_thousands(backend: str) -> None:
    magnitudes = skewed(20000, 5, 600)
    fast, slow = optimal_grouping(magnitudes, 16, 0.75), dynamic_grouping(magnitudes, 16, 0.75)
    assert fast.cost(0.75) == pytest.approx(slow.cost(0.75), rel=1e-12)
    assert fast.begins.tolist() == slow.begins.tolist()


def test_windows_may_part_equal_entries() -> None:
    """Five threes and three sevens in windows of three: 333, 337, 77."""
    magnitudes = Magnitudes.of(np.array([3.0, 7.0, -3.0, 3.0, -7.0, 3.0, 3.0, 7.0]))
    assert (magnitudes.values.tolist(), magnitudes.counts.tolist()) == ([3.0, 7.0], [5, 3])
    found = merge_windows(magnitudes, 5, 3, 0.75)
    assert found.begins.tolist() == [0, 3, 6]
    np.testing.assert_allclose(found.levels, [3.0, 13 / 3, 7.0])
    np.testing.assert_allclose(found.errors, [0.0, 32 / 3, 0.0], atol=1e-12)
    assert describe(magnitudes, np.array([0, 5])).errors.tolist() == [0.0, 0.0]


def test_tiny_errors_do_not_drown() -> None:
    """Errors of windows, near 1e-8, are right to nine digits beside sums of a million squares, near 400."""
    entries = np.sort(generic(10**6, 0) * 0.02)
    found = describe(Magnitudes.of(entries), np.arange(0, 10**6, 512))
    for index in (0, 700, 1500):
        members = entries[index * 512 : index * 512 + 512]
        assert found.errors[index] == pytest.approx(float(cost_of(members.tolist(), 0.0)), rel=1e-9)
    assert found.errors[700] < 1e-8
