"""Activation quantization as an op: the integers of the kernels on every backend, against torch and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright import native
from bitwright.activations import quantize_site as dequantized
from bitwright.recipe import ActivationRecipe
from bitwright.runtime.activation_ops import quantize_site

from .backends import on_every_variant
from .test_site_products import SPREADS, spread_out
from .twins import examples, gaussian


def by_reference(x: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.runtime.activation_ops.native", lambda: None)
        found: tuple[Tensor, ...] = quantize_site(x, *arguments)
    return found


def values(parts: tuple[Tensor, ...], group: int) -> Tensor:
    """What the op's docstring says the integers stand for."""
    codes, step, rest, outlier_codes, outlier_step = parts
    place = torch.arange(codes.shape[-1]) // group
    normal = step[..., place] * (codes + rest[..., place])
    return torch.cat([normal, outlier_step.unsqueeze(-1) * outlier_codes], dim=-1)


@given(
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 24, 128, 136]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 1, 3, 16, 33]),
    tokens=st.sampled_from([1, 2, 7, 40]),
    clip=st.sampled_from([1.0, 0.85]),
    symmetric=st.booleans(),
    spread=SPREADS,
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(80)
def test_every_backend_gives_the_same_integers_and_their_values(
    groups: int,
    group: int,
    ragged: int,
    outliers: int,
    tokens: int,
    clip: float,
    symmetric: bool,
    spread: str,
    threads: int,
    seed: int,
) -> None:
    columns = groups * group - ragged + outliers
    x = spread_out(gaussian(tokens, columns, seed=seed), spread)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    arguments = (order, outliers, group, clip, symmetric)
    expected = by_reference(x, *arguments)
    recipe = ActivationRecipe(balance="none", clip=clip, symmetric=symmetric)
    assert torch.equal(values(expected, group), dequantized(x[:, order.long()], outliers, group, recipe))
    for name, found in on_every_variant(lambda: quantize_site(x, *arguments), threads).items():
        for part, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one.dtype == other.dtype, (name, part)
            assert torch.equal(one, other), (name, part)


def test_by_hand(backend: str) -> None:
    """mu = (max - min) / 15, z = -round(min / mu); a group of one sign has a z outside 0..15, and a rest."""
    mixed = [-1.25, 0.0, 0.5, 2.5, 0.125, -0.375, 1.0, 0.26]  # mu 0.25, z 5
    positive = [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 18.0]  # mu 1, z -3
    negative = [-3.0, -3.5, -4.0, -4.5, -5.0, -5.5, -6.0, -18.0]  # mu 1, z 18: 3 more than fits
    x = torch.tensor([mixed + positive + negative + [254.0, -3.0]])
    codes, step, rest, outlier_codes, outlier_step = quantize_site(x, None, 2, 8, 1.0)
    assert step[0].tolist() == pytest.approx([0.25, 1.0, 1.0])
    assert rest.tolist() == [[0.0, 3.0, -3.0]]
    # Halves go to the even neighbour.
    assert codes[0, :8].tolist() == [-5, 0, 2, 10, 0, -2, 4, 1]
    assert codes[0, 8:16].tolist() == [0, 1, 1, 1, 2, 3, 3, 15]
    assert codes[0, 16:].tolist() == [0, -1, -1, -1, -2, -3, -3, -15]
    assert outlier_codes.tolist() == [[127, -2]]
    assert outlier_step.tolist() == [2.0]


def test_by_hand_without_a_zero_point(backend: str) -> None:
    """mu = 0.9 max|x| / 7, codes -8..7 (Atom): the largest magnitude is cut, to 7 mu or 8 mu by its sign."""
    x = torch.tensor([[7.0, -3.5, 1.0, 0.4, 0.5, -0.6, 0.0, 6.0, -7.0, 3.5, -0.9, 0.0, 0.0, 0.0, 0.0, 6.9]])
    codes, step, rest, *_ = quantize_site(x, None, 0, 8, 0.9, True)
    assert step[0].tolist() == pytest.approx([0.9, 0.9])
    assert rest.tolist() == [[0.0, 0.0]]
    assert codes.tolist() == [[7, -4, 1, 0, 1, -1, 0, 7, -8, 4, -1, 0, 0, 0, 0, 7]]


def test_batches_orders_and_views(backend: str) -> None:
    x, order = gaussian(4, 3, 50).transpose(0, 1), torch.arange(49, -1, -1, dtype=torch.int32)
    codes, step, rest, outlier_codes, outlier_step = quantize_site(x, order, 5, 16, 1.0)
    assert [tuple(part.shape) for part in (codes, step, rest)] == [(3, 4, 45), (3, 4, 3), (3, 4, 3)]
    assert outlier_codes.shape == (3, 4, 5)
    assert outlier_step.shape == (3, 4)
    alone = quantize_site(x[2, 1].flip(0), None, 5, 16, 1.0)
    for part, one in zip((codes, step, rest, outlier_codes, outlier_step), alone, strict=True):
        assert torch.equal(part[2, 1], one)
    assert [part.numel() for part in quantize_site(x[:0], order, 5, 16, 1.0)] == [0] * 5
    assert quantize_site(x, None, 0, 16, 1.0)[4].eq(0).all(), "no outliers: a step of zero, not of rubbish"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(backend: str, value: float) -> None:
    x = gaussian(3, 40)
    x[1, 20], x[2, 39] = value, value
    codes, step, rest, outlier_codes, outlier_step = quantize_site(x, None, 4, 16, 1.0)
    assert step.isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert outlier_step.isnan().tolist() == [False, False, True]
    assert not codes[1, 16:32].any()
    assert not rest[1, 1]
    assert not outlier_codes[2].any()


def test_where_fp32_holds_no_zero_point(backend: str) -> None:
    """Equal but for the last bits and far from zero: the values are off by no more than a few of these bits."""
    x = torch.full((1, 16), -3000.0) + torch.arange(16) * 2.0**-12
    found = values(quantize_site(x, None, 0, 16, 1.0), 16)
    assert (found - x).abs().max() <= 2.0**-10
    huge = torch.full((1, 16), 3.4e38)  # a zero point beyond fp32
    assert not quantize_site(huge, None, 0, 16, 1.0)[0].any()


def test_what_does_not_fit_is_refused(backend: str) -> None:
    x = gaussian(2, 40)
    with pytest.raises(ValueError, match="float32"):
        quantize_site(x.double(), None, 4, 16, 1.0)
    with pytest.raises(ValueError, match="order must be int32"):
        quantize_site(x, torch.arange(40), 4, 16, 1.0)
    for outliers, group in ((40, 16), (-1, 16), (4, 0)):
        with pytest.raises(ValueError, match="40 columns cannot have"):
            quantize_site(x, None, outliers, group, 1.0)
    assert native.native() is None or backend == native.native().chosen()
