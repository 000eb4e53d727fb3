"""Refinement of a solved matrix: levels refitted and codes exchanged under the full Hessian, block after block.

Error feedback decides each column once, from left to right. Here the error of all other columns is known, so a block
can be solved again: with C the pull of the others on it, the block's ideal weights are T = W_b + C H_bb^-1, and what is
left is min (T - Q) H_bb (T - Q)^T over its codes and levels. Least squares give the levels for fixed codes, coordinate
descent the codes for fixed levels (alternating as LNQ, GuidedQuant section 4; spec section 8 item 2). No step is taken
that makes the loss of a row larger.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, code_of_rank
from bitwright.packing import pack_planes
from bitwright.solvers import native
from bitwright.solvers.feedback import quantize_outlier_columns
from bitwright.solvers.levels import GridLevels, nearest, snap

RIDGE = 1e-6  # of the mean diagonal of the normal equations: a level without weights keeps its place


def refine(
    weights: Tensor, matrix: CodebookMatrix, hessian: Tensor, rounds: int, *, outliers_too: bool = True
) -> CodebookMatrix:
    """A matrix with free levels whose loss tr((W - Q) H (W - Q)^T) is at most that of `matrix`.

    weights fp32 [rows, columns] in site order, hessian fp32 [columns, columns], damped; `rounds` passes over all blocks
    of a row. Outlier columns are solved for and rounded last in each pass, or with `outliers_too` false stay as they
    are (erratum E5).
    """
    if matrix.kind != "free" or matrix.levels is None or matrix.scales is None:
        raise ValueError(f"only free levels can be refitted; found kind {matrix.kind!r}")
    normal, group = matrix.normal_columns, matrix.group
    order = code_of_rank(matrix.bits).long()
    rank_of = torch.empty_like(order)
    rank_of[order] = torch.arange(len(order))
    ranks = rank_of[matrix.codes().long()]
    integers = matrix.levels[:, :, order].clone()
    scales = matrix.scales.clone()
    outliers, outlier_scales = matrix.outliers, matrix.outlier_scales
    error = weights - matrix.dequantize_site_order()
    blocks = [slice(start, min(start + group, normal)) for start in range(0, normal, group)]
    factors = [_factor(hessian[block, block]) for block in (*blocks, slice(normal, None))]
    for _ in range(rounds):
        for index, block in enumerate(blocks):
            square = hessian[block, block]
            target = _target(weights, error, hessian, block, factors[index])
            grid = GridLevels(integers[:, index], scales[:, index])
            grid, block_ranks = improve(target, square, grid, ranks[:, block])
            integers[:, index], scales[:, index], ranks[:, block] = grid.integers, grid.scale, block_ranks
            error[:, block] = weights[:, block] - grid.values().gather(1, block_ranks)
        if outliers_too and outliers is not None and outlier_scales is not None:
            block = slice(normal, matrix.columns)
            target = _target(weights, error, hessian, block, factors[-1])
            now = outliers.float() * outlier_scales.float().unsqueeze(1)
            fresh, fresh_scales = quantize_outlier_columns(target)
            rounded = fresh.float() * fresh_scales.float().unsqueeze(1)
            square = hessian[block, block]
            better = _loss(target - rounded, square) < _loss(target - now, square)
            outliers = torch.where(better.unsqueeze(1), fresh, outliers)
            outlier_scales = torch.where(better, fresh_scales, outlier_scales)
            error[:, block] = weights[:, block] - torch.where(better.unsqueeze(1), rounded, now)
    by_code = torch.empty_like(integers)
    by_code[:, :, order] = integers
    planes = pack_planes(order[ranks].to(torch.uint8), matrix.bits)
    return dataclasses.replace(
        matrix, planes=planes, levels=by_code, scales=scales, outliers=outliers, outlier_scales=outlier_scales
    )


def _factor(square: Tensor) -> Tensor:
    """L of H_bb = L L^T. Inputs that fp32 cannot tell apart need more of a ridge than all together were damped by."""
    lower, failed = torch.linalg.cholesky_ex(square)
    ridge = RIDGE
    while int(failed) or not bool(torch.isfinite(lower).all()):
        wide = square.double()
        wide.diagonal().add_(ridge * wide.diagonal())
        lower, failed = torch.linalg.cholesky_ex(wide)
        lower, ridge = lower.float(), 10 * ridge
        if ridge > 1e3:
            raise ValueError("a block of the Hessian is not finite")
    return lower


def _target(weights: Tensor, error: Tensor, hessian: Tensor, block: slice, factor: Tensor) -> Tensor:
    """T = W_b + C H_bb^-1, C = sum over the other columns of E H: what the block should be if it could be anything."""
    pull = error @ hessian[:, block] - error[:, block] @ hessian[block, block]
    return weights[:, block] + torch.cholesky_solve(pull.T, factor).T


def improve(target: Tensor, square: Tensor, grid: GridLevels, ranks: Tensor) -> tuple[GridLevels, Tensor]:
    """Refitted levels and exchanged codes of one block, row by row where they lower (T - Q) H_bb (T - Q)^T.

    target fp32 [rows, width], square = H_bb fp32 [width, width], ranks int64 [rows, width]. The native code does it
    where it is there; `improve_reference` does it anywhere.
    """
    if native.available(target, square):
        return native.refine_block(target, square, grid, ranks)
    return improve_reference(target, square, grid, ranks)


def improve_reference(target: Tensor, square: Tensor, grid: GridLevels, ranks: Tensor) -> tuple[GridLevels, Tensor]:
    """`improve` in torch: the oracle of the native code."""
    before = _loss(target - grid.values().gather(1, ranks), square)
    fitted = snap(_refit(target, square, grid, ranks).sort(dim=1).values)
    start = nearest(grid.values().gather(1, ranks), fitted.values()).long()
    exchanged = _descend(target, square, fitted.values(), start)
    after = _loss(target - fitted.values().gather(1, exchanged), square)
    better = after < before
    kept = GridLevels(
        torch.where(better.unsqueeze(1), fitted.integers, grid.integers), torch.where(better, fitted.scale, grid.scale)
    )
    return kept, torch.where(better.unsqueeze(1), exchanged, ranks)


def _refit(target: Tensor, square: Tensor, grid: GridLevels, ranks: Tensor) -> Tensor:
    """Levels [rows, k] that minimise the loss for these codes: the normal equations B H_bb B^T l = B H_bb T^T."""
    count = grid.integers.shape[1]
    members = torch.nn.functional.one_hot(ranks, count).to(target.dtype).transpose(1, 2)  # [rows, k, width]
    weighted = members @ square
    normal = weighted @ members.transpose(1, 2)
    right = (weighted @ target.unsqueeze(2)).squeeze(2)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-30
    normal.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return torch.linalg.solve(normal, right + ridge.unsqueeze(1) * grid.values())


def _descend(target: Tensor, square: Tensor, values: Tensor, ranks: Tensor) -> Tensor:
    """Each column in turn takes the level that is best with all others as they are (one pass)."""
    ranks = ranks.clone()
    gradient = (target - values.gather(1, ranks)) @ square
    for column in range(target.shape[1]):
        now = values.gather(1, ranks[:, column : column + 1])
        wanted = now + gradient[:, column : column + 1] / square[column, column]
        rank = nearest(wanted, values).long()
        change = values.gather(1, rank) - now
        gradient -= change * square[column]
        ranks[:, column : column + 1] = rank
    return ranks


def _loss(residual: Tensor, square: Tensor) -> Tensor:
    return ((residual @ square) * residual).sum(dim=1)
