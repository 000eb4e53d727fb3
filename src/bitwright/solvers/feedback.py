"""The block loop that all feedback solvers share: levels, codes, and the error handed on to the later columns.

Working from left to right over blocks of `group` columns (GPTQ section 3.3, BWA Algorithm 1), each block gets its
levels from the weights as corrected so far, then its codes, and its error is passed on through the factor U of the
inverse Hessian. The outlier columns stand last and absorb what is left before they are rounded to int8 (erratum E5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, code_of_rank
from bitwright.packing import pack_planes
from bitwright.recipe import WeightRecipe
from bitwright.solvers import native
from bitwright.solvers.grids import grids_of, round_on_grid
from bitwright.solvers.hessian import Factor
from bitwright.solvers.levels import (
    FP16_MAX,
    GridLevels,
    dp_levels,
    em_levels,
    minmax_levels,
    nearest,
    snap,
)

# Columns of a block, fp32 [rows, n] -> their ranks uint8 and levels fp32.
Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
# Codes of more bits are computed from their grid; tables of their levels would be too long to search.
SEARCHED_BITS = 4


def find_levels(block: Tensor, importance: Tensor, recipe: WeightRecipe) -> GridLevels:
    """Levels of one block of weights fp32 [rows, width], importance fp32 [width], by the recipe's search.

    The native kernels do it where they are there and the tensors are what they read; `find_levels_reference` does it
    anywhere.
    """
    if native.serves(recipe) and recipe.bits <= SEARCHED_BITS and native.available(block, importance):
        return native.find_levels(block, importance, recipe)
    return find_levels_reference(block, importance, recipe)


def find_levels_reference(block: Tensor, importance: Tensor, recipe: WeightRecipe) -> GridLevels:
    """`find_levels` in torch, for any dtype: the oracle of the native code."""
    if recipe.levels == "uniform":
        return grids_of(block, importance, recipe)
    if recipe.levels == "minmax":
        return snap(minmax_levels(block, recipe.bits))
    if recipe.levels == "dp":
        return snap(dp_levels(block, importance, recipe.bits))
    return snap(em_levels(block, importance, recipe.bits, recipe.em_iterations))


def assign(block: Tensor, values: Tensor, upper: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Ranks and the error matrix E of one block, so that the later columns change by -E U[block, later] (spec 2.3.2).

    block [rows, width], values [rows, k] ascending, upper [width, width] the diagonal block of U. Modes: `none`,
    `block-diag` (the paper's listing), `block-tri` (exact for fixed codes), `column` (GPTQ inside the block).
    """

    def rounded(weights: Tensor) -> tuple[Tensor, Tensor]:
        ranks = nearest(weights, values)
        return ranks, values.gather(1, ranks.long())

    return assign_rounded(block, rounded, upper, mode)


