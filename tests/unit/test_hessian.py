from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.recipe import WeightRecipe
from bitwright.solvers import asymmetric_target, bwa, factorize, input_drift, output_error, residual_correction

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
    assert factor.shift[:18].tolist() == pytest.approx([shift] * 18, rel=1e-6)
    assert factor.shift[18:].tolist() == pytest.approx((1e-4 * h.diagonal()[18:]).tolist(), rel=1e-5)
    assert torch.allclose(factor.hessian, h + torch.diag(factor.shift), rtol=1e-6)
    assert factorize(h, 0.1, "conditional").shift.min() > 1e3 * shift


@pytest.mark.parametrize("spike", [1e2, 1e3, 3e3, 1e5])
@pytest.mark.parametrize("over", [None, 112])
def test_inputs_that_spike_together(spike: float, over: int | None) -> None:
    """Massive activations: three channels that are huge at a few tokens. Nobody else's damping pays for them."""
    for seed in range(4):
        x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(seed)) * 0.03
        x[::512, -3:] += spike * torch.tensor([1.0, 1.3, 1.6])
        h = 0.5 * x.T @ x
        factor = factorize(h, 0.01, "conditional", keep_hessian=True, over=over)
        assert factor.rescue in (None, "factorized in float64")
        if over:
            assert float(factor.shift[:over].max()) < 0.02 * float(h.diagonal()[:over].mean())
        recipe = WeightRecipe(group=32, levels="dp", feedback="column", refine=2)
        weights = torch.randn(16, 128, generator=torch.Generator().manual_seed(9)) * 0.02
        found = bwa.solve(weights, factor, 16, recipe).dequantize_site_order()
        plain = bwa.solve(weights, factor, 16, recipe.model_copy(update={"refine": 0})).dequantize_site_order()
        assert found.isfinite().all()
        lost = [((weights - q).double() @ x.double().T).square().sum().item() for q in (found, plain)]
        assert lost[0] < 1.02 * lost[1]


def test_dead_inputs_and_the_scale_of_the_live_ones() -> None:
    """Whatever the scale of the activations, weights of dead inputs change nothing for the others."""
    x = correlated(64, seed=3)
    x[:, ::2] = 0.0
    weights = gaussian(6, 64, seed=4)
    recipe = WeightRecipe(group=64, levels="dp", feedback="column")
    live = factorize((x.T @ x)[1::2, 1::2], 0.01, "conditional")
    expected = bwa.solve(weights[:, 1::2], live, 0, recipe.model_copy(update={"group": 32})).dequantize_site_order()
    for scale in (1e-3, 1.0, 1e4):
        factor = factorize(scale * x.T @ x, 0.01, "conditional")
        found = bwa.solve(weights, factor, 0, recipe).dequantize_site_order()[:, 1::2]
        assert float((found - expected).square().mean()) < 1e-3 * float((expected - weights[:, 1::2]).square().mean())


def test_the_diagonal_alone_has_no_drift() -> None:
    x = correlated(12, seed=1)
    h = x.T @ x
    h[0, 1] = h[1, 0] = 1e4 * h[0, 0]
    factor = factorize(h, 0.01, "conditional", keep_hessian=True)
    assert factor.diagonal_only
    weights = gaussian(3, 12)
    drift = input_drift((1.05 * x).T @ x, factor)
    assert torch.equal(asymmetric_target(weights, drift, factor, 1.0), weights)
    assert not residual_correction(gaussian(3, 12), factor, 1.0).any()


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
