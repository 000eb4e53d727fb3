"""What the boolean product has of its own: the quantizer of bit planes, the bounds of its counts, its refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe
from bitwright.runtime import plane_ops, planes

from .backends import VARIANTS, module, needs_native, on_every_variant, restore
from .test_site_products import SPREADS, Product, a_matrix, spread_out
from .twins import examples, gaussian

BALANCES = plane_ops.BALANCES


@needs_native
@given(
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 24, 128, 136]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 1, 16]),
    balance=st.sampled_from(BALANCES),
    clip=st.sampled_from([1.0, 0.85]),
    spread=SPREADS,
    seed=st.integers(0, 1000),
)
@examples(40)
def test_quantizer_is_the_one_in_torch(
    groups: int, group: int, ragged: int, outliers: int, balance: Any, clip: float, spread: str, seed: int
) -> None:
    normal, tokens = groups * group - ragged, 4
    x = spread_out(gaussian(tokens, normal + outliers, seed=seed), spread)
    expected = quantize_groups(x[:, :normal], group, ActivationRecipe(balance=balance, clip=clip))
    results = list(on_every_variant(lambda: run_quantizer(x, outliers, group, balance, clip)).values())
    for found in results:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)
    words, ones, scales, offset, integers, outlier_step = results[0]
    bits = (words.to(torch.int32).unsqueeze(-1) >> torch.arange(16, dtype=torch.int32)) & 1
    bits = bits.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-3, -2)  # [groups, tokens, group, planes]
    codes = (bits * torch.tensor([1, 2, 4, 8])).sum(dim=-1)
    assert torch.equal(codes.transpose(0, 1), expected.codes.to(torch.int64))
    assert torch.equal(ones.to(torch.int64).sum(dim=2), bits.sum(dim=2))
    assert torch.equal(offset.T, (-expected.step * expected.zero).squeeze(-1))
    if expected.plane_scales is None:
        assert torch.equal(scales.transpose(0, 1), expected.step * torch.tensor([1.0, 2.0, 4.0, 8.0]))
    else:
        # The sums of rounding errors run in another order there.
        torch.testing.assert_close(scales.transpose(0, 1), expected.plane_scales, rtol=2e-6, atol=0)
    if outliers:
        expected_integers, expected_step = quantize_outliers(x[:, normal:])
        assert torch.equal(integers[:, :outliers].to(torch.float32), expected_integers)
        assert torch.equal(outlier_step, expected_step.squeeze(-1))


def run_quantizer(x: Tensor, outliers: int, group: int, balance: str, clip: float) -> list[Tensor]:
    """words [groups, tokens, group / 4], ones [groups, tokens, parts, 4], scales, offset; outlier integers, steps."""
    tokens, columns = x.shape
    groups = -(-(columns - outliers) // group)
    words = torch.full((groups, tokens, group // 4), -1, dtype=torch.int16)
    ones = torch.full((groups, tokens, -(-group // 128), 4), 255, dtype=torch.uint8)
    scales, offset = torch.empty(groups, tokens, 4), torch.empty(groups, tokens)
    integers = torch.zeros(tokens, -(-outliers // 4) * 4, dtype=torch.int8)
    outlier_step, outlier_shift = torch.zeros(tokens), torch.zeros(tokens, dtype=torch.int32)
    out = [words, ones, scales, offset, integers, outlier_step, outlier_shift]
    number = {"none": 0, "support": 1, "literal": 2}[balance]
    sizes = (tokens, columns, outliers, group)
    module.quantize_planes(x.data_ptr(), *sizes, 0, (1 - clip) / 2, number, *(part.data_ptr() for part in out))
    return out[:-1]


@needs_native
def test_extreme_levels_are_exact() -> None:
    """Counts, their products and sums at their bounds: nothing saturates, in any variant."""
    codes = torch.randint(0, 4, (64, 512), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes[:32] = torch.arange(32, dtype=torch.uint8).unsqueeze(1) // 8  # rows of one code alone
    levels = torch.tensor([-128, 127], dtype=torch.int8)[
        torch.randint(0, 2, (64, 2, 4), generator=torch.Generator().manual_seed(2))
    ]
    matrix = CodebookMatrix(
        64, 512, 2, 256, "free", planes.pack_planes(codes, 2), torch.ones(64, 2, dtype=torch.float16), levels
    )
    x = torch.cat([torch.zeros(1, 512), torch.full((1, 512), 15.0)])
    x[:, ::256] = torch.tensor([[15.0], [0.0]])  # codes 15 in one channel a group, and in all but one
    expected = x.double() @ matrix.dequantize().double().T  # integers below 2**24: fp32 is exact
    for balance in BALANCES:
        for name, found in on_every_variant(partial(Product(planes, balance), x, matrix)).items():
            assert torch.equal(found.double(), expected), name


@needs_native
def test_a_variant_of_the_byte_kernels_has_one_here() -> None:
    runs_here = {"avx512", "avx2", "neon", "scalar", "avx512-emulated"}
    try:
        for name in VARIANTS:
            module.choose(name)
            assert module.chosen_planes() in runs_here
        module.choose("scalar")
        assert module.chosen_planes() == "scalar"
    finally:
        restore()


def test_balances_and_groups_that_do_not_exist_are_refused(backend: str) -> None:
    packed, x = planes.pack(a_matrix(20, 100, 4, 32)), gaussian(2, 100)
    with pytest.raises(ValueError, match="balance must be one of support, literal, none; found 'fair'"):
        plane_ops.site_planes(x, packed, None, None, 20, 4, 32, 1.0, "fair")
    with pytest.raises(ValueError, match="multiple of 8; found 12"):
        plane_ops.site_planes(x, packed, None, None, 20, 4, 12, 1.0, "none")
