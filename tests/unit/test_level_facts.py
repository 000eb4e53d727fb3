"""Known mean squared errors of scalar quantizers, relative to the variance of the weights (spec 2.3.1, 2.8 and 5.1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.solvers.grids import uniform_grid
from bitwright.solvers.levels import dp_levels, em_levels, minmax_levels, nearest, snap

from .twins import gaussian

ROWS, WIDTH = 384, 128


def nmse(block: Tensor, values: Tensor) -> float:
    values = values.float().sort(dim=1).values
    rounded = values.gather(1, nearest(block, values).long())
    return float((block - rounded).double().square().sum() / block.double().square().sum())


@pytest.fixture(scope="module")
def block() -> Tensor:
    return gaussian(ROWS, WIDTH, seed=11)


@pytest.fixture(scope="module")
def optimum(block: Tensor) -> Tensor:
    return dp_levels(block, torch.ones(WIDTH), 2)


def test_uniform_two_bits_on_gaussian_weights(block: Tensor) -> None:
    assert nmse(block, uniform_grid(block, 2).values()) == pytest.approx(0.251, abs=0.008)
    assert nmse(block, minmax_levels(block, 2)) == pytest.approx(0.251, abs=0.025)


def test_four_free_levels_on_gaussian_weights(block: Tensor, optimum: Tensor) -> None:
    assert nmse(block, optimum) == pytest.approx(0.106, abs=0.002)


def test_grid_of_levels_costs_less_than_a_thousandth(block: Tensor, optimum: Tensor) -> None:
    assert 1.0 <= nmse(block, snap(optimum).values()) / nmse(block, optimum) < 1.001


def test_em_ends_a_little_above_the_optimum(block: Tensor, optimum: Tensor) -> None:
    """2 % above on Gaussian, 7 % on Laplace weights."""
    excess = nmse(block, em_levels(block, torch.ones(WIDTH), 2)) / nmse(block, optimum) - 1
    assert 0.005 < excess < 0.04
    uniform = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    levels = [search(laplace, torch.ones(WIDTH), 2) for search in (em_levels, dp_levels)]
    assert 0.03 < nmse(laplace, levels[0]) / nmse(laplace, levels[1]) - 1 < 0.12


def test_one_bit_sign_and_scale(block: Tensor) -> None:
    """Two free levels on Gaussian weights are close to sign and scale, whose error is 1 - 2 / pi = 0.363."""
    assert nmse(block, dp_levels(block, torch.ones(WIDTH), 1)) == pytest.approx(0.355, abs=0.01)


def test_more_bits_lose_less(block: Tensor) -> None:
    errors = [nmse(block[:32], dp_levels(block[:32], torch.ones(WIDTH), bits)) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.01
