from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.codebook import code_of_rank, group_count, honest_bits, matrix_shapes
from bitwright.recipe import WeightRecipe
from bitwright.solvers import SOLVERS, factorize, join_rows
from bitwright.solvers.feedback import solve_rows

from .twins import correlated, examples, gaussian, random_matrix

LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # rows, columns


def llama_average(**options: Any) -> float:
    """Bits a weight over the linears of a LLaMA-7B block, 128 outlier channels each."""
    weights = [rows * columns for rows, columns in LLAMA_7B]
    bits = [honest_bits(columns, 128, **options) for _, columns in LLAMA_7B]
    return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)


def test_honest_bits_of_the_paper() -> None:
    assert honest_bits(4096, 128, parameter_bits=64) == (31 * 320 + 128 * 8 + 16) / 4096
    assert round(honest_bits(4096, 128, parameter_bits=64), 4) == 2.6758
    assert round(honest_bits(11008, 128, parameter_bits=64), 4) == 2.5654
    assert round(llama_average(parameter_bits=64), 4) == 2.6512
    assert round(llama_average(parameter_bits=0), 4) == 2.1646
    assert round(llama_average(parameter_bits=128), 4) == 3.1378
    assert round(llama_average(parameter_bits=32), 3) == 2.408  # two scales alone
    # This format: four int8 levels and one fp16 scale a group.
    assert honest_bits(4096, 128) == (31 * (256 + 4 * 8 + 16) + 128 * 8 + 16) / 4096


def test_the_papers_own_table_is_a_flat_3_1875_bits() -> None:
    flat = honest_bits(4096, 128, parameter_bits=0, row_scale_bits=0) + 1.0
    assert flat == 2 + 6 / 32 + 1 == 3.1875
    sizes = {13.5: 2.689, 24.2: 4.821, 60.5: 12.053, 121.0: 24.105}
    for fp16, bwa in sizes.items():
        assert fp16 * flat / 16 == pytest.approx(bwa, abs=6e-4)


def test_normal_part_alone_and_permutation() -> None:
    assert honest_bits(128, 0, parameter_bits=64) == 2.5
    assert honest_bits(256, 0, group=256, parameter_bits=32) == 2.125
    assert honest_bits(4096, 128, rows=4096) - honest_bits(4096, 128) == pytest.approx(16 / 4096, abs=1e-12)
    # A ragged last group pays for a whole codebook.
    assert honest_bits(130, 0) == (130 * 2 + 2 * 48) / 130
    assert honest_bits(128, 0, code_bits=3) == 3 + 48 / 128


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_code_of_rank(bits: int) -> None:
    codes = code_of_rank(bits).tolist()
    assert sorted(codes) == list(range(2**bits))
    if bits == 2:
        inner_and_outer = {rank: (code & 1, code >> 1) for rank, code in enumerate(codes)}
        # Rank -> (q, m): the outer pair has m = 1, the larger of a pair q = 1.
        assert inner_and_outer == {0: (0, 1), 1: (0, 0), 2: (1, 0), 3: (1, 1)}
    else:
        assert codes == list(range(2**bits))


@given(st.integers(1, 600), st.integers(1, 40))
@examples(50)
def test_group_count(columns: int, group: int) -> None:
    assert group_count(columns, group) == len(range(0, columns, group)) == math.ceil(columns / group)


CASES = list(itertools.product(("em", "uniform"), (1, 2, 3, 4), (0, 5), (16, 24)))


