from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers, quantize_site
from bitwright.activations.quantizer import CHUNK, MINIMUM_STEP, bit_planes
from bitwright.recipe import ActivationRecipe

from .twins import examples, gaussian

PLAIN = ActivationRecipe(balance="none")
BALANCES = ["support", "literal", "none"]
EIGHT = [-1, -0.55, 0.05, 0.33, 0.71, 1.2, 1.66, 2]


def recipe(balance: Any = "none", clip: float = 1.0) -> ActivationRecipe:
    return ActivationRecipe(balance=balance, clip=clip)


def twin(x: list[float], balance: str, bits: int = 4, clip: float = 1.0) -> tuple[list[int], list[float], float, int]:
    """(codes, plane scales, step, zero point) of one group, from equations 3, 4, 10 and 11 in float64."""
    low, high = min(x), max(x)
    cut = (high - low) * (1 - clip) / 2
    low, high = low + cut, high - cut
    top = 2**bits - 1
    step = max((high - low) / top, 1e-5)
    zero = -round(low / step)
    codes = [min(max(round(value / step) + zero, 0), top) for value in x]
    scales = []
    for plane in range(bits):
        shares = [
            2**plane / code * (value - step * (code - zero))
            for value, code in zip(x, codes, strict=True)
            if code >> plane & 1
        ]
        count = {"support": max(len(shares), 1), "literal": len(x), "none": 1}[balance]
        scales.append(2**plane * step + (math.fsum(shares) / count if balance != "none" else 0.0))
    return codes, scales, step, zero


def restore(codes: list[int], scales: list[float], step: float, zero: int) -> list[float]:
    return [sum(s * (code >> a & 1) for a, s in enumerate(scales)) - step * zero for code in codes]


def one(x: list[float], asked: ActivationRecipe) -> Any:
    return quantize_groups(torch.tensor([x], dtype=torch.float32), len(x), asked)


def test_worked_exact_group() -> None:
    result = one([-1, 0, 0.6, 2], PLAIN)
    assert float(result.step) == pytest.approx(0.2)
    assert float(result.zero) == 5
    assert result.codes.flatten().tolist() == [0, 5, 8, 15]
    assert result.values().flatten().tolist() == pytest.approx([-1, 0, 0.6, 2])
    # With the sign printed in the paper, xhat = mu (c + z), everything is shifted by 2 mu z = 2.
    printed = result.step * (result.codes + result.zero)
    assert (printed - result.values()).flatten().tolist() == pytest.approx([2.0] * 4)


