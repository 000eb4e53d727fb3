"""The native solver against the torch code, its oracle, and against the slow twins (csrc/solver/)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.native import find
from bitwright.recipe import WeightRecipe
from bitwright.solvers import factorize, native, output_error
from bitwright.solvers.feedback import find_levels_reference, solve_rows_reference
from bitwright.solvers.hessian import Factor
from bitwright.solvers.levels import GridLevels, dp_levels, em_levels, minmax_levels, snap

from .twins import best_partition, correlated, examples, gaussian, loss_of

module: Any = find()
pytestmark = pytest.mark.skipif(module is None, reason="built without native kernels")

SEARCHES = {"em": em_levels, "dp": dp_levels, "minmax": lambda block, _, bits: minmax_levels(block, bits)}
KINDS = ("plain", "ties", "zeros", "constant", "huge", "tiny", "offset", "outlier")


def block_of(kind: str, rows: int, width: int, seed: int) -> Tensor:
    block = gaussian(rows, width, seed=seed)
    if kind == "ties":
        return (block * 2).round() / 2
    if kind == "zeros":
        return block * (gaussian(rows, width, seed=seed + 1) > 0.5) * -1.0  # zeros of both signs
    if kind == "constant":
        return block[:, :1].expand(rows, width).contiguous()
    if kind == "outlier":
        block[:, 0] *= 1e4
    return block * {"huge": 1e8, "tiny": 1e-9}.get(kind, 1.0) + (1e3 if kind == "offset" else 0.0)


def weight_of(kind: str, width: int, seed: int) -> Tensor:
    h = gaussian(width, seed=seed).square() + 0.01
    if kind == "none":
        return torch.zeros(width)
    if kind == "some":
        h[::3] = 0.0
    return h * (1e12 if kind == "large" else 1.0)


blocks = st.tuples(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 300), st.integers(0, 10**6))
weights_of_columns = st.sampled_from(["plain", "some", "none", "large"])


@given(blocks, weights_of_columns, st.integers(1, 4), st.sampled_from(list(SEARCHES)))
@examples(250)
def test_levels_are_those_of_torch(case: tuple[str, int, int, int], weight: str, bits: int, search: str) -> None:
    """To the bit, but for dp where two partitions cost the same within rounding: then the cost must be the same."""
    kind, rows, width, seed = case
    block, h = block_of(kind, rows, width, seed), weight_of(weight, width, seed + 7)
    found, expected = native.real_levels(module, search, block, h, bits), SEARCHES[search](block, h, bits)
    if search != "dp":
        assert torch.equal(found, expected)
        return
    for row, one, other in zip(
        block.double().tolist(), found.double().tolist(), expected.double().tolist(), strict=True
    ):
        if one != other:
            importance = h.double().tolist()
            scale = sum(b * a * a for a, b in zip(row, importance, strict=True))
            assert one == sorted(one)
            assert loss_of(row, importance, one) == pytest.approx(
                loss_of(row, importance, other), rel=1e-6, abs=1e-12 * scale
            )


@given(
    st.lists(st.one_of(st.integers(-6, 6).map(lambda n: n / 2), st.floats(-4, 4, width=32)), min_size=1, max_size=9),
    st.data(),
    st.integers(1, 4),
)
@examples(150)
def test_dp_is_the_best_of_all_partitions(weights: list[float], data: st.DataObject, bits: int) -> None:
    kinds = st.sampled_from([0.0, 0.25, 1.0, 2.0, 7.0])
    h = data.draw(st.lists(kinds, min_size=len(weights), max_size=len(weights)))
    h = h if any(h) else [1.0] * len(h)
    row = [float(np.float32(w)) for w in weights]
    levels = native.real_levels(module, "dp", torch.tensor([row]), torch.tensor(h), bits)[0].double().tolist()
    scale = sum(b * a * a for a, b in zip(row, h, strict=True))
    assert levels == sorted(levels)
    assert loss_of(row, h, levels) == pytest.approx(
        best_partition(row, h, 2**bits), rel=1e-6, abs=1e-12 * scale + 1e-30
    )


@pytest.mark.parametrize("iterations", [1, 2, 3, 20])
def test_em_stops_at_its_iterations(iterations: int) -> None:
    block, h = gaussian(40, 96, seed=1), gaussian(96, seed=2).abs()
    found = native.real_levels(module, "em", block, h, 2, iterations)
    assert torch.equal(found, em_levels(block, h, 2, iterations))


@given(
    st.integers(1, 4),
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=16, max_size=16),
    st.sampled_from([1e-45, 1e-30, 1e-7, 1e-5, 1.0, 100.0]),
)
@examples(200)
def test_snap_is_that_of_torch(bits: int, levels: list[float], factor: float) -> None:
    row = torch.tensor([levels[: 2**bits]]).sort(dim=1).values * factor
    integers, scale = native.snap(module, row)
    expected = snap(row)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(integers, expected.integers)


def test_every_fp16_scale_is_rounded_to_even() -> None:
    """Every fp16 number, the middle to the next, and a hair to either side of it."""
    numbers = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    hairs = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (0.0, torch.inf)]
    for scales in (numbers, middles, *hairs):
        levels = torch.stack([-scales * 127, scales * 127], dim=1)
        integers, scale = native.snap(module, levels)
        expected = snap(levels)
        assert torch.equal(scale, expected.scale)
        assert torch.equal(integers, expected.integers)


@given(blocks, weights_of_columns, st.integers(1, 4), st.sampled_from(native.SEARCHES), st.integers(1, 3))
@examples(150)
def test_levels_on_the_grid_are_those_of_torch(
    case: tuple[str, int, int, int], weight: str, bits: int, search: Any, threads: int
) -> None:
    kind, rows, width, seed = case
    block, h = block_of(kind, rows, width, seed), weight_of(weight, width, seed + 7)
    recipe = WeightRecipe(levels=search, bits=bits)
    found = native.find_levels(block, h, recipe, threads)
    if search == "dp":  # of partitions that cost the same either may be found: see above
        integers, scale = native.snap(module, native.real_levels(module, "dp", block, h, bits))
        expected = GridLevels(integers, scale)
    else:
        expected = find_levels_reference(block, h, recipe)
    assert torch.equal(found.integers, expected.integers)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero is None) == (expected.zero is None) == (search != "uniform")
    assert found.zero is None or expected.zero is None or torch.equal(found.zero, expected.zero)


# --- the block loop ---------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def site(columns: int, seed: int, dead: tuple[int, ...] = ()) -> Tensor:
    x = correlated(columns, seed)
    x[:, list(dead)] = 0.0
    return x.T @ x


def compare(weights: Tensor, hessian: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> None:
    """The same codebooks and codes; a row may differ where a weight is within rounding of a tie, at the same loss."""
    before = weights.clone()
    found = native.solve_rows(weights, factor, outliers, recipe)
    expected = solve_rows_reference(weights, factor, outliers, recipe)
    assert torch.equal(weights, before)
    assert (found.kind, found.rows, found.columns, found.permutation) == (
        expected.kind,
        expected.rows,
        expected.columns,
        None,
    )
    if same(found, expected):
        return
    differing = (found.dequantize() != expected.dequantize()).any(dim=1)
    assert int(differing.sum()) <= 1 + len(differing) // 20
    lost, lost_there = (output_error(weights, m.dequantize(), hessian)[0] for m in (found, expected))
    assert lost == pytest.approx(lost_there, rel=1e-5 if not differing.any() else 0.05)


@pytest.mark.parametrize(
    ("feedback", "feedback_outliers", "levels"),
    itertools.product(native.FEEDBACK, (True, False), native.SEARCHES),
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_mode(feedback: Any, feedback_outliers: bool, levels: Any, bits: int) -> None:
    """A ragged last group, later columns that do not fill a panel, rows that do not fill a strip."""
    recipe = WeightRecipe(group=16, bits=bits, levels=levels, feedback=feedback, feedback_outliers=feedback_outliers)
    hessian = site(133, seed=2, dead=(0, 50, 131))
    compare(gaussian(21, 133, seed=bits), hessian, factorize(hessian, 0.01, "conditional"), 6, recipe)


@pytest.mark.parametrize(("bits", "symmetric"), itertools.product([1, 2, 4, 5, 7, 8], (False, True)))
@pytest.mark.parametrize("feedback", native.FEEDBACK)
@pytest.mark.parametrize(("group", "clip"), [(0, 1.0), (16, 1.0), (16, 0.85)])
def test_equally_spaced_levels(feedback: Any, group: int, clip: float, bits: int, symmetric: bool) -> None:
    recipe = WeightRecipe(bits=bits, group=group, levels="uniform", feedback=feedback, symmetric=symmetric, clip=clip)
    hessian = site(133, seed=2, dead=(0, 50, 131))
    weights = gaussian(21, 133, seed=bits)
    factor = factorize(hessian, 0.01, "conditional")
    compare(weights, hessian, factor, 6, recipe)
    assert native.serves(recipe)
    # Nothing is handed on to the first group: there every code is torch's.
    found, expected = (solve(weights, factor, 6, recipe) for solve in (native.solve_rows, solve_rows_reference))
    first = 16 if group else 127 if feedback != "block-tri" else 0
    assert torch.equal(found.codes()[:, :first], expected.codes()[:, :first])


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([8, 24, 128, 4096]),
    st.sampled_from(native.FEEDBACK),
    st.sampled_from(["em", "dp", "uniform"]),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
)
@examples(60)
def test_shapes(rows: int, columns: int, group: int, feedback: Any, levels: Any, kind: str, seed: int) -> None:
    hessian = site(columns, seed)
    outliers = seed % min(columns, 20)
    recipe = WeightRecipe(group=group, feedback=feedback, levels=levels)
    weights = block_of(kind, rows, columns, seed)
    found = native.solve_rows(weights, factorize(hessian, 0.01, "conditional"), outliers, recipe)
    assert found.dequantize().isfinite().all()
    if kind in ("plain", "outlier"):  # elsewhere many weights lie on ties
        compare(weights, hessian, factorize(hessian, 0.01, "conditional"), outliers, recipe)


@pytest.mark.parametrize("feedback", native.FEEDBACK)
@pytest.mark.parametrize("levels", ["em", "dp", "uniform"])
def test_threads_and_neighbours_change_nothing(feedback: Any, levels: Any) -> None:
    weights = gaussian(75, 300, seed=12)
    weights[3] = 0.0
    weights[7] = weights[8]
    weights[11] = weights[11].sign()
    factor = factorize(site(300, seed=13), 0.01, "conditional")
    recipe = WeightRecipe(group=64, feedback=feedback, levels=levels)
    matrices = [native.solve_rows(weights, factor, 10, recipe, threads=count) for count in (1, 2, 3)]
    assert same(matrices[0], matrices[1])
    assert same(matrices[0], matrices[2])
    for row in range(0, 75, 9):
        alone = native.solve_rows(weights[row : row + 1], factor, 10, recipe)
        assert torch.equal(alone.dequantize()[0], matrices[0].dequantize()[row])
        assert torch.equal(alone.planes[:, 0], matrices[0].planes[:, row])


def test_the_scalar_variant_agrees() -> None:
    chosen = module.chosen()
    hessian = site(200, seed=3)
    factor = factorize(hessian, 0.01, "conditional")
    weights, recipe = gaussian(40, 200, seed=4), WeightRecipe(group=64, levels="dp", feedback="column")
    try:
        module.choose("scalar")
        compare(weights, hessian, factor, 8, recipe)
        upper = native.upper_factor(hessian, 1.0)
    finally:
        module.choose(chosen)
    assert torch.allclose(upper, native.upper_factor(hessian, 1.0), rtol=1e-4, atol=1e-6)


def test_strided_weights_and_no_rows() -> None:
    factor = factorize(site(40, seed=5), 0.01, "conditional")
    wide = gaussian(6, 80, seed=6)
    recipe = WeightRecipe(group=16)
    assert same(
        native.solve_rows(wide[:, ::2], factor, 4, recipe),
        native.solve_rows(wide[:, ::2].clone(), factor, 4, recipe),
    )
    assert native.solve_rows(wide[:0, :40], factor, 4, recipe).planes.shape == (2, 0, 5)


def test_wrong_shapes_are_refused() -> None:
    factor = factorize(site(40, seed=5), 0.01, "conditional")
    with pytest.raises(ValueError, match="41 columns"):
        native.solve_rows(gaussian(2, 41), factor, 4, WeightRecipe(group=16))
    with pytest.raises(ValueError, match="outliers"):
        native.solve_rows(gaussian(2, 40), factor, 40, WeightRecipe(group=16))
    with pytest.raises(ValueError, match="square"):
        native.upper_factor(torch.zeros(3, 4), 0.1)


# --- the factor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 127, 128, 129, 300])
def test_factor_of_the_inverse(columns: int) -> None:
    hessian = site(columns, seed=columns)
    shift = 0.01 * float(hessian.diagonal().mean())
    uppers = [native.upper_factor(hessian, shift, threads) for threads in (1, 2, 3)]
    upper = uppers[0]
    assert upper is not None
    assert all(torch.equal(upper, other) for other in uppers)
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(hessian.double() + shift * torch.eye(columns, dtype=torch.float64))
    exact = torch.linalg.cholesky(inverse, upper=True)
    assert torch.allclose(upper.double(), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("place", [0, 5, 140, 199])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
def test_no_factor_where_there_is_none(place: int, value: float) -> None:
    hessian = site(200, seed=1)
    hessian[place, :] = hessian[:, place] = 0.0
    hessian[place, place] = value
    assert native.upper_factor(hessian, 0.0) is None
