"""BiLLM against a twin in plain Python: salient columns, break point, residual, feedback of a whole layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.artifact.layout import LayerSpec, layer_shapes
from bitwright.codebook import CodebookMatrix, matrix_shapes
from bitwright.recipe import WeightRecipe, preset
from bitwright.runtime import QuantizedLinear
from bitwright.solvers import SOLVERS, billm, factorize, join_rows, output_error
from bitwright.solvers.feedback import solve_rows

from . import twins
from .test_solve_rows import layer, site
from .twins import examples, gaussian, random_matrix

BILLM = preset("billm").weights


def recipe(**changes: Any) -> WeightRecipe:
    return WeightRecipe(**{**BILLM.model_dump(), **changes})


# --- the twin: float64 and loops --------------------------------------------------------------------------------------


def binarized(values: Sequence[float], order: int) -> list[float]:
    """mean + size * sign of what is left, `order` times; size is the mean distance from the mean."""
    result = [0.0] * len(values)
    for _ in range(order):
        rest = [value - so_far for value, so_far in zip(values, result, strict=True)]
        mean = math.fsum(rest) / len(rest)
        size = math.fsum(abs(r - mean) for r in rest) / len(rest)
        result = [so_far + mean + (size if r >= mean else -size) for so_far, r in zip(result, rest, strict=True)]
    return result


def loss(values: Sequence[float], order: int) -> float:
    return math.fsum((v - b) ** 2 for v, b in zip(values, binarized(values, order), strict=True)) if values else 0.0


def losses_of_counts(measure: np.ndarray) -> tuple[list[int], dict[int, float]]:
    """Columns by falling saliency, and the error of the measure for each number of salient ones."""
    width = measure.shape[1]
    ranks = sorted(range(width), key=lambda column: (-math.fsum(abs(measure[:, column])), column))
    found = {}
    for count in range(1, min(49, width - 1) + 1):
        parts = (ranks[:count], ranks[count:])
        found[count] = math.fsum(loss([float(row[c]) for c in part], 2) for row in measure for part in parts)
    return ranks, found


def quantiles(values: list[float]) -> list[float]:
    """Of 10, 11, .. 90 %, linear between neighbours."""
    ordered, found = sorted(values), []
    for percent in range(10, 91):
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        found.append(ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]))
    return found


def losses_of_points(measure: np.ndarray, salient: set[int]) -> dict[float, float]:
    rows, width = measure.shape
    others = [c for c in range(width) if c not in salient]
    sizes = [0.0 if c in salient else abs(float(measure[j, c])) for j in range(rows) for c in range(width)]
    found = {}
    for point in quantiles(sizes):
        sides = (
            [[float(row[c]) for c in others if (abs(row[c]) < point) == small] for row in measure]
            for small in (True, False)
        )
        found[point] = math.fsum(loss(values, 1) for side in sides for values in side)
    return found


def four_levels(row: np.ndarray, members: Sequence[Sequence[int]]) -> list[float]:
    """mean - size and mean + size of each part of a row; 0 of an empty one."""
    levels = []
    for part in members:
        mean = math.fsum(row[c] for c in part) / max(len(part), 1)
        size = math.fsum(abs(row[c] - mean) for c in part) / max(len(part), 1)
        levels += [mean - size, mean + size]
    return levels


def block(work: np.ndarray, measure: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """What the weights of a block are rounded to, on the format's grid, and its salient columns."""
    ranks, of_counts = losses_of_counts(measure)
    salient = set(ranks[: min(of_counts, key=of_counts.__getitem__)] if of_counts else [])
    of_points = losses_of_points(measure, salient)
    point = min(of_points, key=of_points.__getitem__)
    result = np.zeros_like(work)
    for j, row in enumerate(work):
        small, large = (
            [c for c in range(len(row)) if c not in salient and (abs(measure[j, c]) < point) == wanted]
            for wanted in (True, False)
        )
        stored = twins.on_grid(four_levels(row, (small, large)))
        for part, (low, high) in ((small, stored[:2]), (large, stored[2:])):
            middle = math.fsum(row[c] for c in part) / max(len(part), 1)
            result[j, part] = [high if row[c] >= middle else low for c in part]
        if salient:
            part = sorted(salient)
            first = four_levels(row, (part,))
            mean = math.fsum(row[c] for c in part) / len(part)
            left = [row[c] - first[bool(row[c] >= mean)] for c in part]
            second = four_levels(np.array(left), (range(len(part)),))
            centre = math.fsum(left) / len(left)
            pairs = twins.on_grid([a + b for b in second for a in first])
            result[j, part] = [
                pairs[int(row[c] >= mean) + 2 * int(rest >= centre)] for c, rest in zip(part, left, strict=True)
            ]
    return result, salient


