"""GPTQ: column by column on equally spaced levels (Frantar et al., ICLR 2023, arXiv 2210.17323, Algorithm 1; spec 5.2).

The grid of a group is fixed when its first column is reached, from the weights as corrected so far; each column's error
goes through U into all later ones. As a method of its own beside the options of the block loop, so that a recipe says
what it is.
"""

from __future__ import annotations

from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.solvers.feedback import solve_rows
from bitwright.solvers.hessian import Factor


def solve(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """fp32 [rows, columns] in site order, outlier columns last -> codes, scales, zero points and int8 outliers."""
    return solve_rows(weights, factor, outliers, recipe)
