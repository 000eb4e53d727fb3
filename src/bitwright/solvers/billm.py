"""BiLLM: one signed magnitude a weight, two in sum where it counts (Huang et al., ICML 2024, arXiv 2402.04291).

Block by block of `group` columns, of the whole matrix, with M = h w^2 in front of each weight:

1. the columns of the largest sums of M are *salient*; how many is what represents M best (`salient_columns`);
2. a *break point* parts the weights of the other columns into small and large ones by their M (`break_point`);
3. in each row small and large weights become mean +- size, salient ones mean +- size +- size of what that leaves: the
   residual binarization of order 1 and 2;
4. the error of the block goes on to the later columns, over diag(U) as its code does it (`feedback = block-diag`).

Signs and sides are two bits a weight, whatever the column, so that codes are those of any other method; which columns
are salient is a bit each, the same for all rows (docs/format.md). Where the paper says less than its code, or something
else, the code is followed: see docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.packing import pack_planes
from bitwright.recipe import WeightRecipe
from bitwright.solvers.feedback import block_error, quantize_outlier_columns
from bitwright.solvers.hessian import Factor
from bitwright.solvers.levels import GridLevels, snap

# Of the code: 1 to 49 salient columns of a block are tried, and the 10 % to 90 % quantiles as break points.
MOST_SALIENT = 49
QUANTILES = np.linspace(0.1, 0.9, 81)
# Rows worked on together: their temporaries stay in the cache.
ROWS = 256


@dataclass(frozen=True)
class SplitBlock:
    """One block of columns.

    codes    uint8 [rows, width]: the sign (1: above the mean) plus twice the side (1: large) or the sign of the rest
    normal   levels of the codes of other columns; salient those of salient ones; both [rows, 4] by code
    columns  bool [width], the salient columns
    """

    codes: Tensor
    normal: GridLevels
    salient: GridLevels
    columns: Tensor

    def values(self) -> Tensor:
        """fp32 [rows, width]: what the codes stand for."""
        index = self.codes.long()
        normal, salient = (levels.values().gather(1, index) for levels in (self.normal, self.salient))
        return torch.where(self.columns, salient, normal)


def saliency(block: Tensor, importance: Tensor, kind: str) -> Tensor:
    """M of a block fp32 [rows, width], fp64: h w^2; for importance `none` the weights themselves, as the code."""
    weights = block.double()
    return weights if kind == "none" else weights.square() * importance.double()


def salient_columns(measure: Tensor) -> Tensor:
    """M fp64 [rows, width] -> bool [width]: the columns that it pays to give two signed magnitudes.

    Of the columns by falling sum of |M| the first r, with r the number of 1 .. 49 that makes the squared error of M the
    least. Both parts are binarized with residual for this (`_residual_loss`), as the code has it. At least one column
    is left out; a block of one column has no salient one.
    """
    width = measure.shape[1]
    ranks = measure.abs().sum(dim=0).argsort(descending=True, stable=True)
    counts = range(1, min(MOST_SALIENT, width - 1) + 1)
    columns = torch.zeros(width, dtype=torch.bool)
    if not counts:
        return columns
    losses = torch.zeros(len(counts), dtype=torch.float64)
    for rows in measure.split(ROWS):
        ordered = rows[:, ranks]
        for place, count in enumerate(counts):
            losses[place] += _residual_loss(ordered[:, :count]) + _residual_loss(ordered[:, count:])
    columns[ranks[: counts[int(losses.argmin())]]] = True
    return columns


def _residual_loss(x: Tensor) -> Tensor:
    """Squared error of all rows of x fp64 [rows, n] binarized twice: mean +- size, and again what that leaves."""
    rest = x - x.mean(dim=1, keepdim=True)
    rest -= rest.abs().mean(dim=1, keepdim=True).copysign(rest)
    rest -= rest.mean(dim=1, keepdim=True)
    return (rest.square().sum(dim=1) - rest.abs().sum(dim=1).square() / x.shape[1]).sum()


def break_point(measure: Tensor, salient: Tensor) -> float:
    """The |M| that parts the other columns of M fp64 [rows, width] with the least squared error of M, order 1 a side.

    Tried are quantiles of |M| with 0 in the salient columns, as the code has it. Small is what is below. Rows are
    sorted once; the error of a side of a row then follows from prefix sums of M and M^2, because the small weights are
    an interval of the row and the large ones the two ends.
    """
    tried = torch.from_numpy(np.quantile((measure * ~salient).abs().numpy(), QUANTILES))
    losses = torch.zeros(len(QUANTILES), dtype=torch.float64)
    for rows in measure[:, ~salient].split(ROWS):
        x = rows.sort(dim=1).values
        s1, s2 = (torch.nn.functional.pad(terms.cumsum(dim=1), (1, 0)) for terms in (x, x * x))
        points = tried.expand(len(x), -1).contiguous()
        stop = torch.searchsorted(x, points)
        start = torch.minimum(torch.searchsorted(x, -points, right=True), stop)
        count, total = stop - start, s1.gather(1, stop) - s1.gather(1, start)
        square = s2.gather(1, stop) - s2.gather(1, start)
        mean = total / count.clamp_min(1)
        inside = torch.minimum(torch.maximum(torch.searchsorted(x, mean), start), stop)
        below = s1.gather(1, inside) - s1.gather(1, start)
        losses += _binary_loss(count, total, square, inside - start, below).sum(dim=0)

        count, total, square = x.shape[1] - count, s1[:, -1:] - total, s2[:, -1:] - square
        mean = total / count.clamp_min(1)
        place = torch.searchsorted(x, mean)
        left, right = torch.minimum(place, start), torch.maximum(place, stop)
        below = s1.gather(1, left) + s1.gather(1, right) - s1.gather(1, stop)
        losses += _binary_loss(count, total, square, left + right - stop, below).sum(dim=0)
    return float(tried[int(losses.argmin())])


def _binary_loss(count: Tensor, total: Tensor, square: Tensor, under: Tensor, below: Tensor) -> Tensor:
    """Squared error of weights at mean +- size: their number, sum and sum of squares; number and sum below the mean."""
    number = count.clamp_min(1)
    mean = total / number
    deviation = mean * under - below + (total - below) - mean * (count - under)
    return square - total * mean - deviation.square() / number


def binarize(x: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Order 1 of the members of each row of x fp64 [rows, n]: levels mean -+ size [rows, 2] and signs bool [rows, n].

    Both levels are 0 where a row has no member. A weight that is its mean has the sign of those above it: the code has
    a third sign for it, 0, that no bit can hold.
    """
    count = members.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.where(members, x, 0.0).sum(dim=1, keepdim=True) / count
    centred = x - mean
    size = torch.where(members, centred.abs(), 0.0).sum(dim=1, keepdim=True) / count
    return torch.cat([mean - size, mean + size], dim=1), centred >= 0