def solved(weights: Tensor, hessian: Tensor, outliers: int, asked: WeightRecipe) -> tuple[np.ndarray, set[int]]:
    """The whole layer, float64 in site order, and the salient columns of all blocks."""
    hd = twins.damped(hessian, asked.damping)
    h = twins.importance_of(hd, asked.importance)
    work = weights.double().numpy().copy()
    work[:, hessian.diagonal().numpy() <= 0] = 0.0
    columns = work.shape[1]
    normal = columns - outliers
    reach = columns if asked.feedback_outliers else normal
    factor = np.linalg.cholesky(np.linalg.inv(hd)).T
    result, salient = np.zeros_like(work), set()
    for start in range(0, normal, asked.group or normal):
        stop = min(start + (asked.group or normal), normal)
        part = work[:, start:stop]
        measure = part.copy() if asked.importance == "none" else part**2 * h[start:stop]
        result[:, start:stop], own = block(part, measure)
        salient |= {start + column for column in own}
        residual = part - result[:, start:stop]
        if asked.feedback == "block-diag":
            errors = residual / np.diag(factor)[start:stop]
            work[:, stop:reach] -= errors @ factor[start:stop, stop:reach]
        elif asked.feedback == "block-tri":
            change = residual @ hd[start:stop, stop:] @ np.linalg.inv(hd[stop:, stop:])
            work[:, stop:reach] += change[:, : reach - stop]
    if outliers:
        scale = np.float64(np.float16(np.abs(work[:, normal:]).max(axis=1, keepdims=True) / 127))
        result[:, normal:] = np.clip(np.rint(work[:, normal:] / scale), -128, 127) * scale
    return result, salient


# --- the parts --------------------------------------------------------------------------------------------------------


def test_worked_row() -> None:
    """[3, 1, -2, -4]: order 1 gives [2, 2, -3, -3], order 2 is exact."""
    x = torch.tensor([[3.0, 1.0, -2.0, -4.0]], dtype=torch.float64)
    everything = torch.ones(1, 4, dtype=torch.bool)
    levels, above = billm.binarize(x, everything)
    assert levels.gather(1, above.long()).tolist() == [[2.0, 2.0, -3.0, -3.0]]
    assert binarized([3, 1, -2, -4], 1) == [2.0, 2.0, -3.0, -3.0]
    levels, above, more = billm.binarize_twice(x, everything)
    assert levels.gather(1, above.long() + 2 * more.long()).tolist() == x.tolist()
    assert binarized([3, 1, -2, -4], 2) == [3.0, 1.0, -2.0, -4.0]


def test_a_row_without_members_has_levels_of_zero() -> None:
    x, nobody = gaussian(2, 5).double(), torch.zeros(2, 5, dtype=torch.bool)
    assert billm.binarize(x, nobody)[0].tolist() == [[0.0, 0.0]] * 2


measures = st.tuples(st.integers(1, 6), st.integers(2, 14), st.booleans(), st.integers(0, 10**6))


