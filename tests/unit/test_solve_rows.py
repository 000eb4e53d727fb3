"""The whole block loop against a slow twin that has no factor for its exact modes (twins.solve)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.recipe import WeightRecipe
from bitwright.solvers import SOLVERS, factorize, output_error
from bitwright.solvers.feedback import find_levels, find_levels_reference, solve_rows
from bitwright.solvers.levels import GridLevels
from bitwright.transforms import channel_order

from . import twins
from .twins import correlated, gaussian

MODES = ("none", "block-diag", "block-tri", "column")


def site(columns: int, seed: int, dead: tuple[int, ...] = ()) -> Tensor:
    x = correlated(columns, seed)
    x[:, list(dead)] = 0.0
    return x.T @ x


def compare(weights: Tensor, hessian: Tensor, outliers: int, recipe: WeightRecipe) -> None:
    before = weights.clone()
    matrix = solve_rows(weights, factorize(hessian, recipe.damping, recipe.importance), outliers, recipe)
    assert torch.equal(weights, before)
    assert matrix.permutation is None
    found = matrix.dequantize_site_order().double().numpy()
    expected = twins.solve(weights, hessian, outliers, recipe)
    tolerance = 1e-5 * np.abs(expected).max()
    agree = (np.abs(found - expected) <= tolerance).all(axis=1)
    # A weight within float32's rounding of a middle may fall on the other side, and changes the rest of its row.
    assert agree.sum() >= len(agree) - 1, np.abs(found - expected).max(axis=1)
    lost = output_error(weights, matrix.dequantize_site_order(), hessian)[0]
    difference = weights.double().numpy() - expected
    by_twin = float(((difference @ hessian.double().numpy()) * difference).sum())
    assert lost == pytest.approx(by_twin, rel=1e-3 if agree.all() else 0.1)


@pytest.mark.parametrize(
    ("feedback", "feedback_outliers", "levels"),
    itertools.product(MODES, (True, False), ("em", "dp", "minmax", "uniform")),
)
def test_every_mode(feedback: Any, feedback_outliers: bool, levels: Any) -> None:
    """27 normal channels in groups of 16, so the second is ragged, and 4 outliers."""
    recipe = WeightRecipe(group=16, levels=levels, feedback=feedback, feedback_outliers=feedback_outliers)
    compare(gaussian(8, 31, seed=1), site(31, seed=2), 4, recipe)


@pytest.mark.parametrize(("feedback", "bits"), itertools.product(MODES, (1, 3, 4)))
@pytest.mark.parametrize("levels", ["em", "uniform"])
def test_every_width_of_code(feedback: Any, bits: int, levels: Any) -> None:
    compare(
        gaussian(6, 21, seed=3), site(21, seed=4), 0, WeightRecipe(group=8, bits=bits, levels=levels, feedback=feedback)
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("symmetric", "span", "clip"),
    [
        (False, "minmax", 1.0),
        (True, "minmax", 1.0),
        (False, "mse", 1.0),
        (True, "mse", 1.0),
        (False, "minmax", 0.7),
        (True, "minmax", 0.85),
    ],
)
@pytest.mark.parametrize(("method", "group"), [("rtn", 16), ("gptq", 16), ("gptq", 0)])
def test_equally_spaced_levels(method: Any, group: int, bits: int, symmetric: bool, span: Any, clip: float) -> None:
    recipe = WeightRecipe(
        method=method,
        bits=bits,
        group=group,
        levels="uniform",
        feedback="column" if method == "gptq" else "none",
        symmetric=symmetric,
        range=span,
        clip=clip,
        importance="hessian",
    )
    weights, hessian = gaussian(6, 43, seed=23), site(43, seed=24)
    compare(weights, hessian, 2, recipe)
    factor = factorize(hessian, 0.01, "hessian")
    matrix = SOLVERS[method](weights, factor, 2, recipe)
    assert torch.equal(matrix.dequantize(), solve_rows(weights, factor, 2, recipe).dequantize())
    assert (matrix.zeros is None) == symmetric
    assert matrix.group == (group or 48)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("span", [{}, {"clip": 0.7}, {"range": "mse", "importance": "hessian"}, {"rows_a_scale": 2}])
@pytest.mark.parametrize(("method", "group"), [("rtn", 16), ("gptq", 16), ("gptq", 0)])
def test_the_largest_magnitude_is_a_level(method: Any, group: int, span: dict[str, Any], bits: int) -> None:
    """QuaRot's symmetric grid: scale = max / (2**(bits - 1) - 1)."""
    feedback: Any = "column" if method == "gptq" else "none"
    recipe = WeightRecipe(
        method=method,
        bits=bits,
        group=group,
        levels="uniform",
        feedback=feedback,
        symmetric=True,
        scale="max",
        **{"importance": "none", **span},
    )
    weights, hessian = gaussian(6, 43, seed=33), site(43, seed=34)
    compare(weights, hessian, 2, recipe)
    if method == "rtn" and not span:
        matrix = SOLVERS[method](weights, factorize(hessian, 0.01, "none"), 2, recipe)
        assert matrix.kind == "symmetric"
        found, largest = (part[:, :16].abs().amax(dim=1) for part in (matrix.dequantize(), weights))
        assert torch.allclose(found, largest, rtol=1e-3)


