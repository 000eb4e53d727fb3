"""From the Hessian of a site to the factor that error feedback needs, with rescues that are always reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.solvers import native

Importance = Literal["none", "hessian", "inverse", "conditional"]
DAMPING_STEPS = 4
# A channel is damped by at least this part of what it would be if all were like it: inputs of enormous energy that
# spike together are else the same number to fp32.
OWN_SHARE = 1e-3
# What a dead input's weights, all zero, count in the level search beside those of live ones.
DEAD_IMPORTANCE = 1e-4
# Columns that output_error multiplies together.
SUM_BLOCK = 512


@dataclass(frozen=True)
class Factor:
    """What the solvers need of one site, in site order.

    upper       U, fp32 upper triangular, inverse(Hd) = U^T U (spec section 1)
    importance  h, fp32 [columns], the weight of each column in the level search
    dead        bool [columns], inputs that were never active
    damping     the share of the mean diagonal that was added in the end
    rescue      None, or what had to be done beyond the recipe, in words
    hessian     Hd, damped, fp32 [columns, columns], where it was asked for
    shift       fp32 [columns], what was added to the diagonal of H
    """

    upper: Tensor
    importance: Tensor
    dead: Tensor
    damping: float
    rescue: str | None
    shift: Tensor
    hessian: Tensor | None = None
    diagonal_only: bool = False


def factorize(
    hessian: Tensor,
    damping: float,
    importance: Importance,
    threads: int | None = None,
    *,
    keep_hessian: bool = False,
    over: int | None = None,
) -> Factor:
    """H fp32 [columns, columns], symmetric, in site order -> its Factor.

    `damping` is a share of the mean diagonal over the live ones of the first `over` columns, all unless said, and of a
    thousandth of a column's own diagonal where that is more. Dead inputs (H_ii = 0) get that mean as H_ii. Tried in
    turn: fp32, fp64, damping times 10 up to three times, and at last the diagonal alone, which makes feedback vanish
    but never fails. `threads` (torch's number unless said) is for the native code, whose result does not depend on it.
    `keep_hessian` for refinement and asymmetric targets.
    """
    dead = hessian.diagonal() <= 0
    counted = hessian.diagonal()[:over][~dead[:over]]
    mean = float(counted.double().mean()) if len(counted) else 1.0
    alive = hessian.clone()
    alive.diagonal()[dead] = mean
    diagonal = alive.diagonal().clone()
    more = (OWN_SHARE * diagonal - mean).clamp_min(0.0)
    share = damping
    for step in range(DAMPING_STEPS):
        alive.diagonal().copy_(diagonal + share * more)
        for dtype in (torch.float32, torch.float64):
            upper = _upper_factor(alive, share * mean, dtype, threads)
            if upper is not None:
                words = [f"damping raised from {damping:g} to {share:g}"] if step else []
                words += ["factorized in float64"] if dtype == torch.float64 else []
                weight = _importance(alive.diagonal() + share * mean, upper, importance, dead)
                damped = None
                if keep_hessian:
                    alive.diagonal().add_(share * mean)
                    damped = alive
                return Factor(upper, weight, dead, share, ", ".join(words) or None, share * (mean + more), damped)
        share *= 10
    shift = damping * (mean + more)
    upper = torch.diag((diagonal + shift).rsqrt())
    weight = _importance(diagonal + shift, upper, importance, dead)
    only = torch.diag(diagonal + shift) if keep_hessian else None
    rescue = "Hessian not positive definite: diagonal only"
    return Factor(upper, weight, dead, damping, rescue, shift, only, diagonal_only=True)


def _upper_factor(hessian: Tensor, shift: float, dtype: torch.dtype, threads: int | None) -> Tensor | None:
    """U of inverse(H + shift I) = U^T U, fp32, or None where the factorization fails or is not finite."""
    if dtype == torch.float32 and native.available(hessian):
        return native.upper_factor(hessian, shift, threads)
    upper = upper_factor_reference(hessian, shift, dtype)
    return upper if upper is not None and bool(torch.isfinite(upper).all()) else None


def upper_factor_reference(hessian: Tensor, shift: float, dtype: torch.dtype) -> Tensor | None:
    """U of inverse(H + shift I) = U^T U, computed in `dtype`, fp32; None where the factorization fails.

    With J the reversal of the channels, J (H + shift I) J = L L^T gives U = J L^-1 J: one Cholesky factorization and
    one triangular inverse, where the inverse Hessian and its factor would cost more and lose accuracy.
    """
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    del damped
    if int(failed):
        return None
    identity = torch.eye(lower.shape[0], dtype=dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()


def _importance(diagonal: Tensor, upper: Tensor, kind: Importance, dead: Tensor) -> Tensor:
    """h_i = 1, Hd_ii, 1 / P_ii or 1 / U_ii^2 (erratum E6), next to nothing where weights are zeros that do nothing."""
    if kind == "none":
        found = torch.ones_like(diagonal)
    elif kind == "hessian":
        found = diagonal.clone()
    elif kind == "inverse":
        found = 1.0 / (upper * upper).sum(dim=0)
    else:
        found = 1.0 / upper.diagonal().square()
    return torch.where(dead, DEAD_IMPORTANCE * found, found)


def input_drift(cross: Tensor, factor: Factor) -> Tensor:
    """D = (X_full^T X + d I) - (X^T X + d I), fp32 [columns, columns]: how far inputs X have come from X_full.

    cross fp32 [columns, columns] = X_full^T X in site order. Raises ValueError for a factor without its Hessian.
    """
    if factor.hessian is None:
        raise ValueError("an asymmetric target needs the damped Hessian in its factor")
    if factor.diagonal_only:  # a difference from the diagonal alone would be no drift
        return torch.zeros_like(cross)
    drift = cross - factor.hessian
    drift.diagonal().add_(factor.shift)
    return drift


def asymmetric_target(weights: Tensor, drift: Tensor, factor: Factor, share: float) -> Tensor:
    """Weights to aim at when quantized inputs X shall give what full-precision inputs X_full gave: W + share (T - W).

    T = W (X_full^T X + d I) (X^T X + d I)^-1 = W + W D (X^T X + d I)^-1 minimises |X_full W^T - X T^T|^2 (GPTAQ, Li et
    al. 2025, section 3, in closed form), d the damping, D the `input_drift`. weights fp32 [rows, columns].
    """
    return weights + share * (weights @ drift @ factor.upper.T @ factor.upper)


def residual_correction(strayed: Tensor, factor: Factor, share: float) -> Tensor:
    """What weights must add for their outputs to make up for `share` of how far the residual stream has strayed.

    C = E (X^T X + d I)^-1 minimises |(R_full - R) - X C^T|^2 + d |C|^2, `strayed` E = (R_full - R)^T X fp32 [rows,
    columns], R the stream that the outputs are added to: the closed form of the asymmetric target with another aim.
    Nothing where the factor is of the diagonal alone: each channel would make up for all.
    """
    if factor.diagonal_only:
        return torch.zeros_like(strayed)
    return share * (strayed @ factor.upper.T @ factor.upper)


def output_error(original: Tensor, quantized: Tensor, hessian: Tensor) -> tuple[float, float]:
    """(sum of squared output differences, sum of squared outputs) over the calibration tokens, up to the scale of H.

    original, quantized: fp32 [rows, columns] in site order. The first over the second is the relative output error.
    """
    return _quadratic(original - quantized, hessian), _quadratic(original, hessian)


def _quadratic(rows: Tensor, hessian: Tensor) -> float:
    """Sum of r^T H r over the rows r; of the symmetric H only the blocks on and above the diagonal are multiplied."""
    total = 0.0
    for start in range(0, rows.shape[1], SUM_BLOCK):
        stop = min(start + SUM_BLOCK, rows.shape[1])
        product = rows[:, start:stop] @ hessian[start:stop, start:]
        product[:, stop - start :] *= 2.0
        total += float((product * rows[:, start:]).double().sum())
    return total