def measure_of(rows: int, width: int, signed: bool, seed: int, rounded: bool = True) -> Tensor:
    """As a block has it: squares, or signed weights; some rounded or with columns alike, so that there are equal
    ones; a dead column. Rounded weights may equal a mean, and then have either sign, as the sums round."""
    values = gaussian(rows, width, seed=seed).double() * torch.linspace(0.3, 2, width)
    values = values if signed else values.square()
    if seed % 3 == 0:
        values = values.mul(4).round().div(4) if rounded else values[:, torch.arange(width) // 2]
    values[:, seed % width] = 0.0 if seed % 2 else values[:, seed % width]
    return values


@given(measures)
@examples(60)
def test_salient_columns_represent_the_measure_best(case: tuple[int, int, bool, int]) -> None:
    measure = measure_of(*case, rounded=False)
    _ranks, losses = losses_of_counts(measure.numpy())
    chosen = billm.salient_columns(measure)
    count = int(chosen.sum())
    sums = measure.abs().sum(dim=0)
    assert sums[chosen].min() >= sums[~chosen].max() - 1e-12
    assert losses[count] <= min(losses.values()) + 1e-9 * (1 + losses[1])


@given(measures, st.integers(0, 3))
@examples(60)
def test_break_point_errs_least(case: tuple[int, int, bool, int], count: int) -> None:
    measure = measure_of(*case)
    salient = torch.zeros(measure.shape[1], dtype=torch.bool)
    salient[torch.randperm(measure.shape[1], generator=torch.Generator().manual_seed(case[3]))[:count]] = True
    if bool(salient.all()):
        return
    losses = losses_of_points(measure.numpy(), set(salient.nonzero().flatten().tolist()))
    point = billm.break_point(measure, salient)
    nearest = min(losses, key=lambda tried: abs(tried - point))
    assert nearest == pytest.approx(point, rel=1e-12)
    assert losses[nearest] <= min(losses.values()) + 1e-9 * (1 + float(measure.square().sum()))


def test_no_more_than_49_columns_are_salient() -> None:
    """Two magnitudes for the first 60 columns would be better."""
    measure = torch.cat([gaussian(4, 60).square() + 50, gaussian(4, 68, seed=1).square()], dim=1).double()
    chosen = billm.salient_columns(measure)
    assert int(chosen.sum()) <= 49
    assert not bool(chosen[60:].any())


# --- the whole layer --------------------------------------------------------------------------------------------------

LAYERS = [
    # columns, outliers, group, options
    (43, 0, 16, {}),
    (43, 4, 16, {}),
    (43, 4, 16, {"feedback_outliers": False}),
    (43, 4, 16, {"feedback": "block-tri"}),
    (43, 0, 16, {"feedback": "none"}),
    (43, 3, 16, {"importance": "none"}),
    (43, 3, 16, {"importance": "hessian", "damping": 0.05}),
    (40, 0, 0, {}),
    (17, 0, 16, {}),
    (70, 2, 64, {"feedback": "block-tri"}),
]


def agrees(weights: Tensor, hessian: Tensor, outliers: int, asked: WeightRecipe) -> CodebookMatrix:
    before = weights.clone()
    matrix = SOLVERS["billm"](weights, factorize(hessian, asked.damping, asked.importance), outliers, asked)
    assert torch.equal(weights, before)
    expected, salient = solved(weights, hessian, outliers, asked)
    assert set(matrix.salient_channels().nonzero().flatten().tolist()) == salient
    found = matrix.dequantize_site_order().double().numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    return matrix


@pytest.mark.parametrize(("columns", "outliers", "group", "options"), LAYERS)
def test_layer(columns: int, outliers: int, group: int, options: dict[str, Any]) -> None:
    matrix = agrees(gaussian(7, columns, seed=1), site(columns, seed=2), outliers, recipe(group=group, **options))
    normal = columns - outliers
    width = matrix.group
    produced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in matrix.tensors().items()}
    assert produced == matrix_shapes(7, columns, 2, width, "salient", outliers)
    groups = -(-normal // width)
    by_hand = 7 * (2 * -(-normal // 8) * 8 + groups * 2 * (4 * 8 + 16)) + -(-normal // 8) * 8
    assert matrix.stored_bits() == by_hand + (7 * (8 * outliers + 16) if outliers else 0)


@pytest.mark.parametrize("seed", range(4))
def test_layers_of_real_width(seed: int) -> None:
    agrees(gaussian(9, 200, seed=seed) * 0.02, site(200, seed=seed + 10), 16, recipe())


@pytest.mark.parametrize("dead", [(0,), (3, 11, 19), tuple(range(8))])
def test_dead_columns(dead: tuple[int, ...]) -> None:
    weights, hessian = gaussian(5, 26, seed=9), site(26, seed=10, dead=dead)
    first = agrees(weights, hessian, 2, recipe(group=8))
    other = weights.clone()
    other[:, list(dead)] = 1e3
    second = agrees(other, hessian, 2, recipe(group=8))
    assert torch.equal(first.dequantize(), second.dequantize())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (3, 2), (300, 24)])
def test_odd_sizes(rows: int, columns: int) -> None:
    agrees(gaussian(rows, columns, seed=3), site(columns, seed=4), 0, recipe(group=8))


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e4])
def test_extreme_weights_stay_finite(scale: float) -> None:
    weights = gaussian(4, 24, seed=20) * scale
    weights[1] = 0.0
    weights[2] = scale
    matrix = SOLVERS["billm"](weights, factorize(site(24, seed=21), 0.01, "conditional"), 4, recipe(group=8))
    assert matrix.dequantize().isfinite().all()


