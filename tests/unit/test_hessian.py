from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.solvers import factorize, output_error

from .twins import correlated, damped, gaussian, importance_of

KINDS = ["none", "hessian", "inverse", "conditional"]


def hessian(columns: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    x = correlated(columns, seed, tokens)
    return 2 * x.T @ x / 8


def remainder(upper: Tensor, h: Tensor, shift: float) -> float:
    """How far U^T U Hd is from the identity."""
    hd = h.double() + shift * torch.eye(len(h), dtype=torch.float64)
    return float((upper.double().T @ upper.double() @ hd - torch.eye(len(h))).abs().max())


@pytest.mark.parametrize("columns", [1, 2, 13, 64])
def test_factor_of_the_inverse(columns: int) -> None:
    h = hessian(columns)
    factor = factorize(h, 0.01, "conditional")
    hd = damped(h, 0.01)
    upper = factor.upper.double().numpy()
    assert factor.upper.dtype == torch.float32
    assert np.array_equal(upper, np.triu(upper))
    assert np.allclose(upper.T @ upper, np.linalg.inv(hd), rtol=1e-4, atol=1e-5 * np.abs(np.linalg.inv(hd)).max())
    # d_i^2 is the inverse-Hessian diagonal when the columns before i are frozen; first and last in closed form.
    conditional = [np.linalg.inv(hd[i:, i:])[0, 0] for i in range(columns)]
    assert np.diag(upper) ** 2 == pytest.approx(np.array(conditional), rel=1e-4)
    assert upper[0, 0] ** 2 == pytest.approx(np.linalg.inv(hd)[0, 0], rel=1e-4)
    assert upper[-1, -1] ** 2 == pytest.approx(1 / hd[-1, -1], rel=1e-5)
    assert (factor.damping, factor.rescue, bool(factor.dead.any())) == (0.01, None, False)


def test_worked_factor() -> None:
    h = torch.tensor([[2.0, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 2.0]])
    expected = [[0.8165, -0.4082, 0.0], [0.0, 0.8165, -0.4082], [0.0, 0.0, 0.7071]]
    assert torch.allclose(factorize(h, 0.0, "none").upper, torch.tensor(expected), atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_by_definition(kind: Any) -> None:
    h = hessian(17, seed=3)
    found = factorize(h, 0.02, kind).importance
    assert found.dtype == torch.float32
    assert found.double().numpy() == pytest.approx(importance_of(damped(h, 0.02), kind), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_of_the_hessian_scales_importance_alone(scale: float) -> None:
    h = hessian(12, seed=4)
    first, second = factorize(h, 0.01, "conditional"), factorize(h * scale, 0.01, "conditional")
    assert torch.allclose(second.importance, first.importance * scale, rtol=1e-4)
    assert torch.allclose(second.upper, first.upper * scale**-0.5, rtol=1e-3, atol=1e-6 * scale**-0.5)


def test_dead_inputs() -> None:
    x = correlated(11, seed=5)
    x[:, [0, 4, 10]] = 0.0
    h = x.T @ x
    factor = factorize(h, 0.01, "conditional")
    assert factor.dead.tolist() == [i in (0, 4, 10) for i in range(11)]
    assert factor.rescue is None
    # A dead input is tied to nothing: neither does its error reach other columns nor theirs it.
    for i in (0, 4, 10):
        column = factor.upper[:, i].clone()
        row = factor.upper[i].clone()
        column[i] = row[i] = 0.0
        assert not column.any()
        assert not row.any()
    assert torch.equal(h, x.T @ x)  # the input is left alone
    assert remainder(factor.upper, torch.tensor(damped(h, 0.01)), 0.0) < 1e-4


def test_everything_dead() -> None:
    factor = factorize(torch.zeros(5, 5), 0.01, "conditional")
    assert factor.dead.all()
    assert torch.allclose(factor.upper, torch.eye(5) / 1.01**0.5)


def test_damping_over_some_columns() -> None:
    """A column of huge energy raises the damping of all, unless the mean leaves it out."""
    h = hessian(20, seed=8)
    h[:, 18:] *= 1e3
    h[18:] *= 1e3
    factor = factorize(h, 0.1, "conditional", keep_hessian=True, over=18)
    shift = 0.1 * float(h.diagonal()[:18].mean())
    assert factor.shift == pytest.approx(shift, rel=1e-6)
    assert torch.allclose(factor.hessian, h + shift * torch.eye(20), rtol=1e-6)
    assert factorize(h, 0.1, "conditional").shift > 1e3 * shift


def test_float64_comes_before_more_damping() -> None:
    """Integers of rank 3 and hardly any damping: next to them float32 cannot see it, float64 can."""
    x = torch.randint(-9, 10, (3, 40), generator=torch.Generator().manual_seed(6)).float()
    h = x.T @ x
    share = 1e-9
    factor = factorize(h, share, "conditional")
    assert factor.rescue == "factorized in float64"
    assert factor.damping == share
    hd = damped(h, share)
    conditional = [np.linalg.inv(hd[i:, i:])[0, 0] for i in range(40)]
    assert np.diag(factor.upper.double().numpy()) ** 2 == pytest.approx(np.array(conditional), rel=1e-3)


@pytest.mark.parametrize("seed", range(100, 112))
def test_on_the_edge_of_float32_what_comes_out_is_right(seed: int) -> None:
    """Rank 10 of 30, damped by a few roundings: H, or only its inverse, may have no float32 factor."""
    h = hessian(30, seed=seed, tokens=10)
    factor = factorize(h, 3e-7, "conditional")
    assert factor.upper.isfinite().all()
    assert (factor.upper.diagonal() > 0).all()
    if factor.rescue is not None:
        hd = damped(h, factor.damping)
        conditional = [np.linalg.inv(hd[i:, i:])[0, 0] for i in range(30)]
        assert np.diag(factor.upper.double().numpy()) ** 2 == pytest.approx(np.array(conditional), rel=0.05)


@pytest.mark.parametrize(("off_diagonal", "share"), [(1.05, 0.1), (1.5, 1.0), (4.0, 10.0)])
def test_damping_ladder(off_diagonal: float, share: float) -> None:
    """Eigenvalues 1 - c and 1 + c: positive as soon as the damping is above c - 1."""
    h = torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])
    factor = factorize(h, 0.01, "inverse")
    assert factor.damping == pytest.approx(share)
    assert factor.rescue is not None
    assert factor.rescue.startswith(f"damping raised from 0.01 to {share:g}")
    assert remainder(factor.upper, h, share) < 1e-4
    assert factor.importance.double().numpy() == pytest.approx(importance_of(damped(h, share), "inverse"), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off_diagonal", [100.0, 1e30])
def test_diagonal_alone_at_last(kind: Any, off_diagonal: float) -> None:
    """Eigenvalues 1 - c: no damping of the ladder makes the matrix definite. Feedback vanishes, nothing fails."""
    h = torch.diag(torch.tensor([1.0, 1.0, 4.0]))
    h[0, 1] = h[1, 0] = off_diagonal
    factor = factorize(h, 0.01, kind)
    assert factor.rescue == "Hessian not positive definite: diagonal only"
    assert factor.damping == 0.01
    hd = np.diag(np.diag(damped(h, 0.01)))
    assert torch.equal(factor.upper, torch.diag(factor.upper.diagonal()))
    assert remainder(factor.upper, torch.diag(h.diagonal()), 0.02) < 1e-6
    assert factor.importance.double().numpy() == pytest.approx(importance_of(hd, kind), rel=1e-6)


def test_output_error_is_what_the_outputs_say() -> None:
    x = correlated(20, seed=7)
    weights, other = gaussian(6, 20, seed=1), gaussian(6, 20, seed=2)
    lost, total = output_error(weights, other, x.T @ x)
    exact = x.double() @ weights.double().T
    assert total == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert lost == pytest.approx(float((exact - x.double() @ other.double().T).square().sum()), rel=1e-5)
    assert output_error(weights, weights, x.T @ x)[0] == 0.0