@pytest.mark.parametrize(
    ("balance", "scales", "error"),
    [
        ("none", None, 0.0216),
        ("literal", [0.19933, 0.40375, 0.80231, 1.59462], 0.021277),
        ("support", [0.1991, 0.4075, 0.80462, 1.58923], 0.021194),
    ],
)
def test_worked_balanced_group(balance: Any, scales: list[float] | None, error: float) -> None:
    result = one(EIGHT, recipe(balance))
    assert result.codes.flatten().tolist() == [0, 2, 5, 7, 9, 11, 13, 15]
    difference = result.values().flatten().double() - torch.tensor(EIGHT, dtype=torch.float64)
    assert float(difference.square().sum()) == pytest.approx(error, abs=6e-7)
    if scales is None:
        assert result.plane_scales is None
    else:
        assert result.plane_scales.flatten().tolist() == pytest.approx(scales, abs=6e-6)
    if balance == "support":
        assert float(difference.mean()) == pytest.approx(0.0, abs=1e-7)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20),
    st.sampled_from(BALANCES),
    st.sampled_from([4, 8]),
    st.sampled_from([1.0, 0.9]),
)
@examples(150)
def test_against_the_equations(x: list[float], balance: Any, bits: Any, clip: float) -> None:
    asked = ActivationRecipe(bits=bits, balance="none" if bits == 8 else balance, clip=clip)
    x = [float(np.float32(value)) for value in x]
    result = one(x, asked)
    codes, _, step, zero = twin(x, asked.balance, bits, clip)
    assert float(result.step) == pytest.approx(step, rel=1e-5, abs=1e-12)
    found = [int(code) for code in result.codes.flatten().tolist()]
    assert all(0 <= code < 2**bits for code in found)
    # float32 may break a tie the other way, in a code or in the zero point; what is restored differs by a step then.
    assert float(result.zero) == pytest.approx(zero, abs=1, rel=1e-6)
    if found == codes and float(result.zero) == zero:
        expected = twin(x, asked.balance, bits, clip)
        assert result.values().flatten().tolist() == pytest.approx(restore(*expected), rel=1e-5, abs=2e-5)
    if clip == 1.0 and asked.balance == "none":
        worst = max(abs(value - xhat) for value, xhat in zip(x, result.values().flatten().tolist(), strict=True))
        assert worst <= step * 0.502 + max(map(abs, x)) * 1e-6


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=16))
@examples(60)
def test_range_and_planes(x: list[float]) -> None:
    """sum_a 2^a b_a = c, and xhat stays in [-mu z, mu (15 - z)]."""
    result = one(x, PLAIN)
    bits = bit_planes(result.codes, 4)
    assert all(bool(((bit == 0) | (bit == 1)).all()) for bit in bits)
    assert torch.equal(sum(2**a * bit for a, bit in enumerate(bits)), result.codes)
    mu, z = float(result.step), float(result.zero)
    slack = 1e-6 * max(1.0, *map(abs, x))
    assert float(result.values().min()) >= -mu * z - slack
    assert float(result.values().max()) <= mu * (15 - z) + slack


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bit_planes_of_every_code(bits: int) -> None:
    codes = torch.arange(2**bits).float()
    for plane, bit in enumerate(bit_planes(codes, bits)):
        assert bit.tolist() == [code >> plane & 1 for code in range(2**bits)]


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(("channels", "group"), [(40, 16), (16, 16), (5, 8), (33, 16), (1, 8)])
def test_groups_are_independent_and_ragged_ones_are_not_padded(balance: Any, channels: int, group: int) -> None:
    """Each group alone gives the same numbers, the last, shorter one too."""
    x = gaussian(6, channels, seed=channels) * 3 + 1
    before = x.clone()
    whole = quantize_groups(x, group, recipe(balance))
    assert torch.equal(x, before)
    values = whole.values().reshape(6, -1)
    for index, start in enumerate(range(0, channels, group)):
        part = x[:, start : start + group]
        alone = quantize_groups(part, part.shape[1], recipe(balance))
        assert torch.equal(alone.step, whole.step[:, index : index + 1])
        assert torch.equal(alone.codes[:, 0], whole.codes[:, index, : part.shape[1]])
        assert torch.allclose(alone.values()[:, 0], values[:, start : start + part.shape[1]], rtol=0, atol=1e-6)
        assert not whole.codes[:, index, part.shape[1] :].any()


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(
    "x",
    [
        [0.0] * 8,
        [3.0] * 8,
        [-1e4] * 8,
        [1e-8, -1e-8, 0.0, 5e-9, 1e-8, 0.0, 0.0, 0.0],
        [5.0, 5.5, 6.0, 7.0, 5.1, 5.2, 6.9, 6.5],
        [-9.0, -8.0, -8.5, -8.2, -8.9, -8.1, -8.4, -8.6],
        [1e4, -1e4, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        [6e4, 6.1e4, 6e4, 6.1e4, 6e4, 6.1e4, 6e4, 6.05e4],
    ],
)
def test_extreme_groups(x: list[float], balance: Any) -> None:
    """One sign is not clipped, equal values survive, nothing is infinite."""
    result = one(x, recipe(balance))
    step = max((max(x) - min(x)) / 15, MINIMUM_STEP)
    error = (result.values().flatten().double() - torch.tensor(x, dtype=torch.float64)).abs().max()
    assert float(error) <= step * (0.51 if balance == "none" else 1.0) + 1e-6 * max(map(abs, x))


def test_one_sign_needs_a_zero_point_beyond_the_codes() -> None:
    result = one([5.0, 5.5, 6.0, 7.0], PLAIN)
    assert float(result.zero) < 0  # a clamp to 0..15, as Atom has it, would restore 0 .. 2 instead of 5 .. 7
    assert float(one([-9.0, -8.0], PLAIN).zero) > 15


def test_gaussian_errors() -> None:
    """Relative squared errors of section 2.4: plain, literal and support balanced, clip 0.9."""
    x = gaussian(4000, 128, seed=21)

    def error(asked: ActivationRecipe) -> float:
        values = quantize_groups(x, 128, asked).values().reshape(x.shape)
        return float((values - x).double().square().sum() / x.double().square().sum())

    plain, literal, support = (error(recipe(balance)) for balance in ("none", "literal", "support"))
    assert plain == pytest.approx(0.01012, abs=1e-4)
    assert literal == pytest.approx(0.00998, abs=1e-4)
    assert support == pytest.approx(0.00990, abs=1e-4)
    assert support < literal < plain
    assert error(recipe("none", clip=0.9)) == pytest.approx(0.00947, abs=1.5e-4)
    assert error(ActivationRecipe(bits=8, balance="none")) == pytest.approx(plain / 17**2, rel=0.02)


def test_support_balance_removes_the_mean_error_of_nonzero_codes() -> None:
    x = gaussian(50, 64, seed=22).exp()

    def mean(balance: Any) -> Tensor:
        result = quantize_groups(x, 64, recipe(balance))
        rest = (x - result.values()[:, 0]).double() * (result.codes[:, 0] > 0)
        return rest.sum(dim=1).abs() / 64

    step = quantize_groups(x, 64, PLAIN).step.flatten()
    assert (mean("support") < 1e-4 * step).all()
    assert mean("support").mean() < mean("literal").mean() < mean("none").mean()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9))