@pytest.mark.parametrize(("levels", "bits", "outliers", "group"), CASES)
def test_shapes_bits_and_dequantization(levels: Any, bits: int, outliers: int, group: int) -> None:
    """matrix_shapes is what solve_rows makes; stored bits by hand; dequantize weight by weight."""
    rows, columns = 5, 45
    weights = gaussian(rows, columns, seed=bits)
    x = correlated(columns, seed=3)
    recipe = WeightRecipe(bits=bits, group=group, levels=levels)
    matrix = solve_rows(weights, factorize(x.T @ x, 0.01, "conditional"), outliers, recipe)
    kind = "uniform" if levels == "uniform" else "free"
    produced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in matrix.tensors().items()}
    assert produced == matrix_shapes(rows, columns, bits, group, kind, outliers)
    assert (matrix.outlier_columns, matrix.normal_columns) == (outliers, columns - outliers)

    normal = columns - outliers
    groups = -(-normal // group)
    by_hand = rows * bits * (-(-normal // 8)) * 8 + rows * groups * 16
    by_hand += rows * groups * 8 * (2**bits if kind == "free" else 1)
    by_hand += rows * (8 * outliers + 16) if outliers else 0
    assert matrix.stored_bits() == by_hand

    codes, integers, result = matrix.codes(), matrix.integer_levels(), matrix.dequantize_site_order()
    for row, column in itertools.product(range(rows), range(normal)):
        code, part = int(codes[row, column]), column // group
        if kind == "free":
            level = int(matrix.levels[row, part, code])
        else:
            level = code - int(matrix.zeros[row, part])
        assert level == int(integers[row, part, code])
        assert float(result[row, column]) == level * float(matrix.scales[row, part])
    if outliers:
        expected = matrix.outliers.double() * matrix.outlier_scales.double().unsqueeze(1)
        assert torch.equal(result[:, normal:].double(), expected)


@pytest.mark.parametrize("method", ["bwa", "rtn"])
def test_whole_bytes_cost_what_honest_bits_says(method: str) -> None:
    rows, columns = 3, 144
    x = correlated(columns, seed=1)
    recipe = (
        WeightRecipe(group=64)
        if method == "bwa"
        else WeightRecipe(method="rtn", levels="uniform", feedback="none", group=64)
    )
    matrix = SOLVERS[method](gaussian(rows, columns), factorize(x.T @ x, 0.01, "none"), 16, recipe)
    parameters = 48 if method == "bwa" else 24
    assert matrix.stored_bits() / (rows * columns) == honest_bits(columns, 16, 64, parameter_bits=parameters)


@given(st.permutations(range(13)))
@examples(20)
def test_dequantize_undoes_the_permutation(order: list[int]) -> None:
    stored = random_matrix(2, 13, 8, "free", 3, 5, False)
    matrix = dataclasses.replace(stored, permutation=torch.tensor(order))
    site, model = matrix.dequantize_site_order(), matrix.dequantize()
    for position, channel in enumerate(order):
        assert torch.equal(model[:, channel], site[:, position])
    assert torch.equal(stored.dequantize(), site)


def test_a_shared_table() -> None:
    """Every weight is the table's number of its code, in any row and group; expanded, the same weights."""
    matrix = random_matrix(3, 21, 8, "shared", 4, 6, True, bits=3)
    assert matrix.table is not None
    assert matrix.table.shape == (8,)
    site, codes = matrix.dequantize_site_order(), matrix.codes()
    for row, column in itertools.product(range(3), range(17)):
        assert float(site[row, column]) == float(matrix.table[int(codes[row, column])])
    free = matrix.expanded()
    assert (free.kind, free.table, free.scales.shape) == ("free", None, (3, 3))
    assert torch.equal(free.dequantize(), matrix.dequantize())
    assert torch.equal(matrix.integer_levels(), free.levels)
    assert matrix.stored_bits() == 3 * 3 * 3 * 8 + 8 * 32 + 3 * (4 * 8 + 16)
    assert free.expanded() is free


def test_join_rows_is_a_stack() -> None:
    x = correlated(30, seed=2)
    factor = factorize(x.T @ x, 0.01, "conditional")
    weights = gaussian(9, 30)
    for recipe, outliers in ((WeightRecipe(group=8), 4), (WeightRecipe(group=8, levels="uniform"), 0)):
        parts = [solve_rows(weights[a:b], factor, outliers, recipe) for a, b in ((0, 4), (4, 5), (5, 9))]
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        joined = join_rows(parts, order)
        assert joined.rows == 9
        assert torch.equal(joined.dequantize_site_order(), torch.cat([p.dequantize_site_order() for p in parts]))
        assert joined.permutation is order
        assert joined.tensors().keys() == parts[0].tensors().keys()
        assert all(tensor.is_contiguous() for tensor in joined.tensors().values())
