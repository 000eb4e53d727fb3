"""assign(): one block's codes and error; the loss that its feedback leaves (spec 2.3.2, 9.5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.solvers import factorize
from bitwright.solvers.feedback import assign, quantize_outlier_columns
from bitwright.solvers.levels import dp_levels

from .twins import correlated, examples, gaussian

MODES = ["none", "block-diag", "block-tri", "column"]


def test_gptq_toy() -> None:
    h = torch.tensor([[2.0, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 2.0]])
    upper = factorize(h, 0.0, "none").upper
    w = torch.tensor([[0.4, -0.7, 1.3]])
    ranks, errors = assign(w, torch.tensor([[-1.0, 0.0, 1.0]]), upper, "column")
    codes = ranks.float() - 1
    assert codes.tolist() == [[0.0, -1.0, 1.0]]
    assert errors[0].tolist() == pytest.approx([0.4899, 0.6124, 0.7778], abs=5e-5)
    # The weight that was rounded in column i: what the errors before it have left of the original.
    working = w[0] - (errors @ upper.triu(1))[0]
    assert working.tolist() == pytest.approx([0.4, -0.5, 1.55], abs=1e-5)
    difference = (w - codes).double()
    assert float(errors.double().square().sum()) == pytest.approx(1.22, abs=1e-5)
    assert float(difference @ h.double() @ difference.T) == pytest.approx(1.22, abs=1e-6)


@pytest.fixture(params=range(8))
def problem(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [5, 24], Hd and U of a random site; the block is the first 10 columns."""
    x = gaussian(48, 24, seed=request.param).double()
    hd = x.T @ x
    upper = torch.linalg.cholesky(torch.linalg.inv(hd), upper=True)
    return gaussian(5, 24, seed=100 + request.param).double(), hd, upper


def loss(difference: Tensor, hd: Tensor) -> Tensor:
    return ((difference @ hd) * difference).sum(dim=1)


def final_loss(weights: Tensor, hd: Tensor, upper: Tensor, values: Tensor, mode: str, width: int = 10) -> Tensor:
    """Loss of the weights after the block is rounded and its error handed on to the later columns."""
    ranks, errors = assign(weights[:, :width], values, upper[:width, :width], mode)
    result = weights.clone()
    result[:, :width] = values.gather(1, ranks.long())
    result[:, width:] -= errors @ upper[:width, width:]
    return loss(weights - result, hd)


def levels_of(weights: Tensor, width: int = 10) -> Tensor:
    return dp_levels(weights[:, :width].float(), torch.ones(width), 2).double()


