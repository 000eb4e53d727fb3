from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.solvers import levels as levels_module
from bitwright.solvers.grids import uniform_grid
from bitwright.solvers.levels import (
    dp_levels,
    em_levels,
    minmax_levels,
    nearest,
    snap,
)

from .twins import best_partition, examples, gaussian, lloyd, loss_of, on_grid, rank_of, uniform

Search = Callable[..., Tensor]
WORKED = [-5.0, -4.0, -1.0, 0.0, 1.0, 2.0, 6.0, 7.0]

# Weights with many exact ties: small integers, halves and repeated numbers, exact in every precision.
tied = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=9)
reals = st.lists(st.floats(-4.0, 4.0, width=32).map(lambda x: float(np.float32(x))), min_size=1, max_size=9)
importances = st.sampled_from([0.0, 0.25, 1.0, 2.0, 7.0])


def row(weights: list[float]) -> Tensor:
    return torch.tensor([weights], dtype=torch.float32)


def weighted(draw: st.DrawFn, weights: list[float]) -> list[float]:
    h = [draw(importances) for _ in weights]
    return h if any(h) else [1.0] * len(h)


@st.composite
def weighted_rows(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    weights = draw(st.one_of(tied, reals))
    return weights, weighted(draw, weights)


def test_worked_example() -> None:
    levels = dp_levels(row(WORKED), torch.ones(8), 2)
    assert levels.tolist() == [[-4.5, -0.5, 1.5, 6.5]]
    assert loss_of(WORKED, [1.0] * 8, levels[0].tolist()) == 2.0


@given(weighted_rows(), st.integers(1, 4))
@examples(150)
def test_dp_is_the_best_of_all_partitions(case: tuple[list[float], list[float]], bits: int) -> None:
    weights, h = case
    levels = dp_levels(row(weights), torch.tensor(h), bits)[0].double().tolist()
    best = best_partition(weights, h, 2**bits)
    scale = sum(b * a * a for a, b in zip(weights, h, strict=True))
    assert len(levels) == 2**bits
    assert levels == sorted(levels)
    assert loss_of(weights, h, levels) == pytest.approx(best, rel=1e-6, abs=1e-12 * scale + 1e-30)


@given(weighted_rows(), st.integers(1, 4))
@examples(150)
def test_dp_is_never_worse_than_em(case: tuple[list[float], list[float]], bits: int) -> None:
    weights, h = case
    scale = sum(b * a * a for a, b in zip(weights, h, strict=True))
    losses = [
        loss_of(weights, h, levels[0].double().tolist())
        for levels in (dp_levels(row(weights), torch.tensor(h), bits), em_levels(row(weights), torch.tensor(h), bits))
    ]
    assert losses[0] <= losses[1] * (1 + 1e-6) + 1e-12 * scale


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("table", [1, 100, 1000, 41 * 41 * 2])
def test_dp_of_a_wide_group_is_taken_in_strips(bits: int, table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same levels, to the bit, from tables of bounded size: one column of a row at least."""
    block, h = gaussian(5, 40, seed=bits), gaussian(40, seed=7).square()
    block[1] = block[1].round()
    h[::7] = 0.0
    whole = dp_levels(block, h, bits)
    sizes: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        cost = interval_costs(*arguments)
        sizes.append(cost.numel())
        return cost

    interval_costs = levels_module._interval_costs
    monkeypatch.setattr(levels_module, "_interval_costs", counted)
    monkeypatch.setattr(levels_module, "DP_TABLE", table)
    assert torch.equal(dp_levels(block, h, bits), whole)
    assert max(sizes) <= max(table, 41)


@given(st.lists(st.sampled_from([-1.5, -0.25, 0.75, 2.0]), min_size=1, max_size=12))
@examples(40)
def test_dp_is_exact_on_four_distinct_values(weights: list[float]) -> None:
    levels = dp_levels(row(weights), torch.ones(len(weights)), 2)[0].tolist()
    assert loss_of(weights, [1.0] * len(weights), levels) == 0.0


@pytest.mark.parametrize("search", [dp_levels, em_levels])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_equal_weights_repeat_one_level(search: Search, width: int) -> None:
    for value in (0.0, -0.3, 2.0**-20, 1e4):
        block = torch.full((2, width), value)
        assert search(block, torch.ones(width), 2).unique().tolist() == [pytest.approx(value, rel=1e-7)]


@pytest.mark.parametrize("search", [dp_levels, em_levels])
@pytest.mark.parametrize("factor", [2.0**-40, 0.37, 1e9])
def test_scale_of_the_importance_is_irrelevant(search: Search, factor: float) -> None:
    block = gaussian(12, 48, seed=4)
    h = gaussian(48, seed=5).abs() + 0.1
    expected, scaled = search(block, h, 2), search(block, h * factor, 2)
    assert torch.allclose(expected, scaled, rtol=0, atol=1e-6)


@given(st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=24), st.integers(1, 4))
@examples(100)
def test_em_is_lloyd_exactly_where_sums_are_exact(weights: list[float], bits: int) -> None:
    """Integers of weight 1: every sum is exact in float64, so ties and empty clusters have to agree to the bit."""
    levels = em_levels(row(weights), torch.ones(len(weights)), bits)[0]
    assert levels.tolist() == torch.tensor(lloyd(weights, [1.0] * len(weights), 2**bits)).tolist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("zeros", [False, True])
def test_em_is_lloyd_on_weighted_reals(bits: int, width: int, zeros: bool) -> None:
    block, h = gaussian(10, width, seed=width), gaussian(width, seed=9).square() + 0.01
    if zeros:
        h[1::3] = 0.0
    levels = em_levels(block, h, bits)
    for weights, found in zip(block.double().tolist(), levels.double().tolist(), strict=True):
        assert found == pytest.approx(lloyd(weights, h.double().tolist(), 2**bits), abs=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_em_stops_at_its_iterations(iterations: int) -> None:
    block, h = gaussian(4, 32, seed=1), torch.ones(32)
    levels = em_levels(block, h, 2, iterations)
    for weights, found in zip(block.double().tolist(), levels.double().tolist(), strict=True):
        assert found == pytest.approx(lloyd(weights, [1.0] * 32, 4, iterations), abs=1e-5)
    assert not torch.equal(levels, em_levels(block, h, 2, 20))


@pytest.mark.parametrize("search", [dp_levels, em_levels])
@given(st.data())
@examples(40)
def test_rows_do_not_know_their_neighbours(search: Search, data: st.DataObject) -> None:
    """Bit for bit: rows that converge early, rows of ties and rows of zeros, alone and together."""
    width = data.draw(st.integers(1, 12))
    kind = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, width=32))
    rows = data.draw(st.lists(st.lists(kind, min_size=width, max_size=width), min_size=2, max_size=5))
    h = torch.tensor(data.draw(st.lists(importances, min_size=width, max_size=width)))
    together = search(torch.tensor(rows), h, 2)
    for index, weights in enumerate(rows):
        assert torch.equal(search(row(weights), h, 2)[0], together[index])


def test_a_converged_row_is_frozen() -> None:
    """A mean that rounding puts outside of its own cell would go on moving as long as another row is not done."""
    rows = [[0.0, 0.0, 1.0, -2.0, -1.0, 0.0], [0.0, 0.0, 1.0, 8.3920239235473035e-16, -1.0, 0.0]]
    h = torch.tensor([0.0, 0.0, 0.25, 7.0, 0.25, 0.0])
    together = em_levels(torch.tensor(rows), h, 2)
    assert torch.equal(em_levels(row(rows[1]), h, 2)[0], together[1])


@pytest.mark.parametrize("search", [dp_levels, em_levels])
def test_zero_importance_everywhere_stays_finite(search: Search) -> None:
    levels = search(gaussian(3, 9), torch.zeros(9), 2)
    assert levels.isfinite().all()
    assert torch.equal(levels, levels.sort(dim=1).values)


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4).map(sorted))
@examples(100)
def test_snap_is_the_nearest_int8_multiple(levels: list[float]) -> None:
    grid = snap(torch.tensor([levels]))
    assert grid.integers.dtype == torch.int8
    assert grid.scale.dtype == torch.float16
    assert grid.values()[0].tolist() == on_grid([float(np.float32(x)) for x in levels])
    largest = max(abs(x) for x in levels)
    # Half a step, and what the rounding of the scale to fp16 may cut off the largest level.
    bound = max(float(grid.scale) / 2, 127 * 2.0**-25) if largest > 127 * 2.0**-25 else largest
    assert (grid.values()[0].double() - torch.tensor(levels).double()).abs().max() <= bound * (1 + 1e-3)


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-7, 3.7e-6, 1e-5, 1e-3, 1e4, 8.3e6, 1e9])
def test_snap_of_extremes_is_finite(largest: float) -> None:
    values = snap(torch.tensor([[-largest, 0.0, largest / 3, largest]])).values()
    assert values.isfinite().all()
    assert values[0].tolist() == sorted(values[0].tolist())
    if largest <= 65504.0 * 127:
        assert abs(float(values[0, 3]) - largest) <= max(4e-6, largest * 5e-4)


@given(tied, st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=2, max_size=16).map(sorted))
@examples(100)
def test_nearest(weights: list[float], levels: list[float]) -> None:
    ranks = nearest(row(weights), row(levels))
    assert ranks.dtype == torch.uint8
    for weight, rank in zip(weights, ranks[0].tolist(), strict=True):
        assert abs(weight - levels[rank]) == min(abs(weight - level) for level in levels)
        assert rank == rank_of(weight, levels)
        # A tie between two different levels goes to the lower.
        assert not any(abs(weight - level) == abs(weight - levels[rank]) for level in levels if level < levels[rank])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_minmax_levels_are_equally_spaced(bits: int) -> None:
    block = gaussian(6, 20, seed=bits)
    levels = minmax_levels(block, bits)
    assert levels.shape == (6, 2**bits)
    expected = np.linspace(block.double().amin(1), block.double().amax(1), 2**bits, axis=1)
    assert np.allclose(levels.numpy(), expected, atol=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12), st.integers(1, 4))
@examples(100)
def test_uniform_grid(weights: list[float], bits: int) -> None:
    grid = uniform_grid(row(weights), bits)
    assert grid.zero is not None
    assert 0 <= int(grid.zero) <= 2**bits - 1
    span = max(*weights, 0.0) - min(*weights, 0.0)
    if span == 0 or span > 1e-3:
        assert grid.values()[0].tolist() == uniform([float(np.float32(w)) for w in weights], bits)
    assert 0.0 in grid.values()[0].tolist()
    # Half a step, and what the rounding of the scale to fp16 adds up to over the range.
    step = float(grid.scale)
    bound = step / 2 + (2**bits - 1) * max(step * 2.0**-11, 2.0**-25)
    values = grid.values()[0].tolist()
    assert max(min(abs(weight - value) for value in values) for weight in weights) <= bound * (1 + 1e-5)


def test_uniform_grid_of_zeros_spans_minus_one_to_one() -> None:
    values = uniform_grid(torch.zeros(1, 8), 2).values()[0]
    assert values.tolist() == pytest.approx([-4 / 3, -2 / 3, 0.0, 2 / 3], abs=1e-3)
    assert 0.0 in values.tolist()
