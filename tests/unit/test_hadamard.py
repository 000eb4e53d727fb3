"""Hadamard matrices and transforms: what Paley's constructions reach, the sizes of current models, orthogonality."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import TransformError
from bitwright.transforms.galois import character, irreducible, prime_power, sums
from bitwright.transforms.hadamard import (
    RandomHadamard,
    constructible,
    factors,
    largest_block,
    matrix,
    next_size,
    smallest_factor,
    transform,
)
from bitwright.transforms.paley import construction, paley

from .twins import examples, gaussian


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


PRIME_POWERS = sorted({p**k for p in range(2, 1100) if is_prime(p) for k in range(1, 11) if p**k < 1100})


def is_hadamard(h: torch.Tensor) -> bool:
    exact = h.double()
    entries = bool(((h == 1) | (h == -1)).all())
    return h.dtype == torch.int8 and entries and torch.equal(exact @ exact.T, len(h) * torch.eye(len(h)).double())


# --- finite fields ----------------------------------------------------------------------------------------------------


def test_prime_powers_by_sieve() -> None:
    assert [q for q in range(-3, 1100) if q > 0 and prime_power(q)] == PRIME_POWERS
    assert (prime_power(343), prime_power(729), prime_power(461)) == ((7, 3), (3, 6), (461, 1))


@pytest.mark.parametrize(("p", "k"), [(3, 2), (3, 3), (3, 5), (5, 2), (5, 3), (7, 2), (7, 3), (11, 2)])
def test_irreducible_has_no_factor(p: int, k: int) -> None:
    """Not the product of any two monic polynomials of lower degree, by multiplying all of them."""
    polynomial = irreducible(p, k)
    assert polynomial[k] == 1
    for degree in range(1, k // 2 + 1):
        lower = [[*c, 1] for c in itertools.product(range(p), repeat=degree)]
        for a in lower:
            # Division by a: the quotient's coefficients follow one by one from the top; then compare the product.
            quotient = [0] * (k - degree + 1)
            rest = list(polynomial)
            for top in range(k - degree, -1, -1):
                quotient[top] = rest[top + degree] % p
                for place in range(degree + 1):
                    rest[top + place] -= quotient[top] * a[place]
            assert any(value % p for value in rest[:degree]), (polynomial, a)


@pytest.mark.parametrize("q", [3, 5, 7, 9, 11, 25, 27, 49, 81, 121, 243, 343])
def test_character_and_sums(q: int) -> None:
    """As many squares as others; sum over b of chi(b) chi(b + c) = -1 for c != 0, which holds in a field alone."""
    chi, total, difference = character(q).long(), sums(q), sums(q, -1)
    assert chi[0] == 0
    assert int((chi == 1).sum()) == int((chi == -1).sum()) == (q - 1) // 2
    for table in (total, difference):
        assert all(sorted(row.tolist()) == list(range(q)) for row in table)
    assert torch.equal(total, total.T)
    assert torch.equal(total[torch.arange(q).unsqueeze(1), difference.T], torch.arange(q).expand(q, q))
    correlations = (chi.unsqueeze(1) * chi[total]).sum(dim=0)
    assert correlations.tolist() == [q - 1] + [-1] * (q - 1)
    minus_one = int(chi[difference[0, 1]])
    assert minus_one == (1 if q % 4 == 1 else -1)


def test_residues_of_eleven() -> None:
    assert [a for a in range(11) if character(11)[a] == 1] == [1, 3, 4, 5, 9]


@pytest.mark.parametrize("q", [1, 6, 8, 12])
def test_no_field_or_no_odd_one(q: int) -> None:
    with pytest.raises(ValueError, match="odd prime"):
        character(q)


# --- matrices ---------------------------------------------------------------------------------------------------------

PALEY_ONE = [12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108, 132, 140, 152, 164, 168, 180, 192, 200, 212, 224, 228]
PALEY_ONE += [240, 252, 28, 244, 344]
PALEY_TWO = {12: 5, 20: 9, 28: 13, 36: 17, 52: 25, 60: 29, 76: 37, 84: 41, 100: 49, 108: 53, 124: 61, 148: 73, 164: 81}
PALEY_TWO |= {180: 89, 196: 97, 204: 101, 220: 109, 228: 113, 244: 121, 252: 125, 924: 461}
DOUBLED = [40, 56, 88, 96, 112, 120, 136, 144, 160, 176, 208, 216, 248, 256]
OUT_OF_REACH = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]


def test_coverage_of_paley() -> None:
    """The lists of the orders that Paley's constructions give, do not give, and give by doubling."""
    assert all(construction(order) == 1 for order in PALEY_ONE)
    assert all(construction(order) for order in PALEY_TWO)
    assert all(order == 2 * (q + 1) and q in PRIME_POWERS and q % 4 == 1 for order, q in PALEY_TWO.items())
    # 144 = 2 * 72 and so on: the first has no construction of its own, its half has a matrix.
    assert all(not construction(order) and constructible(order // 2) for order in DOUBLED)
    assert [n for n in range(4, 301, 4) if not constructible(n)] == OUT_OF_REACH
    assert [n for n in range(1, 300) if constructible(n) and n % 4] == [1, 2]


def test_every_paley_matrix_up_to_the_largest() -> None:
    orders = [n for n in range(1, 1025) if construction(n)]
    expected = {q + 1 for q in PRIME_POWERS if q % 4 == 3} | {2 * (q + 1) for q in PRIME_POWERS if q % 4 == 1}
    assert set(orders) == {n for n in expected if n <= 1024}
    for order in orders:
        if order <= 400 or order == 924:
            h = paley(order)
            assert is_hadamard(h), order
            assert torch.equal(h, h.T), order


def test_every_constructible_matrix_up_to_some_hundreds() -> None:
    for size in range(1, 400):
        if constructible(size):
            h = matrix(size)
            assert h.shape == (size, size)
            assert is_hadamard(h), size
            assert torch.equal(h, h.T), size
            parts = factors(size)
            assert math.prod(parts.dense) * parts.power == size


def test_matrices_never_change() -> None:
    """Artifacts depend on them: each is a fingerprint of its signs, here of those rows that differ most readily."""

    def fingerprint(size: int) -> str:
        bits = "".join("1" if value < 0 else "0" for value in matrix(size)[:, :16].flatten().tolist())
        return f"{int(bits, 2) % (2**61 - 1):x}"

    found = {size: fingerprint(size) for size in (16, 12, 28, 36, 76, 344, 560)}
    assert found == FINGERPRINTS


FINGERPRINTS = {
    16: "1c6c48ec510dc4bc",
    12: "108610c619c349af",
    28: "d2e101e2e5265f5",
    36: "149ce5ebc6dcb2ec",
    76: "c57b76929271c73",
    344: "a3aceb843dafc1d",
    560: "19da516af6b2e15d",
}


# --- sizes of models --------------------------------------------------------------------------------------------------

# Size -> smallest dense factor K, for hidden and intermediate sizes and numbers of heads of the families in use.
SIZES = {
    896: 28, 4864: 76, 1536: 12, 8960: 140, 2048: 1, 11008: 344, 3584: 28, 18944: 148, 5120: 20, 13824: 108, 27648: 108,
    8192: 1, 29568: 924, 1024: 1, 3072: 12, 6144: 12, 2560: 20, 9728: 76, 4096: 1, 12288: 12, 17408: 68, 25600: 100,
    6656: 52, 17920: 140, 22016: 344, 14336: 28, 28672: 28, 16384: 1, 24576: 12, 2304: 36, 4608: 36, 9216: 36,
    36864: 36, 1152: 36, 3840: 60, 5376: 84, 6912: 108, 10240: 20, 15360: 60, 21504: 84, 576: 36, 960: 60, 5632: 44,
    448: 28, 1216: 76, 1408: 44, 704: 44,
}  # fmt: skip
HEADS = {8: 1, 12: 12, 16: 1, 20: 20, 24: 12, 28: 28, 32: 1, 40: 20, 52: 52, 64: 1, 4: 1, 80: 20, 96: 12, 256: 1}


@pytest.mark.parametrize(("size", "factor"), [*SIZES.items(), *HEADS.items()])
def test_sizes_of_models(size: int, factor: int) -> None:
    assert smallest_factor(size) == factor
    power = size // factor
    assert power & (power - 1) == 0
    parts = factors(size)
    assert math.prod(parts.dense) * parts.power == size
    # Never dearer than the one dense factor.
    assert sum(m / 4 + 4 for m in parts.dense) + math.log2(parts.power) <= factor / 4 + 4 + math.log2(size / factor)


def test_several_small_factors_instead_of_a_large_one() -> None:
    assert str(factors(29568)) == "44 x 28 x 12 x 2"
    assert str(factors(8960)) == "28 x 20 x 16"
    assert str(factors(11008)) == "344 x 32"
    assert (str(factors(4096)), str(factors(1))) == ("4096", "1")


@pytest.mark.parametrize("heads", [9, 14, 15])
def test_what_has_no_matrix_says_what_to_do(heads: int) -> None:
    with pytest.raises(TransformError, match=f"size {heads} .*block-local.*expand") as caught:
        factors(heads)
    assert str(next_size(heads)) in str(caught.value)
    assert smallest_factor(heads) is None


def test_blocks() -> None:
    assert largest_block(11008, power_of_two=True) == 256
    assert largest_block(11008) == 11008
    assert largest_block(11008, most=128) == 128
    assert largest_block(9 * 64, most=500) == 288  # 12 x 12 x 2
    assert largest_block(14) == 2
    assert largest_block(92 * 64) == 92 * 64  # 368 x 16, where 92 itself has no matrix
    assert largest_block(15) == 1
    with pytest.raises(ValueError, match="no block"):
        largest_block(16, most=0)


@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans())
@examples(50)
def test_the_largest_block_is_the_largest(columns: int, most: int, power_of_two: bool) -> None:
    block = largest_block(columns, most, power_of_two)
    assert columns % block == 0
    assert block <= most
    assert constructible(block)
    better = [d for d in range(block + 1, min(most, columns) + 1) if columns % d == 0]
    assert not any(d & (d - 1) == 0 if power_of_two else constructible(d) for d in better)


# --- transforms -------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([n for n in range(1, 401) if constructible(n)]),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
@examples(60)
def test_fast_transform_is_the_dense_product(block: int, blocks: int, dtype: torch.dtype) -> None:
    x = gaussian(2, blocks * block, seed=block).to(dtype)
    h = matrix(block).double() / math.sqrt(block)
    expected = (x.double().unflatten(-1, (blocks, block)) @ h).flatten(-2)
    found = transform(x, block)
    assert found.dtype == dtype
    assert float((found - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(transform(found, block), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0.0)


PEAKS = {128: 0.088388, 1024: 0.03125, 2048: 0.022097, 4096: 0.015625, 5120: 0.013975, 8192: 0.011049, 14336: 0.008352}


@pytest.mark.parametrize(("size", "response"), PEAKS.items())
def test_a_peak_is_spread_evenly(size: int, response: float) -> None:
    peak = torch.zeros(size)
    peak[size // 3] = 1.0
    assert transform(peak, size).abs().tolist() == pytest.approx([response] * size, abs=5e-7)


def test_a_block_must_divide() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        transform(gaussian(2, 40), 12)


@pytest.mark.parametrize(("columns", "block"), [(448, 448), (448, 64), (36, 12), (9, 1)])
def test_random_hadamard(columns: int, block: int) -> None:
    rotation = RandomHadamard(columns, block, seed=3)
    q = rotation.apply(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(q @ q.T, torch.eye(columns, dtype=torch.float64), rtol=0.0, atol=1e-12)
    x, weights = gaussian(5, columns).double(), gaussian(7, columns, seed=1).double()
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)
    # x W^T is the same after both are rotated.
    torch.testing.assert_close(rotation.apply(x) @ rotation.apply(weights).T, x @ weights.T)
    signs = rotation.signs(x)
    assert set(signs.tolist()) <= {1.0, -1.0}
    torch.testing.assert_close(torch.block_diag(*[matrix(block).double()] * (columns // block)) / math.sqrt(block),
                               signs.unsqueeze(1) * q)  # fmt: skip


def test_seeds_differ_and_repeat() -> None:
    like = torch.zeros(1)
    one, again, other = (RandomHadamard(1000, 8, seed).signs(like) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert 300 < int((one != other).sum()) < 700
    assert 400 < int((one > 0).sum()) < 600
    assert one[:12].tolist() == SIGNS


SIGNS = [-1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