def binarize_twice(x: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order 2: levels [rows, 4] by first sign plus twice the second, and both signs bool [rows, n]."""
    first, above = binarize(x, members)
    second, more = binarize(x - first.gather(1, above.long()), members)
    return torch.cat([first + second[:, :1], first + second[:, 1:]], dim=1), above, more


def split_block(block: Tensor, importance: Tensor, kind: str) -> SplitBlock:
    """Steps 1 to 3 for a block fp32 [rows, width], importance fp32 [width] of that `kind`."""
    measure = saliency(block, importance, kind)
    columns = salient_columns(measure)
    large = (measure.abs() >= break_point(measure, columns)) & ~columns
    small = ~large & ~columns
    x = block.double()
    (low, below), (high, beyond) = binarize(x, small), binarize(x, large)
    pairs, above, more = binarize_twice(x, columns.expand_as(large))
    signs = torch.where(columns, above, torch.where(large, beyond, below))
    return SplitBlock(
        codes=signs.to(torch.uint8) + 2 * torch.where(columns, more, large).to(torch.uint8),
        normal=snap(torch.cat([low, high], dim=1).float()),
        salient=snap(pairs.float()),
        columns=columns,
    )


def solve(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """A whole matrix, fp32 [rows, columns] in site order, outlier columns last -> codes, two codebooks, int8 outliers.

    Not row by row: the rows share the choice of salient columns and the break point.
    """
    work = weights.clone()
    work[:, factor.dead] = 0.0
    rows, columns = work.shape
    normal = columns - outliers
    reach = columns if recipe.feedback_outliers else normal
    group = recipe.group_of(normal)
    blocks = []
    for start in range(0, normal, group):
        stop = min(start + group, normal)
        block = work[:, start:stop]
        found = split_block(block, factor.importance[start:stop], recipe.importance)
        if recipe.feedback != "none" and stop < reach:
            upper = factor.upper[start:stop, start:stop]
            error = block_error(block - found.values(), upper, recipe.feedback)
            work[:, stop:reach] -= error @ factor.upper[start:stop, stop:reach]
        blocks.append(found)
    integers, row_scales = quantize_outlier_columns(work[:, normal:]) if outliers else (None, None)
    return CodebookMatrix(
        rows=rows,
        columns=columns,
        bits=recipe.bits,
        group=group,
        kind="salient",
        planes=pack_planes(torch.cat([block.codes for block in blocks], dim=1), recipe.bits),
        scales=torch.stack([block.normal.scale for block in blocks], dim=1),
        levels=torch.stack([block.normal.integers for block in blocks], dim=1),
        salient=pack_planes(torch.cat([block.columns for block in blocks]).unsqueeze(0).to(torch.uint8), 1)[0, 0],
        salient_levels=torch.stack([block.salient.integers for block in blocks], dim=1),
        salient_scales=torch.stack([block.salient.scale for block in blocks], dim=1),
        outliers=integers,
        outlier_scales=row_scales,
    )
