"""WGM: one table of magnitudes for a whole matrix, a sign and a group index a weight (Zheng et al., arXiv 2509.03054).

Weights alone, no calibration: the magnitudes of a matrix are cut into g = 2^(bits - 1) groups (solvers/grouping.py),
and a weight becomes its sign times the mean of its group. The paper counts one bit a weight for the sign and the table,
and forgets that the group of each weight must be kept too: see `honest_bits`.

Two readings differ from the authors' code. A zero is a magnitude like any other; there it stays zero, as a third sign
that nobody counts. And a weight gets the *nearest* level, which is never farther than the mean of the window that the
sorting put it into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.native import native
from bitwright.packing import pack_planes, plane_bytes
from bitwright.recipe import WeightRecipe
from bitwright.solvers.feedback import quantize_outlier_columns
from bitwright.solvers.grouping import Grouping, Magnitudes, merge_windows, optimal_grouping
from bitwright.solvers.hessian import Factor
from bitwright.solvers.levels import snap

# Rows that are encoded together where that takes int64 ranks: 8 bytes a weight.
ROWS = 256
# Distinct magnitudes that groups are searched over, at most: twice those of 16-bit numbers. Tables of the search grow
# with them, 4 bytes a group.
MOST_DISTINCT = 1 << 16
_DROPPED = 11  # bits of an fp32 number's 23 behind the point that a bin has not got, at least


@dataclass(frozen=True)
class GroupingBits:
    """Bits a weight of a matrix of n weights with g groups, by three counts (spec: WGM).

    claimed  the paper's formula, (n + 16 g) / n: signs and table, without the group of each weight
    fixed    1 + ceil(log2 g) + 16 g / n: what must be stored where every index takes the same room
    entropy  1 + H(group) + 16 g / n: the least that any code of the indices takes
    """

    claimed: float
    fixed: float
    entropy: float


def honest_bits(counts: list[int], level_bits: int = 16) -> GroupingBits:
    """The three counts from the members of each group. The artifact has `fixed`, with a table of 2 g 32-bit numbers."""
    total, groups = sum(counts), len(counts)
    table = level_bits * groups / total
    entropy = -sum(count / total * math.log2(count / total) for count in counts if count)
    return GroupingBits(1 + table, 1 + math.ceil(math.log2(groups)) + table, 1 + entropy + table)


def compact(weights: Tensor) -> Tensor:
    """The same numbers, in 16 bits a number where fp32 ones fit: models in 16 bits are read as fp32."""
    weights = weights.detach()
    if weights.dtype == torch.float32 and weights.device.type == "cpu":
        for dtype in (torch.bfloat16, torch.float16):
            narrow = torch.empty(weights.shape, dtype=dtype)
            for wide, part in zip(weights.split(ROWS), narrow.split(ROWS), strict=True):
                if not torch.equal(part.copy_(wide).float(), wide):
                    break
            else:
                return narrow
    return weights


def magnitudes_of(weights: Tensor) -> Magnitudes:
    """Float [rows, columns] -> its distinct magnitudes and how often each occurs. Raises ValueError for NaN, infinity.

    Numbers of 16 bits are counted by their pattern, others sorted: see `compact`. Of more than MOST_DISTINCT the means
    of bins, see `_bins`.
    """
    if not _short(weights):
        chunks = [rows.detach().flatten().cpu().numpy() for rows in weights.split(ROWS)]
        if not all(np.isfinite(chunk).all() for chunk in chunks):
            raise ValueError("the weights hold NaN or infinite values")
        return _distinct(chunks) or _bins(chunks)
    words = weights.detach().contiguous()
    counts = np.zeros(1 << 15, dtype=np.int64)
    module = native()
    if module is None:
        counts += np.bincount(words.flatten().view(torch.int16).numpy() & 0x7FFF, minlength=1 << 15)
    else:
        module.count_magnitudes(words.data_ptr(), words.numel(), counts.ctypes.data)
    present = counts.nonzero()[0]
    return _finite(Magnitudes(_patterns(words.dtype)[present].double().numpy(), counts[present]))


def _distinct(chunks: Sequence[NDArray[Any]]) -> Magnitudes | None:
    """Exactly, by sorting; None where there are more than MOST_DISTINCT, which is seen early."""
    found = Magnitudes(np.zeros(0), np.zeros(0, dtype=np.int64))
    for chunk in chunks:
        part = Magnitudes.of(chunk)
        values, places = np.unique(np.concatenate([found.values, part.values]), return_inverse=True)
        if len(values) > MOST_DISTINCT:
            return None
        counts = np.bincount(places, np.concatenate([found.counts, part.counts]), len(values))
        found = Magnitudes(values, counts.astype(np.int64))
    return found


def _bins(chunks: Sequence[NDArray[Any]]) -> Magnitudes:
    """Magnitudes with as many leading bits in common as leave at most MOST_DISTINCT bins, each by its mean.

    A cut of bins is a cut of the sorted magnitudes, and the mean of a group of bins is that of its weights: the optimum
    over bins is that of all cuts that part none. Memory does not grow with the matrix.
    """
    counts, sums = np.zeros(1 << (31 - _DROPPED), dtype=np.int64), np.zeros(1 << (31 - _DROPPED))
    for chunk in chunks:
        magnitudes = np.abs(chunk)
        with np.errstate(over="ignore"):
            index = magnitudes.astype(np.float32).view(np.int32) >> _DROPPED
        counts += np.bincount(index, minlength=len(counts))
        sums += np.bincount(index, magnitudes, len(sums))
    while np.count_nonzero(counts) > MOST_DISTINCT:
        counts, sums = counts.reshape(-1, 2).sum(axis=1), sums.reshape(-1, 2).sum(axis=1)
    present = counts.nonzero()[0]
    return Magnitudes(sums[present] / counts[present], counts[present], binned=True)


def group(magnitudes: Magnitudes, recipe: WeightRecipe) -> Grouping:
    """Groups by the recipe's algorithm: `windowed` (algorithm 3), `greedy` (2), `dp` (the optimum, as 1)."""
    groups = 2 ** (recipe.bits - 1)
    if recipe.levels == "dp":
        return optimal_grouping(magnitudes, groups, recipe.penalty)
    return merge_windows(magnitudes, groups, recipe.window if recipe.levels == "windowed" else 1, recipe.penalty)


