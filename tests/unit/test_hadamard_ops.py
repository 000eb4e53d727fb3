"""The Hadamard op: every variant against the Sylvester matrix, and what an orthogonal involution promises."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright import native
from bitwright.errors import TransformError
from bitwright.runtime import hadamard_ops
from bitwright.runtime.hadamard_ops import hadamard
from bitwright.transforms.hadamard import constructible, matrix

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


@pytest.mark.parametrize("block", [12, 24, 28, 36, 240, 432, 448, 704, 1216, 1408, 11008])
def test_sizes_with_dense_factors(backend: str, block: int) -> None:
    x = gaussian(2, 2 * block if block < 1000 else block, seed=block)
    if block == 11008:
        # 121 million signs are much for a test: a few columns of the matrix, by unit vectors through the transform.
        unit = torch.zeros(3, block)
        unit[[0, 1, 2], [0, 777, 11007]] = 1.0
        columns = hadamard(unit, block)
        assert torch.allclose(columns.abs(), torch.tensor(1 / math.sqrt(block)), rtol=1e-5)
        expected, found = x.double() @ columns.double().T, hadamard(x, block)[:, [0, 777, 11007]]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        return
    h = matrix(block).double() / math.sqrt(block)
    expected = (x.double().unflatten(-1, (-1, block)) @ h).flatten(-2)
    found = hadamard(x, block)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    torch.testing.assert_close(hadamard(found, block), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 8, 128, 4096])
def test_its_own_inverse_and_orthogonal(backend: str, block: int) -> None:
    x = gaussian(5, 4096)
    y = hadamard(x, block)
    torch.testing.assert_close(hadamard(y, block), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-2)


@needs_native
@given(
    block=st.one_of(st.integers(0, 12).map(lambda n: 2**n), st.integers(1, 500).filter(constructible)),
    blocks=st.integers(1, 3),
    rows=st.integers(0, 4),
    factor=st.sampled_from([1.0, 1e30, 1e-30, 0.0]),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(120)
def test_all_variants_agree_to_the_last_bit(
    block: int, blocks: int, rows: int, factor: float, count: int, seed: int
) -> None:
    x = gaussian(rows, blocks * block, seed=seed) * factor
    expected = hadamard_ops._hadamard_reference(x, block)
    for name, found in on_every_variant(lambda: hadamard(x, block), count).items():
        assert torch.equal(found, expected), name


@needs_native
def test_tables_live_as_long_as_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that two threads fill at once keeps one's table; the other's must not be freed before it is used."""
    tables: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    module = native.native()

    def uncached(order: int) -> Tensor:
        table = original(order)
        tables.append(weakref.ref(table))
        return table

    def signed_sums(*rest: int) -> None:
        alive.append(tables[-1]() is not None)
        module.signed_sums(*rest)

    original = hadamard_ops.signs.__wrapped__
    watched = SimpleNamespace(hadamard=module.hadamard, signed_sums=signed_sums)
    monkeypatch.setattr(hadamard_ops, "signs", uncached)
    monkeypatch.setattr(hadamard_ops, "native", lambda: watched)
    hadamard_ops._hadamard(gaussian(2, 240), 240)
    assert alive == [True, True]


def test_a_nan_stays_in_its_block(backend: str) -> None:
    x = gaussian(2, 256)
    x[1, 130] = float("nan")
    found = hadamard(x, 128).isnan().reshape(4, 128)
    assert found.all(dim=1).tolist() == [False, False, False, True]
    assert found.any(dim=1).tolist() == [False, False, False, True]


def test_what_does_not_fit_is_refused(backend: str) -> None:
    with pytest.raises(TransformError, match="no Hadamard matrix of size 14"):
        hadamard(gaussian(2, 28), 14)
    for block in (16, 0, -1):
        with pytest.raises(ValueError, match="no multiple"):
            hadamard(gaussian(2, 24), block)
    with pytest.raises(ValueError, match="float32"):
        hadamard(gaussian(2, 16).double(), 16)