@pytest.mark.parametrize("feedback", MODES)
@pytest.mark.parametrize(("columns", "outliers", "group"), [(16, 0, 8), (17, 1, 8), (9, 8, 8), (30, 3, 64), (8, 7, 8)])
def test_shapes(feedback: Any, columns: int, outliers: int, group: int) -> None:
    """Whole groups, one channel too many, a single normal channel, a group wider than the layer."""
    compare(gaussian(5, columns, seed=5), site(columns, seed=6), outliers, WeightRecipe(group=group, feedback=feedback))


@pytest.mark.parametrize("feedback", MODES)
@pytest.mark.parametrize("importance", ["none", "hessian", "inverse", "conditional"])
def test_importance_kinds(feedback: Any, importance: Any) -> None:
    recipe = WeightRecipe(group=8, feedback=feedback, importance=importance, damping=0.05, levels="dp")
    compare(gaussian(5, 20, seed=7), site(20, seed=8), 2, recipe)


@pytest.mark.parametrize("feedback", MODES)
@pytest.mark.parametrize("dead", [(0,), (3, 11, 19), (18, 19), tuple(range(8))])
@pytest.mark.parametrize("levels", ["em", "uniform"])
def test_dead_columns(feedback: Any, dead: tuple[int, ...], levels: Any) -> None:
    weights = gaussian(5, 20, seed=9)
    hessian = site(20, seed=10, dead=dead)
    recipe = WeightRecipe(group=8, feedback=feedback, levels=levels)
    compare(weights, hessian, 2, recipe)
    # What stands in a dead column of the original is of no consequence.
    other = weights.clone()
    other[:, list(dead)] = 1e3
    factor = factorize(hessian, recipe.damping, recipe.importance)
    first, second = (solve_rows(w, factor, 2, recipe) for w in (weights, other))
    assert torch.equal(first.dequantize_site_order(), second.dequantize_site_order())


def test_without_feedback_and_hessian_it_is_k_means() -> None:
    weights = gaussian(6, 40, seed=11)
    recipe = WeightRecipe(group=16, feedback="none")
    matrix = solve_rows(weights, factorize(torch.eye(40), 0.01, "conditional"), 0, recipe)
    result = matrix.dequantize_site_order().double().tolist()
    for j, start in itertools.product(range(6), (0, 16, 32)):
        part = weights[j, start : start + 16].double().tolist()
        levels = twins.on_grid(twins.lloyd(part, [1.0] * len(part), 4))
        rounded = [min(levels, key=lambda level: abs(level - w)) for w in part]
        assert result[j][start : start + 16] == pytest.approx(rounded, abs=1e-6)


