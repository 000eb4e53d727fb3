"""The solver as ops: level search, and the feedback from column to column around it.

They wrap the functions that the solvers themselves call (bitwright.solvers.feedback), which run native code or torch.
The solvers do not call the ops: they are a room beneath this one, and pass recipes and matrices, not lists of tensors.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bitwright.recipe import WeightRecipe
from bitwright.runtime.schemas import SOLVED, kernel, require_float32
from bitwright.solvers import feedback as loop
from bitwright.solvers import native
from bitwright.solvers.hessian import Factor


@kernel("find_levels")
def _find_levels(block: Tensor, importance: Tensor, search: str, bits: int, iterations: int) -> tuple[Tensor, Tensor]:
    """block fp32 [rows, width], importance fp32 [width], at least 0 -> the levels of each row on the format's grid.

    integers int8 (int16 with 8 bits) [rows, 2**bits], ascending, and scale fp16 [rows]; a level is integer * scale
    (BWA, Algorithm 1).
    `search` is `em` (at most `iterations` of them), `dp`, `minmax` or `uniform`, as WeightRecipe's `levels`; with
    `uniform` the zero point is -integers[:, 0]. Raises ValueError for what does not fit.
    """
    require_float32(block=block, importance=importance)
    native.check_block(block, importance)
    grid = loop.find_levels(block, importance, _recipe(levels=search, bits=bits, em_iterations=iterations))
    return grid.integers, grid.scale


@kernel("solve_rows")
def _solve_rows(
    weights: Tensor,
    upper: Tensor,
    importance: Tensor,
    dead: Tensor,
    outliers: int,
    group: int,
    bits: int,
    search: str,
    iterations: int,
    feedback: str,
    feedback_outliers: bool,
) -> tuple[Tensor, ...]:
    """weights fp32 [rows, columns] in site order, outlier columns last -> the stored tensors (docs/format.md).

    Levels and codes block by block from left to right, each block's error handed on to the later columns (BWA,
    Algorithm 1). `upper` fp32 [columns, columns] is U of inverse(H) = U^T U, `importance` fp32 [columns] the weight of
    a column in the level search, `dead` bool [columns] the inputs that were never active; the options are those of
    WeightRecipe, `search` its `levels`. `weights` stays as it is. Returns codes, scales, levels, zeros, outliers,
    outlier_scales; what such a matrix does not store is empty. Raises ValueError for what does not fit.
    """
    recipe = _recipe(
        levels=search,
        bits=bits,
        group=group,
        em_iterations=iterations,
        feedback=feedback,
        feedback_outliers=feedback_outliers,
    )
    require_float32(weights=weights, upper=upper, importance=importance)
    factor = Factor(upper, importance, dead, damping=0.0, rescue=None, shift=torch.zeros(len(dead)))
    native.check_rows(weights, factor, outliers)
    tensors = loop.solve_rows(weights, factor, outliers, recipe).tensors()
    return tuple(tensors.get(name, torch.empty(shape, dtype=dtype)) for name, (dtype, shape) in SOLVED.items())


def _recipe(**options: Any) -> WeightRecipe:
    return WeightRecipe(**cast(Any, options))


find_levels = torch.ops.bitwright.find_levels.default
solve_rows = torch.ops.bitwright.solve_rows.default
