"""Levels of a group: four (2**bits) values that its weights are rounded to, found row by row.

Every search takes the current weights of one block, fp32 [rows, width], and the column importances h, fp32 [width], and
returns *grid levels*: int8 multiples of one fp16 scale a row, ascending by rank, which is what the format stores. The
codes are then chosen against exactly these, so snapping to the grid is part of the optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP16_MAX = 65504.0
# Entries of the cost tables that dp_levels holds at a time, 8 bytes each.
DP_TABLE = 1 << 22


@dataclass(frozen=True)
class GridLevels:
    """Integer levels int8 [rows, 2**bits] ascending, their scale fp16 [rows], zero point uint8 [rows] if uniform.

    int16 where a zero point meets 8 bits: -255 .. 255.
    """

    integers: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def values(self) -> Tensor:
        """fp32 [rows, 2**bits], ascending."""
        return self.integers.to(torch.float32) * self.scale.to(torch.float32).unsqueeze(-1)


def snap(levels: Tensor) -> GridLevels:
    """Real levels fp32 [rows, k] ascending -> the nearest int8 multiples of scale = max |level| / 127 in fp16."""
    largest = levels.abs().amax(dim=-1)
    scale = (largest / 127.0).clamp_max(FP16_MAX).to(torch.float16)
    # A group so small that its scale underflows (or all zero) becomes zeros: the error is below 4e-6.
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    integers = torch.round(levels / safe.to(torch.float32).unsqueeze(-1)).clamp(-127, 127)
    return GridLevels(integers.to(torch.int8), safe)


def nearest(weights: Tensor, values: Tensor) -> Tensor:
    """Rank of the nearest level: weights [rows, width], values [rows, k] ascending -> uint8; ties go to the lower."""
    ranks = torch.zeros(weights.shape, dtype=torch.uint8)
    middles = (values[:, 1:] + values[:, :-1]) / 2
    for rank in range(middles.shape[1]):
        ranks += weights > middles[:, rank : rank + 1]
    return ranks


@dataclass(frozen=True)
class _Sorted:
    """Rows in ascending order with prefix sums of h, h w and h w^2 in fp64 [rows, width + 1]."""

    weights: Tensor
    s0: Tensor
    s1: Tensor
    s2: Tensor


def _sort(block: Tensor, importance: Tensor) -> _Sorted:
    weights, order = block.double().sort(dim=-1, stable=True)
    h = importance.double()[order]

    def prefix(terms: Tensor) -> Tensor:
        return torch.nn.functional.pad(terms.cumsum(dim=-1), (1, 0))

    return _Sorted(weights, prefix(h), prefix(h * weights), prefix(h * weights * weights))


def em_levels(block: Tensor, importance: Tensor, bits: int, iterations: int = 20) -> Tensor:
    """Weighted Lloyd iterations in one dimension (BWA Algorithm 1; spec 2.3.1), fp32 [rows, 2**bits] ascending.

    Starts at the h-weighted quantiles (2 i + 1) / 2**(bits + 1); an empty cluster keeps its level; a row stops when
    none of its boundaries moves. It is frozen then while others go on, so rows do not influence each other.
    """
    rows = _sort(block, importance)
    width, count = rows.weights.shape[1], 2**bits
    share = (torch.arange(count, dtype=torch.float64) * 2 + 1) / (2 * count)
    targets = rows.s0[:, -1:] * share
    start = torch.searchsorted(rows.s0[:, 1:].contiguous(), targets).clamp_max(width - 1)
    levels = rows.weights.gather(1, start)
    edges = _edges(rows.weights, levels)
    going = torch.ones(levels.shape[0], 1, dtype=torch.bool)
    for _ in range(iterations):
        mass = rows.s0.gather(1, edges).diff(dim=1)
        moment = rows.s1.gather(1, edges).diff(dim=1)
        means = torch.where(mass > 0, moment / torch.where(mass > 0, mass, 1.0), levels)
        # In order but for rounding: a mean may land a hair beyond its neighbour.
        levels = torch.where(going, means.sort(dim=-1).values, levels)
        moved = _edges(rows.weights, levels)
        going = (moved != edges).any(dim=-1, keepdim=True)
        if not bool(going.any()):
            break
        edges = moved
    return levels.float()


def _edges(weights: Tensor, levels: Tensor) -> Tensor:
    """Cluster boundaries int64 [rows, k + 1]: cluster c is the sorted weights edges[c] to edges[c + 1]."""
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(weights, middles, right=True)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=weights.shape[1])


def dp_levels(block: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The exact optimum of the weighted 2**bits-means problem by dynamic programming, fp32 [rows, 2**bits] ascending.

    D_m[b] = min over a of D_{m-1}[a] + cost(a, b) with cost(a, b) = S2 - S1^2 / S0 over the sorted weights a..b
    (spec 2.3.1). O(2**bits width^2) a row. Fewer distinct values than levels give repeated levels and zero error.
    Rows are taken in portions, and of a wide group the ends of intervals, so that the tables stay within some
    hundred megabytes.
    """
    portion = max(1, DP_TABLE // (block.shape[1] + 1) ** 2)
    return torch.cat([_dp_rows(rows, importance, bits) for rows in block.split(portion)])


def _dp_rows(block: Tensor, importance: Tensor, bits: int) -> Tensor:
    rows = _sort(block, importance)
    count, width = 2**bits, rows.weights.shape[1]
    best = [torch.empty_like(rows.s0) for _ in range(count)]
    choices = [torch.zeros(rows.s0.shape, dtype=torch.int64) for _ in range(1, count)]
    strip = max(1, DP_TABLE // rows.s0.numel())
    # No interval begins behind its end: all tables of a strip of ends need those before it and no others.
    for first in range(0, width + 1, strip):
        last = min(first + strip, width + 1)
        cost = _interval_costs(rows, first, last)
        best[0][:, first:last] = cost[:, 0]
        for level in range(1, count):
            before = best[level - 1][:, :last].unsqueeze(-1)
            best[level][:, first:last], choices[level - 1][:, first:last] = (before + cost).min(dim=1)
    end = torch.full((rows.weights.shape[0], 1), width, dtype=torch.int64)
    levels: list[Tensor] = []
    steps: list[Tensor | None] = [*reversed(choices), None]
    for choice_or_none in steps:
        begin = torch.zeros_like(end) if choice_or_none is None else choice_or_none.gather(1, end)
        mass = rows.s0.gather(1, end) - rows.s0.gather(1, begin)
        moment = rows.s1.gather(1, end) - rows.s1.gather(1, begin)
        fallback = levels[-1] if levels else rows.weights[:, -1:]
        levels.append(torch.where(mass > 0, moment / torch.where(mass > 0, mass, 1.0), fallback))
        end = begin
    return torch.cat(levels, dim=1).flip(1).float()


def _interval_costs(rows: _Sorted, first: int, last: int) -> Tensor:
    """cost [rows, a, b] of one level for the sorted weights a..b-1, a < last, b from first to last; 0 where a = b,
    infinite where a > b."""

    def between(sums: Tensor) -> Tensor:
        return sums[:, first:last].unsqueeze(1) - sums[:, :last].unsqueeze(2)

    mass, moment = between(rows.s0), between(rows.s1)
    cost = (between(rows.s2) - moment * moment / torch.where(mass > 0, mass, 1.0)).clamp_min(0.0)
    backwards = torch.arange(last).unsqueeze(1) > torch.arange(first, last)
    return cost.masked_fill(backwards, torch.inf)


def minmax_levels(block: Tensor, bits: int) -> Tensor:
    """2**bits equally spaced levels from the smallest to the largest weight of the row, fp32 ascending."""
    low, high = block.amin(dim=-1, keepdim=True), block.amax(dim=-1, keepdim=True)
    steps = torch.linspace(0.0, 1.0, 2**bits)
    return low + (high - low) * steps