def assign_rounded(block: Tensor, rounded: Rounding, upper: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """`assign`, where `rounded` finds ranks and levels of some columns of the block."""
    if mode == "column":
        return _assign_by_column(block, rounded, upper)
    ranks, levels = rounded(block)
    return ranks, block_error(block - levels, upper, mode)


def block_error(residual: Tensor, upper: Tensor, mode: str) -> Tensor:
    """The error matrix E of a block whose codes are all chosen, from its residual [rows, width]; not for `column`."""
    if mode == "none":
        return torch.zeros_like(residual)
    if mode == "block-diag":
        return residual / upper.diagonal()
    return torch.linalg.solve_triangular(upper, residual, upper=True, left=False)


def _assign_by_column(block: Tensor, rounded: Rounding, upper: Tensor) -> tuple[Tensor, Tensor]:
    work = block.clone()
    ranks = torch.zeros(block.shape, dtype=torch.uint8)
    errors = torch.zeros_like(block)
    for column in range(block.shape[1]):
        weight = work[:, column : column + 1]
        rank, level = rounded(weight)
        error = (weight - level) / upper[column, column]
        work[:, column + 1 :] -= error * upper[column, column + 1 :]
        ranks[:, column : column + 1] = rank
        errors[:, column : column + 1] = error
    return ranks, errors


def solve_rows(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """Quantize rows fp32 [rows, columns] in site order; rows do not influence each other, but for two that share a
    scale (`rows_a_scale`): the first and second, the third and fourth.

    Returns the CodebookMatrix without a permutation. `weights` is not changed. The native kernels do it where they are
    there and the tensors are what they read (solvers/native.py); `solve_rows_reference` does it anywhere.
    """
    if native.serves(recipe) and native.available(weights, factor.upper, factor.importance):
        return native.solve_rows(weights, factor, outliers, recipe)
    return solve_rows_reference(weights, factor, outliers, recipe)


def solve_rows_reference(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """`solve_rows` in torch, for any dtype: the oracle of the native code."""
    work = weights.clone()
    work[:, factor.dead] = 0.0
    columns = work.shape[1]
    normal = columns - outliers
    reach = columns if recipe.feedback_outliers else normal
    kind, group = recipe.kind, recipe.group_of(normal)
    code_table = code_of_rank(recipe.bits) if kind == "free" else torch.arange(2**recipe.bits).to(torch.uint8)
    codes, levels, scales, zeros = [], [], [], []
    for start in range(0, normal, group):
        stop = min(start + group, normal)
        block = work[:, start:stop]
        grid = find_levels_reference(block, factor.importance[start:stop], recipe)
        upper = factor.upper[start:stop, start:stop]
        if recipe.bits > SEARCHED_BITS:
            ranks, error = assign_rounded(block, partial(round_on_grid, grid=grid), upper, recipe.feedback)
        else:
            ranks, error = assign(block, grid.values(), upper, recipe.feedback)
        if recipe.feedback != "none" and stop < reach:
            work[:, stop:reach] -= error @ factor.upper[start:stop, stop:reach]
        codes.append(code_table[ranks.long()])
        if kind == "free":
            by_code = torch.empty_like(grid.integers)
            by_code[:, code_table.long()] = grid.integers
            levels.append(by_code)
        scales.append(grid.scale)
        if grid.zero is not None:
            zeros.append(grid.zero)
    integers, row_scales = quantize_outlier_columns(work[:, normal:]) if outliers else (None, None)
    return CodebookMatrix(
        rows=work.shape[0],
        columns=columns,
        bits=recipe.bits,
        group=group,
        kind=kind,
        planes=pack_planes(torch.cat(codes, dim=1), recipe.bits),
        scales=torch.stack(scales, dim=1),
        levels=torch.stack(levels, dim=1) if kind == "free" else None,
        zeros=torch.stack(zeros, dim=1) if kind == "uniform" else None,
        outliers=integers,
        outlier_scales=row_scales,
    )


def quantize_outlier_columns(weights: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [rows, outliers] -> (int8 [rows, outliers], fp16 scale [rows]): symmetric a row, scale = max / 127."""
    scale = (weights.abs().amax(dim=1) / 127.0).clamp(6e-8, FP16_MAX).to(torch.float16)
    integers = torch.round(weights / scale.float().unsqueeze(1)).clamp(-128, 127)
    return integers.to(torch.int8), scale


def join_rows(parts: list[CodebookMatrix], permutation: Tensor | None) -> CodebookMatrix:
    """Stack matrices solved for consecutive rows of one linear; what all rows share is the same in all of them."""

    def cat(name: str, dim: int = 0) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=dim).contiguous()

    first = parts[0]
    planes = cat("planes", 1)
    assert planes is not None
    return CodebookMatrix(
        rows=sum(part.rows for part in parts),
        columns=first.columns,
        bits=first.bits,
        group=first.group,
        kind=first.kind,
        planes=planes,
        scales=cat("scales"),
        levels=cat("levels"),
        zeros=cat("zeros"),
        table=first.table,
        salient=first.salient,
        salient_levels=cat("salient_levels"),
        salient_scales=cat("salient_scales"),
        outliers=cat("outliers"),
        outlier_scales=cat("outlier_scales"),
        permutation=permutation,
    )