def table_of(levels: np.ndarray, bits: int) -> Tensor:
    """Magnitudes float64 [at most 2^(bits - 1)], ascending -> the table fp32 [2^bits] by code.

    Plane 0 of a code is the sign (1: not negative), the planes above it the rank of the magnitude; missing ones repeat
    the last. A table of four is rounded to int8 multiples of an fp16 number, which is what the kernels can hold.
    """
    filled = torch.from_numpy(np.pad(levels, (0, 2 ** (bits - 1) - len(levels)), mode="edge")).float()
    if bits == 2:
        filled = snap(filled.unsqueeze(0)).values()[0]
    return torch.stack([0.0 - filled, filled], dim=1).flatten()


def encode(weights: Tensor, table: Tensor) -> Tensor:
    """Float [rows, columns] and a table of `table_of` -> code planes uint8 [bits, rows, ceil(columns / 8)].

    By the nearest magnitude of the weight's sign; the smaller one of two that are equally near.
    """
    bits = len(table).bit_length() - 1
    # Of repeated levels the first: equal matrices have equal codes.
    levels = table[1::2].unique()
    first_rank = torch.searchsorted(table[1::2].contiguous(), levels)
    middles = ((levels[1:].double() + levels[:-1].double()) / 2).contiguous()

    def codes(values: Tensor) -> Tensor:
        ranks = first_rank[torch.bucketize(values.abs().double().contiguous(), middles)]
        return ((ranks << 1) + ~torch.signbit(values)).to(torch.uint8)

    weights, module = weights.detach(), native()
    if module is None or not _short(weights):
        return torch.cat([pack_planes(codes(rows), bits) for rows in weights.split(ROWS)], dim=1)
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    rows, columns = weights.shape
    planes = torch.empty(bits, rows, plane_bytes(columns), dtype=torch.uint8)
    patterns = _patterns(weights.dtype)
    code_of = torch.cat([codes(patterns), codes(-patterns)])
    module.encode_patterns(
        weights.data_ptr(), rows, columns, weights.stride(0), code_of.data_ptr(), bits, planes.data_ptr()
    )
    return planes


def quantize(weights: Tensor, recipe: WeightRecipe) -> tuple[Tensor, Tensor, Grouping]:
    """Float [rows, columns] -> (code planes, table fp32 [2^bits] by code, the grouping that it came from)."""
    weights = compact(weights)
    found = group(magnitudes_of(weights), recipe)
    table = table_of(found.levels, recipe.bits)
    return encode(weights, table), table, found


def solve(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe) -> CodebookMatrix:
    """A whole matrix, float [rows, columns] in site order, outlier columns last -> codes, one table, int8 outliers.

    Not row by row: the rows share the table. The Hessian plays no part, nor do dead inputs.
    """
    rows, columns = weights.shape
    normal = columns - outliers
    planes, table, _ = quantize(weights[:, :normal], recipe)
    integers, scales = quantize_outlier_columns(weights[:, normal:].float()) if outliers else (None, None)
    return CodebookMatrix(
        rows=rows,
        columns=columns,
        bits=recipe.bits,
        group=recipe.group_of(normal),
        kind="shared",
        planes=planes,
        scales=None,
        table=table,
        outliers=integers,
        outlier_scales=scales,
    )


def working_bytes(rows: int, columns: int, recipe: WeightRecipe) -> int:
    """What `solve` takes beside the matrix, at most; measured."""
    entries = rows * columns
    windows = 0 if recipe.levels == "dp" else entries // (recipe.window if recipe.levels == "windowed" else 1)
    table = 4 * 2 ** (recipe.bits - 1) if recipe.levels == "dp" else 0
    distinct = min(entries, MOST_DISTINCT)
    bins = 32 << (31 - _DROPPED) if entries > MOST_DISTINCT else 0
    return 2 * entries + 110 * windows + (table + 64) * distinct + bins + 30 * ROWS * columns


def _short(weights: Tensor) -> bool:
    return weights.dtype in (torch.bfloat16, torch.float16) and weights.device.type == "cpu"


def _patterns(dtype: torch.dtype) -> Tensor:
    """[32768] of a 16-bit dtype: the number of every pattern without a sign."""
    return torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def _finite(magnitudes: Magnitudes) -> Magnitudes:
    if not np.isfinite(magnitudes.values).all():
        raise ValueError("the weights hold NaN or infinite values")
    return magnitudes
