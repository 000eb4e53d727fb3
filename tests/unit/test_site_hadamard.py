"""The transform of a site's channels: against a matrix made entry by entry, undone in weights, the same in every op."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bitwright.errors import TransformError
from bitwright.runtime import to_site
from bitwright.runtime.hadamard_ops import _site_pieces, site_hadamard
from bitwright.transforms import SiteHadamard
from bitwright.transforms.hadamard import matrix

from .backends import needs_native, on_every_variant
from .twins import examples, gaussian


def whole(columns: int, normal: int, size: int, stride: int) -> Tensor:
    """The transform as a matrix, fp64 [columns, columns]: which channels meet in a block is written down one by one."""
    result = torch.eye(columns, dtype=torch.float64)
    begin, block = 0, size
    while block > 1:
        while begin + block * stride <= normal:
            h = matrix(block).double() / math.sqrt(block)
            for lane in range(stride):
                for i in range(block):
                    for j in range(block):
                        result[begin + lane + i * stride, begin + lane + j * stride] = h[i, j]
            begin += block * stride
        block = max(p for p in [1, 2, 4, 8, 16, 32, 64] if p < block) if stride == 1 else 0
    return result


CASES = [
    (64, 64, 16, 1),
    (100, 90, 32, 1),  # 64 + 16 + 8 + 2 and ten outliers
    (60, 59, 12, 1),  # a dense factor; 48 + 8 + 2 + 1
    (72, 72, 6 * 2, 6),
    (40, 40, 4, 10),
    (50, 50, 4, 5),  # the rest of a wide stride stays
    (9, 5, 64, 1),
    (7, 0, 8, 1),
]


@pytest.mark.parametrize(("columns", "normal", "size", "stride"), CASES)
def test_against_the_matrix(backend: str, columns: int, normal: int, size: int, stride: int) -> None:
    x, order = gaussian(3, 2, columns), torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ whole(columns, normal, size, stride)
    site = SiteHadamard(size, stride, normal)
    torch.testing.assert_close(site.apply(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(site.apply(site.apply(x)), x, rtol=1e-5, atol=1e-5)
    found = site_hadamard(x, None, size, stride, normal)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found = site_hadamard(x, order.int(), size, stride, normal)
    assert torch.equal(found, site_hadamard(x[..., order], None, size, stride, normal))


@needs_native
@given(
    size=st.sampled_from([1, 2, 8, 12, 32, 128]),
    stride=st.sampled_from([1, 1, 3]),
    columns=st.integers(1, 300),
    share=st.floats(0, 1),
    count=st.integers(1, 3),
    rows=st.integers(0, 4),
)
@examples(80)
def test_all_variants_agree_to_the_last_bit(
    size: int, stride: int, columns: int, share: float, count: int, rows: int
) -> None:
    normal = int(columns * share)
    x, order = gaussian(rows, columns, seed=columns), torch.randperm(columns).int()
    expected = _site_pieces(x, order, SiteHadamard(size, stride, normal))
    for name, found in on_every_variant(lambda: site_hadamard(x, order, size, stride, normal), count).items():
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("size", [32, 12])
def test_logits_stay_what_they_are(backend: str, size: int) -> None:
    """In full precision: every linear of a model with outliers set aside, its weights and its inputs transformed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=72,
        intermediate_size=140,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(0, 60, (2, 20))
    with torch.inference_mode():
        expected = model(ids).logits
        for name, linear in model.model.layers.named_modules():
            if isinstance(linear, torch.nn.Linear):
                columns = linear.in_features
                order = torch.randperm(columns)
                site = SiteHadamard(size, 1, columns - 7)
                linear.weight.data = site.apply(linear.weight.data[:, order])

                def hook(_: object, args: tuple[Tensor, ...], order: Tensor, site: SiteHadamard) -> tuple[Tensor, ...]:
                    (x,) = args
                    return (to_site(x.flatten(0, 1), order, site).view_as(x),)

                handle = linear.register_forward_pre_hook(partial(hook, order=order, site=site))
                assert handle, name
        found = model(ids).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_what_does_not_fit_is_refused(backend: str) -> None:
    x = gaussian(2, 28)
    with pytest.raises(TransformError, match="no Hadamard matrix of size 14"):
        site_hadamard(x, None, 14, 1, 28)
    with pytest.raises(ValueError, match="28 columns have no blocks of 4 x 1 in 29 normal channels"):
        site_hadamard(x, None, 4, 1, 29)
    with pytest.raises(ValueError, match="blocks of 0 x 1"):
        site_hadamard(x, None, 0, 1, 28)
    with pytest.raises(ValueError, match=r"order must be int32 \[28\]"):
        site_hadamard(x, torch.arange(28), 4, 1, 28)
    with pytest.raises(ValueError, match="float32"):
        site_hadamard(x.double(), None, 4, 1, 28)
