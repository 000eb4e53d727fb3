"""BWA: four free levels a row and group, block feedback, int8 outlier columns (Song et al., ACL Findings 2025).

Algorithm 1 of arXiv 2504.05352 with the readings of its errata that docs/methods.md lists. The choices that the paper
leaves open or that improve on it are options of WeightRecipe; the defaults are the paper's.
"""

from __future__ import annotations

from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.solvers.feedback import solve_rows
from bitwright.solvers.hessian import Factor
from bitwright.solvers.refine import refine


def solve(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """fp32 [rows, columns] in site order, outlier columns last -> codes, levels and int8 outliers."""
    matrix = solve_rows(weights, factor, outliers, recipe)
    if not recipe.refine:
        return matrix
    if factor.hessian is None:
        raise ValueError("refinement needs the damped Hessian in its factor")
    alive = weights.masked_fill(factor.dead, 0.0)
    return refine(alive, matrix, factor.hessian, recipe.refine, outliers_too=recipe.feedback_outliers)