def test_block_tri_is_the_exact_optimum(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, hd, upper = problem
    values = levels_of(weights)
    ranks, _ = assign(weights[:, :10], values, upper[:10, :10], "block-tri")
    residual = weights[:, :10] - values.gather(1, ranks.long())
    p = torch.linalg.inv(hd)
    closed_form = (residual @ torch.linalg.inv(p[:10, :10]) * residual).sum(dim=1)
    losses = {mode: final_loss(weights, hd, upper, values, mode) for mode in ("none", "block-diag", "block-tri")}
    assert torch.allclose(losses["block-tri"], closed_form, rtol=1e-9)
    assert (losses["block-tri"] <= losses["block-diag"] * (1 + 1e-12)).all()
    assert (losses["block-tri"] <= losses["none"] * (1 + 1e-12)).all()
    assert losses["block-diag"].sum() < losses["none"].sum()
    # And no step away from it is better: it is the minimum over the later columns.
    later = torch.linalg.lstsq(hd[10:, 10:], -(residual @ hd[:10, 10:]).T).solution.T
    assert torch.allclose(loss(torch.cat([residual, later], dim=1), hd), losses["block-tri"], rtol=1e-9)


def test_column_error_is_the_true_loss(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """GPTQ's bookkeeping, sum of e^2, holds for the column-sequential scheme."""
    weights, hd, upper = problem
    values = levels_of(weights)
    _, errors = assign(weights[:, :10], values, upper[:10, :10], "column")
    assert torch.allclose(final_loss(weights, hd, upper, values, "column"), errors.square().sum(dim=1), rtol=1e-9)


def test_column_by_hand(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against optimal brain surgery from the inverse Hessian of what is left, without the factor."""
    weights, hd, upper = problem
    values = levels_of(weights)
    ranks, errors = assign(weights[:, :10], values, upper[:10, :10], "column")
    work = weights.numpy().copy()
    for i in range(10):
        left = np.linalg.inv(hd.numpy()[i:, i:])[0]
        chosen = np.abs(work[:, i : i + 1] - values.numpy()).argmin(axis=1)
        assert ranks[:, i].tolist() == chosen.tolist()
        error = work[:, i] - np.take_along_axis(values.numpy(), chosen[:, None], 1)[:, 0]
        assert errors[:, i].numpy() == pytest.approx(error / np.sqrt(left[0]), rel=1e-8)
        work[:, i:] -= np.outer(error / left[0], left)
    after = weights[:, 10:] - errors @ upper[:10, 10:]
    assert np.allclose(after.numpy(), work[:, 10:], rtol=1e-8)


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), st.floats(0.125, 8, width=32))
@examples(40)
def test_width_one_makes_no_difference(weights: list[float], diagonal: float) -> None:
    block = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    values = torch.tensor([-1.5, -0.5, 0.25, 2.0], dtype=torch.float64).expand(len(weights), 4)
    upper = torch.tensor([[diagonal]], dtype=torch.float64)
    results = [assign(block, values, upper, mode) for mode in ("column", "block-tri", "block-diag")]
    for ranks, errors in results[1:]:
        assert torch.equal(ranks, results[0][0])
        assert torch.allclose(errors, results[0][1], rtol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_error_is_what_its_mode_says(mode: str) -> None:
    h = correlated(9, seed=1)
    upper = factorize(h.T @ h, 0.01, "none").upper
    block = gaussian(7, 9)
    before = block.clone()
    values = levels_of(block, 9).float()
    ranks, errors = assign(block, values, upper, mode)
    assert torch.equal(block, before)
    assert ranks.dtype == torch.uint8
    residual = block - values.gather(1, ranks.long())
    if mode == "none":
        assert not errors.any()
    elif mode == "block-diag":
        assert torch.allclose(errors * upper.diagonal(), residual, atol=1e-5)
    elif mode == "block-tri":
        assert torch.allclose(errors @ upper, residual, atol=1e-4)
    if mode == "column":
        # Handed on inside the block as well: what was rounded is not the original.
        worked = block - errors @ upper.triu(1)
        assert torch.allclose(worked - values.gather(1, ranks.long()), errors * upper.diagonal(), atol=1e-4)
    else:
        assert torch.equal(ranks, assign(block, values, upper, "none")[0])


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
)
@examples(80)
def test_int8_outliers(rows: list[list[float]]) -> None:
    weights = torch.tensor(rows)
    integers, scale = quantize_outlier_columns(weights)
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.float16
    error = (weights.double() - integers.double() * scale.double().unsqueeze(1)).abs().amax(dim=1)
    # Half a step wherever fp16 can hold max / 127 to one part in 255; far below what matters otherwise.
    bound = torch.where(weights.abs().amax(dim=1) > 1e-3, scale.double() / 2, 4e-6)
    assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("value", [0.0, 1e-9, 65504.0, 1e6])
def test_int8_outliers_of_extremes(value: float) -> None:
    integers, scale = quantize_outlier_columns(torch.tensor([[value, -value, 0.0]]))
    restored = integers.float() * scale.float()
    assert restored.isfinite().all()
    assert restored[0].tolist() == pytest.approx([value, -value, 0.0], rel=5e-4, abs=4e-6)