def test_between_one_bit_and_four_free_levels() -> None:
    """A split and residuals are much better than one bit; four levels wherever the weights lie are better still."""
    errors = {"one bit": 0.0, "billm": 0.0, "bwa": 0.0}
    for seed in range(3):
        weights, hessian = layer(seed)
        factor = factorize(hessian, 0.01, "conditional")
        one = WeightRecipe(bits=1, order="none", outliers=0)
        four = WeightRecipe(order="none", outliers=0)
        for name, matrix in (
            ("one bit", solve_rows(weights, factor, 0, one)),
            ("billm", SOLVERS["billm"](weights, factor, 0, BILLM)),
            ("bwa", solve_rows(weights, factor, 0, four)),
        ):
            lost, total = output_error(weights, matrix.dequantize_site_order(), hessian)
            errors[name] += lost / total
    assert errors["billm"] < 0.6 * errors["one bit"]
    assert errors["bwa"] < errors["billm"]


# --- the kind of codebook ---------------------------------------------------------------------------------------------


def test_weights_of_salient_columns_have_levels_of_their_own() -> None:
    matrix = random_matrix(3, 21, 8, "salient", 4, 6, True)
    chosen, codes, result = matrix.salient_channels(), matrix.codes(), matrix.dequantize_site_order()
    assert 0 < int(chosen.sum()) < 17
    for row, column in itertools.product(range(3), range(17)):
        levels, scales = (
            (matrix.salient_levels, matrix.salient_scales) if chosen[column] else (matrix.levels, matrix.scales)
        )
        assert levels is not None
        assert scales is not None
        expected = float(levels[row, column // 8, int(codes[row, column])]) * float(scales[row, column // 8])
        assert float(result[row, column]) == expected
    for made in (matrix.expanded, matrix.integer_levels):
        with pytest.raises(ValueError, match="two codebooks"):
            made()


def test_honest_bits_of_a_large_layer() -> None:
    """2 bits of codes, 96 of levels and scales a group of 128, a bit a column for all rows: 2.7502."""
    shapes = layer_shapes("x", LayerSpec(4096, 4096, 2, 128, "salient", 0, False, None), torch.float16)
    size = sum(math.prod(shape) * dtype.itemsize * 8 for dtype, shape in shapes.values())
    assert size / 4096**2 == pytest.approx(2 + 96 / 128 + 1 / 4096)


def test_stacked_rows_share_the_bitmap() -> None:
    matrix = random_matrix(9, 30, 8, "salient", 4, 1, False)
    parts = []
    for start, stop in ((0, 4), (4, 9)):
        cut = {n: getattr(matrix, n)[start:stop] for n in ("scales", "levels", "salient_levels", "salient_scales")}
        cut |= {n: getattr(matrix, n)[start:stop] for n in ("outliers", "outlier_scales")}
        parts.append(
            CodebookMatrix(
                stop - start, 30, 2, 8, "salient", matrix.planes[:, start:stop], salient=matrix.salient, **cut
            )
        )
    assert torch.equal(join_rows(parts, None).dequantize(), matrix.dequantize())


@pytest.mark.parametrize("inputs", [None, preset("atom").activations, preset("bwa").activations])
def test_no_kernel_takes_it(inputs: Any) -> None:
    """It runs on torch's product, and says so beforehand."""
    matrix = random_matrix(6, 40, 16, "salient", 8, 1, False)
    module = QuantizedLinear.from_matrix("x", LayerSpec(6, 40, 2, 16, "salient", 8, False, None), inputs, matrix, None)
    assert not module.packable
    assert torch.equal(module.matrix().dequantize(), matrix.dequantize())
