"""Round to nearest: an equally spaced grid between the extremes of a row and group, no error feedback (spec 5.1)."""

from __future__ import annotations

from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.solvers.feedback import solve_rows
from bitwright.solvers.hessian import Factor


def solve(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """fp32 [rows, columns] in site order, outlier columns last -> codes, scales, zero points and int8 outliers.

    The Hessian plays no part; `factor` is used for its list of dead inputs alone.
    """
    return solve_rows(weights, factor, outliers, recipe)
