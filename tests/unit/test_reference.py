"""Planes and popcounts against dense products (equations 1 to 7 of BWA; spec 9.4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers, quantize_site
from bitwright.codebook import CodebookMatrix
from bitwright.packing import pack_planes
from bitwright.recipe import ActivationRecipe
from bitwright.reference import plane_counts, quantized_linear

from .twins import examples, gaussian, random_matrix

# The worked example of 9.4.
Q = [1, 0, 1, 1, 0, 0, 1, 0]
M = [1, 1, 0, 0, 1, 0, 0, 1]
CODES = [3, 15, 0, 8, 5, 7, 10, 12]
XHAT = [-0.3, 0.9, -0.6, 0.2, -0.1, 0.1, 0.4, 0.6]
WHAT = [3, 1, 0.25, 0.25, 1, -0.25, 0.25, 1]
PLAIN = ActivationRecipe(balance="none")


def worked_matrix(m: list[int]) -> CodebookMatrix:
    """Levels in quarters: (alpha, beta) = (2, 1) where m = 1, (0.5, -0.25) where m = 0."""
    codes = torch.tensor([[q + 2 * s for q, s in zip(Q, m, strict=True)]], dtype=torch.uint8)
    return CodebookMatrix(
        rows=1,
        columns=8,
        bits=2,
        group=8,
        kind="free",
        planes=pack_planes(codes, 2),
        scales=torch.tensor([[0.25]], dtype=torch.float16),
        levels=torch.tensor([[[-1, 1, 4, 12]]], dtype=torch.int8),
    )


def test_worked_counts() -> None:
    q, m, codes = torch.tensor(Q), torch.tensor(M), torch.tensor(CODES)
    expected = [(1, 0, 3, 1), (1, 1, 2, 2), (0, 0, 3, 1), (0, 2, 2, 2)]
    total = 0.0
    for plane, numbers in enumerate(expected):
        v1, v0, r1, r0 = (int(count) for count in plane_counts(q, m, (codes >> plane) & 1))
        assert (v1, v0, r1, r0) == numbers
        total += 0.1 * 2**plane * (2 * v1 + 1 * r1 + 0.5 * v0 - 0.25 * r0)
    assert total == pytest.approx(4.375)
    v1, v0, r1, r0 = (int(count) for count in plane_counts(q, m, torch.ones(8)))
    assert 2 * v1 + r1 + 0.5 * v0 - 0.25 * r0 == 6.5  # S
    assert total - 0.1 * 6 * 6.5 == pytest.approx(0.475)


def test_worked_linear() -> None:
    matrix = worked_matrix(M)
    x = torch.tensor([XHAT])
    assert matrix.dequantize()[0].tolist() == WHAT
    quantized = quantize_groups(x, 8, PLAIN)
    assert quantized.codes.flatten().tolist() == CODES
    assert float(quantized.zero) == 6
    assert float(quantized_linear(x, matrix, PLAIN)) == pytest.approx(0.475, abs=1e-6)


def test_swapped_masks_are_another_matrix() -> None:
    """Erratum E11: NOT m without relabelled levels is wrong; by hand -0.325 in place of 0.475 here."""
    swapped = worked_matrix([1 - bit for bit in M])
    x = torch.tensor([XHAT])
    by_hand = sum(w * v for w, v in zip([0.25, -0.25, 3, 3, -0.25, 1, 3, -0.25], XHAT, strict=True))
    assert by_hand == pytest.approx(-0.325)
    assert float(quantized_linear(x, swapped, PLAIN)) == pytest.approx(by_hand, abs=1e-6)
    # Relabelled consistently, the swap changes nothing.
    levels = torch.tensor([[[4, 12, -1, 1]]], dtype=torch.int8)
    relabelled = CodebookMatrix(1, 8, 2, 8, "free", swapped.planes, swapped.scales, levels)
    assert float(quantized_linear(x, relabelled, PLAIN)) == pytest.approx(0.475, abs=1e-6)


@given(st.data())
@examples(60)
def test_identities_of_the_counts(data: st.DataObject) -> None:
    """v0 + v1 = popc(q b), r0 + r1 = popc(b), v <= r, sum_a 2^a (r1 + r0) = sum of the codes."""
    width = data.draw(st.integers(1, 128))

    def draw(top: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(0, top), min_size=width, max_size=width)))

    q, m, codes = draw(1), draw(1), draw(15)
    total = 0
    for plane in range(4):
        b = (codes >> plane) & 1
        v1, v0, r1, r0 = (int(count) for count in plane_counts(q, m, b))
        assert v0 + v1 == int((q & b).sum())
        assert r0 + r1 == int(b.sum())
        assert 0 <= v1 <= r1
        assert 0 <= v0 <= r0
        swapped = tuple(int(count) for count in plane_counts(q, 1 - m, b))
        assert swapped == (v0, v1, r0, r1)
        total += 2**plane * (r1 + r0)
    assert total == int(codes.sum())


def restored(x: Tensor, matrix: CodebookMatrix, recipe: ActivationRecipe) -> Tensor:
    """xhat in site order and float64, from the stored integers and scales, element by element."""
    if matrix.permutation is not None:
        x = x[:, matrix.permutation]
    normal = matrix.normal_columns
    parts = quantize_groups(x[:, :normal], matrix.group, recipe)
    codes, step, zero = parts.codes.long(), parts.step.double(), parts.zero.double()
    values = -step * zero.expand(codes.shape)
    for plane in range(recipe.bits):
        if parts.plane_scales is None:
            scale = step * 2**plane
        else:
            scale = parts.plane_scales[..., plane : plane + 1].double()
        values = values + scale * ((codes >> plane) & 1)
    values = values.flatten(1)[:, :normal]
    if not matrix.outlier_columns:
        return values
    integers, scale = quantize_outliers(x[:, normal:])
    return torch.cat([values, integers.double() * scale.double()], dim=1)


def check(x: Tensor, matrix: CodebookMatrix, recipe: ActivationRecipe, bias: Tensor | None = None) -> None:
    weights = matrix.dequantize_site_order().double()
    xhat = restored(x, matrix, recipe)
    y = quantized_linear(x, matrix, recipe, bias)
    offset = 0 if bias is None else bias.double()
    # The sums are the same numbers in another order; the shift by mu z may be larger than what remains.
    group_range = quantize_groups(xhat[:, : matrix.normal_columns].float(), matrix.group, PLAIN)
    size = float((group_range.step * (group_range.zero.abs() + 15)).max()) * matrix.columns * float(weights.abs().max())
    assert y.dtype == torch.float64
    assert torch.allclose(y, xhat @ weights.T + offset, rtol=1e-9, atol=1e-12 * size + 1e-15)
    # And against the simulation in float32.
    site = x if matrix.permutation is None else x[:, matrix.permutation]
    simulated = quantize_site(site, matrix.outlier_columns, matrix.group, recipe).double()
    assert torch.allclose(simulated, xhat, rtol=1e-5, atol=1e-6 * float(x.abs().max()) + 1e-30)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([8, 16, 24]),
    st.integers(0, 6),
    st.sampled_from(["free", "uniform", "shared"]),
    st.booleans(),
    st.sampled_from(["support", "literal", "none"]),
    st.sampled_from([1.0, 0.9]),
    st.integers(0, 2**20),
)
@examples(60)
def test_against_dense(
    rows: int, normal: int, group: int, outliers: int, kind: Any, permuted: bool, balance: Any, clip: float, seed: int
) -> None:
    matrix = random_matrix(rows, normal + outliers, group, kind, outliers, seed, permuted)
    x = gaussian(3, normal + outliers, seed=seed + 1) * 3
    check(x, matrix, ActivationRecipe(balance=balance, clip=clip), gaussian(rows, seed=seed + 2))


EXTREMES = {
    "large": lambda x: x * 1e4,
    "equal": lambda x: torch.full_like(x, 0.7),
    "equal and large": lambda x: torch.full_like(x, -1e4),
    "zero": torch.zeros_like,
    "positive": lambda x: x.abs() + 3,
    "negative": lambda x: -x.abs() - 3,
    "tiny": lambda x: x * 1e-8,
    "one spike": lambda x: torch.where(torch.arange(x.shape[1]) == 3, 1e4, x),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("balance", ["support", "literal", "none"])
def test_extreme_inputs(name: str, balance: Any) -> None:
    matrix = random_matrix(4, 29, 8, "free", 4, 7, True)
    check(EXTREMES[name](gaussian(3, 29, seed=8)), matrix, ActivationRecipe(balance=balance))


def test_eight_bit_activations_are_eight_planes() -> None:
    matrix = random_matrix(4, 29, 8, "uniform", 4, 9, False)
    check(gaussian(3, 29, seed=10), matrix, ActivationRecipe(bits=8, balance="none"))


@pytest.mark.parametrize("code_bits", [1, 3, 4])
def test_other_widths_are_refused(code_bits: int) -> None:
    planes = pack_planes(torch.zeros(1, 8, dtype=torch.uint8), code_bits)
    levels = torch.zeros(1, 1, 2**code_bits, dtype=torch.int8)
    matrix = CodebookMatrix(1, 8, code_bits, 8, "free", planes, torch.ones(1, 1).half(), levels)
    with pytest.raises(ValueError, match=f"2-bit codes, found {code_bits}"):
        quantized_linear(torch.zeros(1, 8), matrix, PLAIN)