@pytest.mark.parametrize("feedback", MODES)
@pytest.mark.parametrize("levels", ["em", "dp", "uniform"])
@pytest.mark.parametrize("parts", [[1] * 19, [5, 9, 5], [18, 1]])
def test_rows_solved_together_equal_rows_solved_alone(feedback: Any, levels: Any, parts: list[int]) -> None:
    weights = gaussian(19, 44, seed=12)
    weights[3] = 0.0
    weights[7] = weights[8]
    weights[11] = weights[11].sign()
    factor = factorize(site(44, seed=13), 0.01, "conditional")
    recipe = WeightRecipe(group=16, feedback=feedback, levels=levels)
    together = solve_rows(weights, factor, 6, recipe)
    start = 0
    for count in parts:
        alone = solve_rows(weights[start : start + count], factor, 6, recipe)
        assert torch.equal(alone.planes, together.planes[:, start : start + count])
        for name, tensor in alone.tensors().items():
            if name != "codes":
                assert torch.equal(tensor, together.tensors()[name][start : start + count])
        start += count


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights and correlated inputs with a few strong channels, in site order with 16 outliers."""
    columns, rank = 160, 24
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(320, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / rank**0.5
    x = x + 0.7 * torch.randn(320, columns, generator=generator)
    gain = torch.exp(0.5 * torch.randn(columns, generator=generator))
    gain[torch.randperm(columns, generator=generator)[:6]] *= 8
    x = (x * gain)[:, channel_order((x * gain).square().sum(dim=0), 16, "ascending")]
    weights = torch.randn(16, columns, generator=generator)
    return weights / (torch.empty(16, columns).exponential_(generator=generator) + 0.2).sqrt(), x.T @ x


def relative_error(**options: Any) -> float:
    """Mean relative output error of three such layers."""
    errors = []
    for seed in range(3):
        weights, hessian = layer(seed)
        factor = factorize(hessian, 0.01, options.get("importance", "conditional"))
        matrix = solve_rows(weights, factor, 16, WeightRecipe(group=32, **options))
        lost, total = output_error(weights, matrix.dequantize_site_order(), hessian)
        errors.append(lost / total)
    return sum(errors) / 3


def test_ranking_of_the_methods() -> None:
    """Section 2.8, on a smaller layer of the same kind."""
    ranking: list[dict[str, Any]] = [
        {"feedback": "none"},
        {"feedback": "block-diag", "feedback_outliers": False},
        {"feedback": "block-diag"},
        {"feedback": "block-tri"},
        {"feedback": "column"},
        {"feedback": "column", "levels": "dp"},
    ]
    errors = [relative_error(**options) for options in ranking]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.85 * errors[1]  # the outliers absorb much
    assert relative_error(feedback="column", levels="uniform") > errors[4]


def test_importance_matters_little() -> None:
    errors = [
        relative_error(feedback="column", levels="dp", importance=kind)
        for kind in ("none", "hessian", "inverse", "conditional")
    ]
    assert max(errors) < 1.1 * min(errors)


@pytest.mark.parametrize("method", ["bwa", "rtn"])
def test_solvers_by_name(method: str) -> None:
    hessian, weights = site(24, seed=16), gaussian(4, 24, seed=17)
    options: Any = {"levels": "uniform", "feedback": "none"} if method == "rtn" else {}
    recipe = WeightRecipe(method=method, group=8, **options)
    factor = factorize(hessian, 0.01, recipe.importance)
    matrix = SOLVERS[method](weights, factor, 4, recipe)
    assert matrix.kind == ("uniform" if method == "rtn" else "free")
    assert torch.equal(matrix.dequantize(), solve_rows(weights, factor, 4, recipe).dequantize())
    if method == "rtn":
        # The Hessian plays no part.
        other = SOLVERS["rtn"](weights, factorize(site(24, seed=99), 0.01, "none"), 4, recipe)
        assert torch.equal(matrix.dequantize(), other.dequantize())


@pytest.mark.parametrize("levels", ["em", "dp", "minmax", "uniform"])
@pytest.mark.parametrize("find_levels", [find_levels, find_levels_reference])
def test_find_levels_goes_by_the_recipe(find_levels: Any, levels: Any) -> None:
    block, h = gaussian(3, 16, seed=18), gaussian(16, seed=19).abs()
    recipe = WeightRecipe(levels=levels, em_iterations=2)
    grid = find_levels(block, h, recipe)
    assert isinstance(grid, GridLevels)
    assert (grid.zero is not None) == (levels == "uniform")
    for row, values in zip(block.double().tolist(), grid.values().double().tolist(), strict=True):
        assert values == pytest.approx(twins.search(row, h.double().tolist(), recipe), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e4])
@pytest.mark.parametrize("levels", ["em", "dp", "uniform"])
def test_extreme_weights_stay_finite(scale: float, levels: Any) -> None:
    weights = gaussian(4, 24, seed=20) * scale
    recipe = WeightRecipe(group=8, levels=levels, feedback="column")
    matrix = solve_rows(weights, factorize(site(24, seed=21), 0.01, "conditional"), 4, recipe)
    result = matrix.dequantize_site_order()
    assert result.isfinite().all()
    if scale >= 1e-4:
        assert (result - weights).abs().max() < weights.abs().max()
