"""Solvers: pure functions (weights, factor of H, outlier count, recipe) -> CodebookMatrix; they know no model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import WeightRecipe
from bitwright.solvers import billm, bwa, gptq, rtn, wgm
from bitwright.solvers import native as native
from bitwright.solvers.feedback import join_rows as join_rows
from bitwright.solvers.hessian import Factor as Factor
from bitwright.solvers.hessian import asymmetric_target as asymmetric_target
from bitwright.solvers.hessian import factorize as factorize
from bitwright.solvers.hessian import input_drift as input_drift
from bitwright.solvers.hessian import output_error as output_error
from bitwright.solvers.hessian import residual_correction as residual_correction

Solver = Callable[[Tensor, Factor, int, WeightRecipe], CodebookMatrix]
SOLVERS: dict[str, Solver] = {
    "bwa": bwa.solve,
    "rtn": rtn.solve,
    "gptq": gptq.solve,
    "wgm": wgm.solve,
    "billm": billm.solve,
}
