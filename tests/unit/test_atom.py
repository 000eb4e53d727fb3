"""Atom: symmetric inputs and clipped symmetric weights, against twins in plain Python written from its procedure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.activations import quantize_groups, quantize_site
from bitwright.pipeline.block import ROW_CHUNK
from bitwright.recipe import ActivationRecipe, WeightRecipe, preset
from bitwright.reference import quantized_linear
from bitwright.solvers import SOLVERS, factorize

from . import twins
from .test_solve_rows import compare, site
from .twins import examples, gaussian, random_matrix

ATOM = preset("atom")


def inputs(**changes: Any) -> ActivationRecipe:
    return ActivationRecipe(**{"balance": "none", "clip": 0.9, "symmetric": True, **changes})


def token(values: list[float], outliers: int, group: int, bits: int, clip: float) -> list[float]:
    """One token in site order: groups of normal channels from -8 to 7 steps of clip max / 7, outliers int8."""
    normal, rest = values[: len(values) - outliers], values[len(values) - outliers :]
    top = 2 ** (bits - 1) - 1
    result = []
    for start in range(0, len(normal), group):
        part = normal[start : start + group]
        step = max(clip * max(map(abs, part)) / top, 1e-5)
        result += [min(max(float(np.rint(x / step)), -top - 1), top) * step for x in part]
    if rest:
        step = max(map(abs, rest)) / 127 or 1.0
        result += [min(max(float(np.rint(x / step)), -127), 127) * step for x in rest]
    return result


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=40),
    st.integers(0, 5),
    st.sampled_from([8, 16]),
    st.sampled_from([4, 8]),
    st.sampled_from([1.0, 0.9]),
)
@examples(150)
def test_inputs_against_the_twin(values: list[float], outliers: int, group: int, bits: Any, clip: float) -> None:
    found = quantize_site(torch.tensor([values]), outliers, group, inputs(bits=bits, clip=clip))[0].tolist()
    expected = token(values, outliers, group, bits, clip)
    # float32 may break a tie the other way: a step more or less, and no more than half a step from the value either.
    for x, one, other in zip(values, found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6) or abs(abs(one - x) - abs(other - x)) < 1e-4


def test_levels_of_inputs_are_minus_eight_to_seven_steps() -> None:
    x = torch.tensor([[0.7, -0.7, 0.06, 0.3, 0.0, -0.16, 0.64, -0.64]])
    plain = quantize_groups(x, 8, inputs(clip=1.0))
    assert float(plain.step) == pytest.approx(0.1)
    assert plain.values().flatten().tolist() == pytest.approx([0.7, -0.7, 0.1, 0.3, 0.0, -0.2, 0.6, -0.6], abs=1e-6)
    clipped = quantize_groups(x, 8, inputs())
    assert float(clipped.step) == pytest.approx(0.09)
    assert (clipped.codes - clipped.zero).flatten().tolist() == [7, -8, 1, 3, 0, -2, 7, -7]


def test_the_readable_linear_takes_symmetric_inputs() -> None:
    matrix = random_matrix(5, 44, 16, "symmetric", 6, 1, True)
    x = gaussian(4, 44, seed=2)
    expected = [token(row, 6, 16, 4, 0.9) for row in x[:, matrix.permutation].double().tolist()]
    y = torch.tensor(expected, dtype=torch.float64) @ matrix.dequantize_site_order().double().T
    assert torch.allclose(quantized_linear(x, matrix, inputs()), y, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("columns", "outliers"), [(43, 4), (200, 16)])
def test_layer(bits: int, columns: int, outliers: int) -> None:
    """The whole layer: grids at 0.85 of the largest magnitude of the corrected weights, column by column, outliers."""
    asked = ATOM.weights.model_copy(update={"bits": bits, "group": 16 if columns < 128 else 128})
    compare(gaussian(6, columns, seed=bits), site(columns, seed=4), outliers, asked)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("span", [{"clip": 0.85}, {"range": "mse", "importance": "hessian"}])
@pytest.mark.parametrize(("method", "feedback"), [("rtn", "none"), ("gptq", "column")])
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_two_rows_share_a_scale(rows: int, method: Any, feedback: Any, span: dict[str, Any], bits: int) -> None:
    """A last row without a neighbour is as it would be alone."""
    recipe = WeightRecipe(
        method=method,
        bits=bits,
        group=16,
        levels="uniform",
        feedback=feedback,
        symmetric=True,
        rows_a_scale=2,
        **{"importance": "none", **span},
    )
    weights, hessian = gaussian(rows, 43, seed=bits), site(43, seed=4)
    compare(weights, hessian, 4, recipe)
    factor = factorize(hessian, recipe.damping, recipe.importance)
    matrix = SOLVERS[method](weights, factor, 4, recipe)
    assert matrix.scales is not None
    assert torch.equal(matrix.scales[: rows // 2 * 2 : 2], matrix.scales[1::2])
    single = SOLVERS[method](weights, factor, 4, recipe.model_copy(update={"rows_a_scale": 1}))
    assert single.scales is not None
    assert rows == 1 or not torch.equal(matrix.scales, single.scales)
    if rows % 2:
        assert torch.equal(matrix.scales[-1], single.scales[-1])
        last = SOLVERS[method](weights[-1:], factor, 4, recipe)
        assert torch.equal(matrix.planes[:, -1:], last.planes)
    # The format is the same, and so are its bits.
    assert {name: tensor.shape for name, tensor in matrix.tensors().items()} == {
        name: tensor.shape for name, tensor in single.tensors().items()
    }


def test_a_unit_of_work_parts_no_two_rows() -> None:
    assert ROW_CHUNK % 2 == 0


def test_the_larger_row_sets_the_scale_of_two() -> None:
    weights = torch.tensor([[3.0, -1.0, 0.2, 0.0, 0.9, 1.6, -2.0, 0.0], [0.5, -0.5, 0.2, 0.1, 0.3, 0.0, -6.0, 0.4]])
    recipe = WeightRecipe(
        method="rtn", bits=4, group=8, levels="uniform", feedback="none", symmetric=True, clip=0.85, rows_a_scale=2
    )
    matrix = SOLVERS["rtn"](weights, factorize(torch.eye(8), 0.01, "none"), 0, recipe)
    assert matrix.scales is not None
    assert matrix.scales.flatten().tolist() == pytest.approx([0.85 * 2 * 6 / 15] * 2, rel=5e-4)
    codes = (matrix.dequantize() / matrix.scales.float()).round()
    assert codes.tolist() == [[4.0, -1.0, 0.0, 0.0, 1.0, 2.0, -3.0, 0.0], [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, -8.0, 1.0]]


@pytest.mark.parametrize(("bits", "step"), [(2, 0.85 * 2 * 3 / 3), (4, 0.85 * 2 * 3 / 15)])
def test_grid_of_a_group(bits: int, step: float) -> None:
    """scale = 0.85 * 2 max / (2^bits - 1); with two bits the levels are -2, -1, 0 and 1 times that."""
    weights = torch.tensor([[3.0, -3.0, 0.2, -1.0, 0.9, 1.6, -2.0, 0.0]])
    recipe = WeightRecipe(
        method="rtn", bits=bits, group=8, levels="uniform", feedback="none", symmetric=True, clip=0.85
    )
    matrix = SOLVERS["rtn"](weights, factorize(torch.eye(8), 0.01, "none"), 0, recipe)
    assert matrix.scales is not None
    assert float(matrix.scales) == pytest.approx(step, rel=5e-4)
    if bits == 2:
        codes = (matrix.dequantize() / matrix.scales.float()).round()
        assert codes.tolist() == [[1.0, -2.0, 0.0, -1.0, 1.0, 1.0, -1.0, 0.0]]
    grid = twins.uniform(weights[0].tolist(), bits, True, 0.85)
    assert set(matrix.dequantize().flatten().tolist()) <= set(grid)
