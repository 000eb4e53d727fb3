"""Slow twins: the mathematics once more, in plain Python and float64, sharing no code with what they check."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

from bitwright.codebook import CodebookMatrix, Kind
from bitwright.packing import pack_planes
from bitwright.recipe import WeightRecipe


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None)


def correlated(columns: int, seed: int, tokens: int | None = None) -> Tensor:
    """Inputs fp32 [tokens, columns] with correlated channels of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator) / math.sqrt(columns) * 2
    x = torch.randn(tokens or 3 * columns, columns, generator=generator) @ mixing
    return x * torch.linspace(0.5, 2.0, columns)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(weights: Sequence[float], importance: Sequence[float]) -> float:
    """Weighted squared distance of `weights` from their weighted mean."""
    mass = math.fsum(importance)
    if mass == 0:
        return 0.0
    mean = math.fsum(h * w for w, h in zip(weights, importance, strict=True)) / mass
    return math.fsum(h * (w - mean) ** 2 for w, h in zip(weights, importance, strict=True))


def by_weight(weights: Sequence[float], importance: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = sorted(zip(weights, importance, strict=True), key=lambda pair: pair[0])
    return [w for w, _ in pairs], [h for _, h in pairs]


def best_partition(weights: Sequence[float], importance: Sequence[float], count: int) -> float:
    """The least cost over all ways to cut the sorted weights into `count` intervals: every one is tried."""
    w, h = by_weight(weights, importance)
    size = len(w)
    best = math.inf
    for inner in itertools.combinations(range(1, size), min(count, size) - 1):
        cuts = [0, *inner, size]
        best = min(best, sum(cost(w[a:b], h[a:b]) for a, b in itertools.pairwise(cuts)))
    return best


def optimal_levels(weights: Sequence[float], importance: Sequence[float], count: int) -> list[float]:
    """The levels of an optimal partition, by recursion over its last interval; missing levels repeat the last."""
    w, h = by_weight(weights, importance)
    size = len(w)
    table: list[tuple[float, list[int]]] = [(cost(w[:b], h[:b]), [0]) for b in range(size + 1)]
    for _ in range(1, min(count, size)):
        table = [
            min((table[a][0] + cost(w[a:b], h[a:b]), [*table[a][1], a]) for a in range(b + 1)) for b in range(size + 1)
        ]
    cuts = [*table[size][1], size]
    levels = [np.average(w[a:b], weights=h[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    return levels + [levels[-1]] * (count - len(levels))


def rank_of(weight: float, levels: Sequence[float]) -> int:
    """Rank of the nearest level; the lower one where two are equally near."""
    return sum(weight > (low + high) / 2 for low, high in itertools.pairwise(levels))


def lloyd(weights: Sequence[float], importance: Sequence[float], count: int, iterations: int = 20) -> list[float]:
    """Weighted Lloyd from the weighted quantiles (2 i + 1) / (2 count); an empty cluster keeps its level."""
    w, h = by_weight(weights, importance)
    running = list(itertools.accumulate(h))
    levels = []
    for i in range(count):
        target = running[-1] * (2 * i + 1) / (2 * count)
        levels.append(next((x for x, mass in zip(w, running, strict=True) if mass >= target), w[-1]))
    members: list[int] = []
    for _ in range(iterations):
        before, members = members, [rank_of(x, levels) for x in w]
        if members == before:
            break
        for c in range(count):
            mass = sum(b for b, rank in zip(h, members, strict=True) if rank == c)
            if mass > 0:
                levels[c] = sum(b * a for a, b, rank in zip(w, h, members, strict=True) if rank == c) / mass
        levels.sort()
    return levels


def loss_of(weights: Sequence[float], importance: Sequence[float], levels: Sequence[float]) -> float:
    """Weighted squared error of the weights rounded to their nearest level."""
    return math.fsum(h * min((w - level) ** 2 for level in levels) for w, h in zip(weights, importance, strict=True))


def on_grid(levels: Sequence[float]) -> list[float]:
    """Levels as int8 multiples of the fp16 number max / 127."""
    scale = float(np.float16(max(abs(level) for level in levels) / 127)) or 1.0
    return [max(-127, min(127, round(level / scale))) * scale for level in levels]


def uniform(
    weights: Sequence[float], bits: int, symmetric: bool = False, share: float = 1.0, scale_by: str = "span"
) -> list[float]:
    """Levels of the round-to-nearest grid of a row: scale (max - min) / (2**bits - 1), the range widened to 0.

    Symmetric: range -max..max, zero point 2**(bits - 1); one bit: -max and max. `share` of the range is spanned. Scaled
    by "max": integers -2**(bits - 1) .. 2**(bits - 1) - 1, the last of them the (share of the) largest magnitude.
    """
    low, high = min(*weights, 0.0), max(*weights, 0.0)
    if low == high:
        low, high = -1.0, 1.0
    if symmetric:
        high = max(-low, high)
        low = -high
    low, high = np.float32(share) * np.float32(low), np.float32(share) * np.float32(high)
    if scale_by == "max":
        half = 2 ** (bits - 1)
        unit = float(np.float16(high / np.float32(half - 1)))
        return [unit * integer for integer in range(-half, half)]
    if symmetric and bits == 1:
        return [-float(np.float16(high)), float(np.float16(high))]
    scale = float(np.float16((high - low) / (2**bits - 1)))
    zero = 2 ** (bits - 1) if symmetric else max(0, min(2**bits - 1, round(float(-low / np.float32(scale)))))
    return [(code - zero) * scale for code in range(2**bits)]


def least_error_grid(
    weights: Sequence[float], importance: Sequence[float], bits: int, symmetric: bool, scale_by: str
) -> list[float]:
    """Of the shares 1, 0.99 .. 0.21 of the range the one with the least sum of h |error|**2.4."""
    grids = [uniform(weights, bits, symmetric, 1 - step / 100, scale_by) for step in range(80)]

    def loss(levels: list[float]) -> float:
        errors = (min(abs(w - level) for level in levels) for w in weights)
        return math.fsum(h * error**2.4 for h, error in zip(importance, errors, strict=True))

    return min(grids, key=loss)


def search(weights: Sequence[float], importance: Sequence[float], recipe: WeightRecipe) -> list[float]:
    count = 2**recipe.bits
    if recipe.levels == "uniform" and recipe.range == "mse":
        return least_error_grid(weights, importance, recipe.bits, recipe.symmetric, recipe.scale)
    if recipe.levels == "uniform":
        return uniform(weights, recipe.bits, recipe.symmetric, recipe.clip, recipe.scale)
    if recipe.levels == "minmax":
        low, high = min(weights), max(weights)
        return on_grid([low + (high - low) * i / (count - 1) for i in range(count)])
    if recipe.levels == "dp":
        return on_grid(optimal_levels(weights, importance, count))
    return on_grid(lloyd(weights, importance, count, recipe.em_iterations))


def damped(hessian: Tensor, share: float) -> np.ndarray:
    """Hd in float64: dead inputs with the mean of the others on the diagonal, enormous ones damped by their own."""
    h = hessian.double().numpy().copy()
    diagonal = np.einsum("ii->i", h)
    live = diagonal[diagonal > 0]
    mean = live.mean() if len(live) else 1.0
    diagonal[diagonal <= 0] = mean
    return h + share * np.diag(np.maximum(mean, diagonal / 1000))


def importance_of(hd: np.ndarray, kind: str) -> np.ndarray:
    size = len(hd)
    if kind == "none":
        return np.ones(size)
    if kind == "hessian":
        return np.diag(hd)
    if kind == "inverse":
        return 1 / np.diag(np.linalg.inv(hd))
    return np.array([1 / np.linalg.inv(hd[i:, i:])[0, 0] for i in range(size)])


def solve(weights: Tensor, hessian: Tensor, outliers: int, recipe: WeightRecipe) -> np.ndarray:
    """What solve_rows should reconstruct, float64 in site order, one column after the other.

    `column` and `block-tri` are done without any factor: the update of the columns that are left is the minimiser of
    the quadratic loss over them, from inverses of the Hessian of what is left. `block-diag` is the paper's listing.
    """
    dead = hessian.diagonal().numpy() <= 0
    hd = damped(hessian, recipe.damping)
    h = np.where(dead, 1e-4, 1.0) * importance_of(hd, recipe.importance)
    work = weights.double().numpy().copy()
    work[:, dead] = 0.0
    rows, columns = work.shape
    normal = columns - outliers
    reach = columns if recipe.feedback_outliers else normal
    result = np.zeros_like(work)
    factor = np.linalg.cholesky(np.linalg.inv(hd)).T
    for start in range(0, normal, recipe.group or normal):
        stop = min(start + (recipe.group or normal), normal)
        levels = []
        for j in range(rows):
            first = j - j % recipe.rows_a_scale
            sharing = work[first : first + recipe.rows_a_scale, start:stop]
            levels.append(search([w for row in sharing for w in row], list(h[start:stop]) * len(sharing), recipe))
        if recipe.feedback == "column":
            for i in range(start, stop):
                result[:, i] = [levels[j][rank_of(work[j, i], levels[j])] for j in range(rows)]
                left = np.linalg.inv(hd[i:, i:])[0]
                change = np.outer((work[:, i] - result[:, i]) / left[0], left[1:])
                work[:, i + 1 : reach] -= change[:, : reach - i - 1]
            continue
        for i in range(start, stop):
            result[:, i] = [levels[j][rank_of(work[j, i], levels[j])] for j in range(rows)]
        residual = work[:, start:stop] - result[:, start:stop]
        if recipe.feedback == "block-tri":
            change = residual @ hd[start:stop, stop:] @ np.linalg.inv(hd[stop:, stop:])
            work[:, stop:reach] += change[:, : reach - stop]
        elif recipe.feedback == "block-diag":
            errors = residual / np.diag(factor)[start:stop]
            work[:, stop:reach] -= errors @ factor[start:stop, stop:reach]
    if outliers:
        scale = np.float64(np.float16(np.abs(work[:, normal:]).max(axis=1, keepdims=True) / 127))
        scale[scale == 0] = 1.0
        result[:, normal:] = np.clip(np.rint(work[:, normal:] / scale), -128, 127) * scale
    return result


def planes_of(codes: Sequence[Sequence[int]], bits: int) -> list[list[list[int]]]:
    """Bit planes as bytes: bit i of byte j of plane p is bit p of the code of column 8 j + i."""
    result = []
    for plane in range(bits):
        rows = []
        for row in codes:
            data = [0] * -(-len(row) // 8)
            for column, code in enumerate(row):
                if code & (1 << plane):
                    data[column // 8] |= 1 << (column % 8)
            rows.append(data)
        result.append(rows)
    return result


def random_matrix(
    rows: int, columns: int, group: int, kind: Kind, outliers: int, seed: int, permuted: bool, bits: int = 2
) -> CodebookMatrix:
    """A matrix of arbitrary codes, levels, zero points, scales and outliers; its levels are in no order.

    A shared table is made of int8 multiples of an fp16 number, the largest 127, as the kernels want it.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    normal = columns - outliers
    groups = -(-normal // group)
    shared, salient = kind == "shared", kind == "salient"
    table = None
    if shared:
        steps = integers(-127, 128, (2**bits,), torch.float32)
        steps[0] = -127
        table = steps * torch.tensor(0.0173).half().float()
    return CodebookMatrix(
        rows=rows,
        columns=columns,
        bits=bits,
        group=group,
        kind=kind,
        planes=pack_planes(integers(0, 2**bits, (rows, normal), torch.uint8), bits),
        scales=None if shared else (torch.rand(rows, groups, generator=generator) + 0.01).half(),
        table=table,
        levels=integers(-127, 128, (rows, groups, 2**bits), torch.int8) if kind in ("free", "salient") else None,
        zeros=integers(0, 2**bits, (rows, groups), torch.uint8) if kind == "uniform" else None,
        outliers=integers(-127, 128, (rows, outliers), torch.int8) if outliers else None,
        outlier_scales=(torch.rand(rows, generator=generator) + 0.01).half() if outliers else None,
        permutation=torch.randperm(columns, generator=generator) if permuted else None,
        salient=pack_planes(integers(0, 2, (1, normal), torch.uint8), 1)[0, 0] if salient else None,
        salient_levels=integers(-127, 128, (rows, groups, 2**bits), torch.int8) if salient else None,
        salient_scales=(torch.rand(rows, groups, generator=generator) + 0.01).half() if salient else None,
    )
