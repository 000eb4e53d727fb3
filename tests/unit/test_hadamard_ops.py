"""The Hadamard op: every variant against the Sylvester matrix, and what an orthogonal involution promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.runtime import hadamard_ops
from bitwright.runtime.hadamard_ops import hadamard

from .backends import needs_native, on_every_variant
from .twins import examples, gaussian


def sylvester(size: int) -> Tensor:
    """(-1)^popcount(i & j) / sqrt(size), fp64 [size, size]."""
    signs = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


@pytest.mark.parametrize("block", [2**k for k in range(10)])
def test_blocks_times_the_sylvester_matrix(backend: str, block: int) -> None:
    x = gaussian(3, 4 * block, seed=block)
    expected = (x.double().unflatten(-1, (4, block)) @ sylvester(block)).flatten(-2)
    torch.testing.assert_close(hadamard(x, block).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("block", [1, 8, 128, 4096])
def test_its_own_inverse_and_orthogonal(backend: str, block: int) -> None:
    x = gaussian(5, 4096)
    y = hadamard(x, block)
    torch.testing.assert_close(hadamard(y, block), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-2)


@needs_native
@given(
    power=st.integers(0, 12),
    blocks=st.integers(1, 3),
    rows=st.integers(0, 4),
    factor=st.sampled_from([1.0, 1e30, 1e-30, 0.0]),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_all_variants_agree_to_the_last_bit(
    power: int, blocks: int, rows: int, factor: float, count: int, seed: int
) -> None:
    block = 2**power
    x = gaussian(rows, blocks * block, seed=seed) * factor
    expected = hadamard_ops._hadamard_reference(x, block)
    for name, found in on_every_variant(lambda: hadamard(x, block), count).items():
        assert torch.equal(found, expected), name


def test_a_nan_stays_in_its_block(backend: str) -> None:
    x = gaussian(2, 256)
    x[1, 130] = float("nan")
    found = hadamard(x, 128).isnan().reshape(4, 128)
    assert found.all(dim=1).tolist() == [False, False, False, True]
    assert found.any(dim=1).tolist() == [False, False, False, True]


def test_what_does_not_fit_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(gaussian(2, 24), 12)
    with pytest.raises(ValueError, match="no multiple"):
        hadamard(gaussian(2, 24), 16)
    with pytest.raises(ValueError, match="float32"):
        hadamard(gaussian(2, 16).double(), 16)
