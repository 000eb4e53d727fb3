"""The solver's ops on every backend: against the slow twins, and that they are what the solvers compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.runtime.schemas import SOLVED
from bitwright.runtime.solver_ops import find_levels, solve_rows
from bitwright.solvers import factorize
from bitwright.solvers import feedback as loop

from . import twins
from .twins import correlated, gaussian


@pytest.mark.parametrize("search", ["em", "dp", "minmax", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_are_those_of_the_slow_twin(backend: str, search: Any, bits: int) -> None:
    block, h = gaussian(5, 24, seed=bits), gaussian(24, seed=9).abs()
    integers, scale = find_levels(block, h, search, bits, 3)
    assert (integers.dtype, integers.shape) == (torch.int8, (5, 2**bits))
    assert (scale.dtype, scale.shape) == (torch.float16, (5,))
    recipe = WeightRecipe(levels=search, bits=bits, em_iterations=3)
    found = integers.double() * scale.double().unsqueeze(1)
    for row, levels in zip(block.double().tolist(), found.tolist(), strict=True):
        assert levels == pytest.approx(twins.search(row, h.double().tolist(), recipe), abs=1e-6)


def solved(weights: Tensor, hessian: Tensor, outliers: int, recipe: WeightRecipe) -> tuple[Tensor, ...]:
    factor = factorize(hessian, recipe.damping, recipe.importance)
    found: tuple[Tensor, ...] = solve_rows(
        weights,
        factor.upper,
        factor.importance,
        factor.dead,
        outliers,
        recipe.group,
        recipe.bits,
        recipe.levels,
        recipe.em_iterations,
        recipe.feedback,
        recipe.feedback_outliers,
    )
    return found


@pytest.mark.parametrize("feedback", ["none", "block-diag", "block-tri", "column"])
@pytest.mark.parametrize(("search", "outliers"), [("em", 4), ("dp", 0), ("uniform", 3)])
def test_rows_are_those_of_the_slow_twin(backend: str, feedback: Any, search: Any, outliers: int) -> None:
    x = correlated(24, seed=3)
    x[:, 5] = 0.0
    weights, hessian = gaussian(6, 24, seed=4), x.T @ x
    before = weights.clone()
    recipe = WeightRecipe(group=8, levels=search, feedback=feedback)
    found = solved(weights, hessian, outliers, recipe)
    assert torch.equal(weights, before)

    expected = loop.solve_rows(weights, factorize(hessian, 0.01, "conditional"), outliers, recipe).tensors()
    parts = dict(zip(SOLVED, found, strict=True))
    for name, tensor in parts.items():
        assert tensor.dtype == SOLVED[name][0]
        assert torch.equal(tensor, expected[name]) if name in expected else tensor.numel() == 0, name

    names = {"codes": "planes"}
    matrix = CodebookMatrix(
        rows=6,
        columns=24,
        bits=2,
        group=8,
        kind="uniform" if search == "uniform" else "free",
        **{names.get(name, name): tensor for name, tensor in parts.items() if tensor.numel()},
    )
    np.testing.assert_allclose(matrix.dequantize(), twins.solve(weights, hessian, outliers, recipe), atol=2e-3)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    block, h = gaussian(3, 16), torch.ones(16)
    with pytest.raises(ValueError, match="float32"):
        find_levels(block.double(), h, "em", 2, 20)
    with pytest.raises(ValueError, match="importance for each"):
        find_levels(block, h[:-1], "em", 2, 20)
    with pytest.raises(ValueError, match="at least one"):
        find_levels(block[:, :0], h[:0], "em", 2, 20)
    with pytest.raises(ValueError, match="levels"):
        find_levels(block, h, "best", 2, 20)
    with pytest.raises(ValueError, match="bits"):
        find_levels(block, h, "em", 5, 20)

    options = (2, 8, 2, "em", 20, "column", True)
    upper, dead = torch.eye(16), torch.zeros(16, dtype=torch.bool)
    with pytest.raises(ValueError, match="float32"):
        solve_rows(block.double(), upper, h, dead, *options)
    with pytest.raises(ValueError, match="16 columns need a factor"):
        solve_rows(block, upper[:, :-1], h, dead, *options)
    with pytest.raises(ValueError, match="make no sense"):
        solve_rows(block, upper, h, dead.to(torch.uint8), *options)
    with pytest.raises(ValueError, match="make no sense"):
        solve_rows(block, upper, h, dead, 16, *options[1:])
    with pytest.raises(ValueError, match="rows, columns"):
        solve_rows(block[0], upper, h, dead, *options)
