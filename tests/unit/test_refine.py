"""Refinement against plain loops and exhaustive search, and its promise: no row gets worse."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.solvers import SOLVERS, asymmetric_target, factorize, input_drift, native, residual_correction
from bitwright.solvers.feedback import find_levels, solve_rows
from bitwright.solvers.levels import GridLevels, nearest
from bitwright.solvers.refine import _descend, _refit, improve_reference, refine

from .backends import VARIANTS, module, needs_native, restore
from .twins import correlated, examples, gaussian


def site(columns: int, seed: int, damping: float = 0.01) -> Any:
    x = correlated(columns, seed)
    return factorize(x.T @ x, damping, "conditional", keep_hessian=True)


def losses(weights: Tensor, matrix: CodebookMatrix, hessian: Tensor) -> np.ndarray:
    difference = (weights - matrix.dequantize_site_order()).double().numpy()
    return np.asarray(((difference @ hessian.double().numpy()) * difference).sum(axis=1))


@given(
    rows=st.integers(1, 5),
    columns=st.integers(9, 40),
    outliers=st.integers(0, 4),
    bits=st.integers(1, 4),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_no_row_gets_worse(rows: int, columns: int, outliers: int, bits: int, rounds: int, seed: int) -> None:
    recipe = WeightRecipe(group=16, bits=bits, levels="dp", feedback="column")
    weights, factor = gaussian(rows, columns, seed=seed), site(columns, seed + 1)
    before = solve_rows(weights, factor, outliers, recipe)
    after = refine(weights, before, factor.hessian, rounds)
    assert after.tensors().keys() == before.tensors().keys()
    first, last = losses(weights, before, factor.hessian), losses(weights, after, factor.hessian)
    assert (last <= first * 1.0001 + 1e-9).all()


def test_correlated_inputs_gain_much() -> None:
    recipe = WeightRecipe(group=32, levels="dp", feedback="column")
    weights, factor = gaussian(64, 128, seed=5), site(128, 6)
    before = SOLVERS["bwa"](weights, factor, 8, recipe)
    after = SOLVERS["bwa"](weights, factor, 8, recipe.model_copy(update={"refine": 3}))
    ratio = losses(weights, after, factor.hessian).sum() / losses(weights, before, factor.hessian).sum()
    assert ratio < 0.85


def test_levels_solve_the_normal_equations() -> None:
    hessian = site(24, 2).hessian
    target, ranks = gaussian(3, 24, seed=3), torch.randint(0, 4, (3, 24), generator=torch.Generator().manual_seed(4))
    grid = GridLevels(torch.tensor([[-3, -1, 1, 3]] * 3, dtype=torch.int8), torch.ones(3, dtype=torch.float16))
    found = _refit(target, hessian, grid, ranks)
    root = np.linalg.cholesky(hessian.double().numpy()).T  # |root (t - B l)|^2 is the loss
    for row in range(3):
        members = np.eye(4)[ranks[row].numpy()]
        expected = np.linalg.lstsq(root @ members, root @ target[row].double().numpy(), rcond=None)[0]
        assert found[row].double().numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_level_without_weights_stays() -> None:
    hessian = site(8, 2).hessian
    ranks = torch.tensor([[0, 0, 1, 1, 3, 3, 0, 1]])
    grid = GridLevels(torch.tensor([[-9, -1, 5, 7]], dtype=torch.int8), torch.ones(1, dtype=torch.float16))
    assert _refit(gaussian(1, 8), hessian, grid, ranks)[0, 2] == pytest.approx(5.0, rel=1e-4)


def test_each_column_takes_its_best_level() -> None:
    """One pass against a loop that evaluates the whole loss for every level of every column."""
    hessian = site(12, 7).hessian
    target = gaussian(4, 12, seed=8)
    values = torch.tensor([[-1.5, -0.4, 0.5, 1.4]]).expand(4, 4)
    start = torch.zeros(4, 12, dtype=torch.int64)
    found = _descend(target, hessian, values, start)
    h = hessian.double().numpy()
    for row in range(4):
        levels, codes, aim = values[row].double().numpy(), start[row].numpy().copy(), target[row].double().numpy()
        for column in range(12):
            costs = []
            for code in range(4):
                trial = codes.copy()
                trial[column] = code
                error = aim - levels[trial]
                costs.append(error @ h @ error)
            codes[column] = int(np.argmin(costs))
        assert found[row].tolist() == codes.tolist()


def test_near_the_best_of_all() -> None:
    """Three columns, two levels: all codes with their best levels, by exhaustion, against many rounds."""
    factor = site(3, 11, damping=0.1)
    hessian, weights = factor.hessian, gaussian(20, 3, seed=12)
    recipe = WeightRecipe(group=8, bits=1, levels="dp", feedback="column", outliers=0)
    found = losses(weights, refine(weights, solve_rows(weights, factor, 0, recipe), hessian, 10), hessian)
    root = np.linalg.cholesky(hessian.double().numpy()).T
    best = []
    for row in weights.double().numpy():
        trials = []
        for codes in itertools.product((0, 1), repeat=3):
            members = np.eye(2)[list(codes)]
            levels = np.linalg.lstsq(root @ members, root @ row, rcond=None)[0]
            trials.append(float(np.square(root @ (row - members @ levels)).sum()))
        best.append(min(trials))
    assert (found >= np.array(best) * 0.99 - 1e-6).all()
    assert np.median(found / (np.array(best) + 1e-9)) < 1.1


def test_outlier_columns_stay_where_they_take_no_error() -> None:
    weights, factor = gaussian(8, 40, seed=5), site(40, 6)
    recipe = WeightRecipe(group=16, levels="dp", feedback="column", feedback_outliers=False)
    before = SOLVERS["bwa"](weights, factor, 4, recipe)
    for refined, same in ((recipe, True), (recipe.model_copy(update={"feedback_outliers": True}), False)):
        after = SOLVERS["bwa"](weights, factor, 4, refined.model_copy(update={"refine": 2}))
        assert not torch.equal(after.planes, before.planes)
        assert torch.equal(after.outliers, before.outliers) == same


def test_uniform_levels_are_refused() -> None:
    weights, factor = gaussian(2, 16), site(16, 1)
    matrix = solve_rows(weights, factor, 0, WeightRecipe(group=8, levels="uniform"))
    with pytest.raises(ValueError, match="free levels"):
        refine(weights, matrix, factor.hessian, 1)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_asymmetric_target_is_the_ridge_regression(damping: float) -> None:
    x = correlated(10, 1, tokens=80)
    full = x + 0.3 * correlated(10, 2, tokens=80)
    weights = gaussian(4, 10, seed=3)
    factor = factorize(x.T @ x, damping, "none", keep_hessian=True)
    drift = input_drift(full.T @ x, factor)
    found = asymmetric_target(weights, drift, factor, 1.0).double().numpy()
    # |X_full w - X t|^2 + d |w - t|^2 as one least squares problem.
    ridge = np.sqrt(factor.shift) * np.eye(10)
    left = np.vstack([x.double().numpy(), ridge])
    right = np.vstack([full.double().numpy(), ridge]) @ weights.double().numpy().T
    assert found == pytest.approx(np.linalg.lstsq(left, right, rcond=None)[0].T, rel=1e-3, abs=1e-4)
    half = asymmetric_target(weights, drift, factor, 0.5).double().numpy()
    assert half == pytest.approx((found + weights.double().numpy()) / 2, rel=1e-4, abs=1e-5)
    assert torch.allclose(asymmetric_target(weights, input_drift(x.T @ x, factor), factor, 1.0), weights, atol=1e-4)
    with pytest.raises(ValueError, match="damped Hessian"):
        input_drift(full.T @ x, dataclasses.replace(factor, hessian=None))


def test_the_residual_correction_is_the_ridge_regression() -> None:
    x, strayed = correlated(10, 1, tokens=80), gaussian(80, 4, seed=5)
    factor = factorize(x.T @ x, 0.02, "none", keep_hessian=True)
    left = np.vstack([x.double().numpy(), np.sqrt(factor.shift) * np.eye(10)])
    right = np.vstack([strayed.double().numpy(), np.zeros((10, 4))])
    best = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = residual_correction(strayed.T @ x, factor, 1.0).double().numpy()
    assert found == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert residual_correction(strayed.T @ x, factor, 0.25).double().numpy() == pytest.approx(found / 4, rel=1e-5)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "width", "bits"), [(1, 8, 1), (16, 128, 2), (37, 100, 2), (20, 40, 3), (5, 24, 4)])
def test_native_blocks_are_as_good_as_the_torch_code(variant: str, rows: int, width: int, bits: int) -> None:
    hessian = site(width, 3).hessian
    weights = gaussian(rows, width, seed=4)
    recipe = WeightRecipe(bits=bits, levels="dp")
    start = find_levels(weights, torch.ones(width), recipe)
    ranks = nearest(weights, start.values()).long()
    target = weights + 0.05 * gaussian(rows, width, seed=5)

    def loss(grid: GridLevels, ranks: torch.Tensor) -> torch.Tensor:
        residual = (target - grid.values().gather(1, ranks)).double()
        return ((residual @ hessian.double()) * residual).sum(dim=1)

    expected = improve_reference(target, hessian, start, ranks)
    try:
        module.choose(variant)
        found = native.refine_block(target, hessian, start, ranks)
        for threads in (1, 3):
            again = native.refine_block(target, hessian, start, ranks, threads)
            assert torch.equal(again[0].integers, found[0].integers)
            assert torch.equal(again[1], found[1])
        last = native.refine_block(target[-1:], hessian, GridLevels(start.integers[-1:], start.scale[-1:]), ranks[-1:])
    finally:
        restore()
    assert torch.equal(last[1][0], found[1][-1]), "a row depends on its neighbours"
    before, ours, theirs = loss(start, ranks), loss(*found), loss(*expected)
    assert (ours <= before * 1.0001).all()
    # Where a sum tips a code the rest of the row goes another way: neither better nor worse on the whole.
    assert ours.sum() <= theirs.sum() * 1.03
    assert (found[1] == expected[1]).float().mean() > 0.9
    assert (found[0].values().diff(dim=1) >= 0).all()


@needs_native
def test_native_blocks_refuse_what_does_not_fit() -> None:
    grid = GridLevels(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"a target \[2, 8\] does not go with \[9, 9\]"):
        native.refine_block(gaussian(2, 8), gaussian(9, 9), grid, torch.zeros(2, 8, dtype=torch.int64))
