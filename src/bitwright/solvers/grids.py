"""Equally spaced levels of a group: the grids of round-to-nearest and GPTQ (spec 5.1).

Every level is an integer times one fp16 scale a row, so a weight's level is computed, not searched: that is what makes
codes of 5 to 8 bits affordable.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bitwright.codebook import symmetric_levels
from bitwright.recipe import WeightRecipe
from bitwright.solvers.levels import FP16_MAX, GridLevels

# The search of GPTQ's quantizer: shares 1, 0.99, .. 0.21 of the range, the error to the power of 2.4.
SHARES = tuple(1 - step / 100 for step in range(80))
NORM = 2.4


def grids_of(block: Tensor, importance: Tensor, recipe: WeightRecipe) -> GridLevels:
    """The grid of each row of fp32 [rows, width] as the recipe asks for it.

    With `rows_a_scale` = 2 the first and second row, the third and fourth have the grid of their weights together
    (Atom, its code); a last row without a neighbour has its own.
    """
    rows, width = block.shape
    together = recipe.rows_a_scale
    find = partial(
        uniform_grid,
        bits=recipe.bits,
        symmetric=recipe.symmetric,
        search=recipe.range == "mse",
        clip=recipe.clip,
        max_is_level=recipe.scale == "max",
    )
    if together == 1:
        return find(block, importance=importance)
    whole = rows // together * together
    joined = block[:whole].reshape(whole // together, together * width)
    shared, alone = find(joined, importance=importance.repeat(together)), find(block[whole:], importance=importance)
    scale = torch.cat([shared.scale.repeat_interleave(together), alone.scale])
    return GridLevels(symmetric_levels(recipe.bits).expand(rows, -1), scale)


def uniform_grid(
    block: Tensor,
    bits: int,
    symmetric: bool = False,
    search: bool = False,
    importance: Tensor | None = None,
    clip: float = 1.0,
    max_is_level: bool = False,
) -> GridLevels:
    """The grid of each row of fp32 [rows, width].

    Asymmetric: scale = (max - min) / (2**bits - 1), zero = round(-min / scale), the range widened to contain 0.
    Symmetric: scale = 2 max|w| / (2**bits - 1), as GPTQ's code has it, and no zero point; with one bit max|w|, for
    levels of -1 and 1. `max_is_level`, symmetric with 2 bits or more: max|w| / (2**(bits - 1) - 1), QuaRot's. A row of
    zeros has the range -1..1. The grid spans `clip` times the range (Atom, 0.85), or with `search` the ends are the
    share of these that makes the sum of h |error|**2.4 least, h being `importance` fp32 [width] or 1; the first of
    equal ones, from 1 down.
    """
    low, high = block.amin(dim=-1).clamp_max(0.0), block.amax(dim=-1).clamp_min(0.0)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    form = (bits, symmetric, max_is_level)
    scale, zero = _grid(clip * low, clip * high, *form)
    if search:
        least = torch.full_like(high, torch.inf)
        for share in SHARES:
            candidate, point = _grid(share * low, share * high, *form)
            loss = _loss(block, candidate, None if symmetric and bits == 1 else point, bits, importance)
            better = loss < least
            least = torch.where(better, loss, least)
            scale, zero = torch.where(better, candidate, scale), torch.where(better, point, zero)
    if symmetric:
        return GridLevels(symmetric_levels(bits).expand(len(block), -1), scale)
    integers = torch.arange(2**bits, dtype=torch.int16) - zero.to(torch.int16).unsqueeze(-1)
    return GridLevels(integers if bits == 8 else integers.to(torch.int8), scale, zero.to(torch.uint8))


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, max_is_level: bool) -> tuple[Tensor, Tensor]:
    """(scale fp16, zero fp32) [rows]; the zero of one symmetric bit means nothing."""
    top = 2**bits - 1
    if symmetric and bits == 1:
        return high.clamp(6e-8, FP16_MAX).to(torch.float16), high
    step = high / (top // 2) if max_is_level else (high - low) / top
    scale = step.clamp(6e-8, FP16_MAX).to(torch.float16)
    if symmetric:
        return scale, torch.full_like(high, 2.0 ** (bits - 1))
    return scale, torch.round(-low / scale.float()).clamp(0, top)


def _loss(block: Tensor, scale: Tensor, zero: Tensor | None, bits: int, importance: Tensor | None) -> Tensor:
    """Sum of h |w - level|**2.4 of each row, every weight at its nearest level; without a zero that is +-scale."""
    step = scale.float().unsqueeze(-1)
    if zero is None:
        error = block.abs() - step
    else:
        point = zero.unsqueeze(-1)
        error = torch.round(block / step).add_(point).clamp_(0, 2**bits - 1).sub_(point).mul_(step).sub_(block)
    powers = error.abs_().pow_(NORM)
    return powers.sum(dim=-1) if importance is None else powers @ importance


def round_on_grid(weights: Tensor, grid: GridLevels) -> tuple[Tensor, Tensor]:
    """Ranks uint8 and levels fp32 of weights fp32 [rows, width], by arithmetic; ties go to the lower level.

    What `levels.nearest` finds, but for a weight within rounding of the middle of two levels.
    """
    step = grid.scale.float().unsqueeze(-1)
    lowest = grid.integers[:, :1].to(torch.float32)
    ranks = torch.ceil(weights / step - 0.5).sub_(lowest).clamp_(0, grid.integers.shape[1] - 1)
    return ranks.to(torch.uint8), (ranks + lowest) * step