@examples(60)
def test_outliers_are_symmetric_int8(x: list[float]) -> None:
    integers, scale = quantize_outliers(torch.tensor([x]))
    assert scale.shape == (1, 1)
    assert integers.abs().max() <= 127
    assert torch.equal(integers, integers.round())
    largest = max(map(abs, x))
    assert float(scale) == pytest.approx(max(largest / 127, 1e-12), rel=1e-6)
    error = (integers.double() * scale.double() - torch.tensor([x], dtype=torch.float64)).abs().max()
    assert float(error) <= float(scale) * 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("outliers", [0, 5])
def test_site_is_groups_and_outliers_side_by_side(balance: Any, outliers: int) -> None:
    x = gaussian(7, 45, seed=23)
    asked = recipe(balance)
    normal = 45 - outliers
    expected = [quantize_groups(x[:, :normal], 16, asked).values().reshape(7, -1)[:, :normal]]
    if outliers:
        integers, scale = quantize_outliers(x[:, normal:])
        expected.append(integers * scale)
    assert torch.equal(quantize_site(x, outliers, 16, asked), torch.cat(expected, dim=1))
    assert quantize_site(x, outliers, 16, None) is x


@pytest.mark.parametrize("balance", BALANCES)
def test_tokens_are_independent_across_chunks(balance: Any) -> None:
    """More values than one chunk holds: every token as if it came alone."""
    columns = 2048
    rows = CHUNK // columns
    x = gaussian(2 * rows + 3, columns, seed=24)
    whole = quantize_site(x, 16, 128, recipe(balance))
    assert whole.shape == x.shape
    for token in (0, rows - 1, rows, 2 * rows, 2 * rows + 2):
        assert torch.allclose(quantize_site(x[token : token + 1], 16, 128, recipe(balance))[0], whole[token], atol=1e-6)


def test_no_tokens() -> None:
    for balance in BALANCES:
        assert quantize_site(torch.zeros(0, 24), 4, 8, recipe(balance)).shape == (0, 24)
