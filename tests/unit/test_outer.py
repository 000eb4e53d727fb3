"""Embedding and head in integers: the rounding, the bytes, the kernel's documented order, the two modules."""

from __future__ import annotations

import copy
import math
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.artifact.layout import OuterSpec, outer_shapes
from bitwright.errors import ArtifactError
from bitwright.outer import ROWS_AT_ONCE, OuterMatrix, outer_matrix_shapes, quantize_outer
from bitwright.runtime import ops
from bitwright.runtime.outer import QuantizedEmbedding, QuantizedHead

from .backends import needs_native, on_every_variant
from .twins import gaussian

SIZES = [(5, 8, 8), (3, 41, 8), (7, 300, 128), (9, 256, 128), (2, 1, 64), (4, 129, 128), (67, 135, 64)]


def twin(weights: Tensor, bits: int, group: int) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales, one number after the other: the group's largest weight takes the code -2**(bits - 1)."""
    most = 2 ** (bits - 1)
    codes, scales = [], []
    for row in weights.double().tolist():
        codes.append([])
        scales.append([])
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min([*part, 0.0]), max([*part, 0.0])
            if len(part) == group:
                low, high = min(part), max(part)
            scale = float(np.float16(np.float32(low if -low >= high else high) / np.float32(-most)))
            scales[-1].append(scale)
            for weight in part:
                code = round(float(np.float32(weight) / np.float32(scale))) if scale else 0
                codes[-1].append(max(-most, min(most - 1, code)))
    return codes, scales


def decoded(matrix: OuterMatrix) -> list[list[int]]:
    """Codes from the stored bytes as docs/format.md has them."""
    rows = []
    for raw in matrix.codes.view(torch.uint8).tolist():
        if matrix.bits == 8:
            rows.append(list(struct.unpack(f"{len(raw)}b", bytes(raw))))
            continue
        nibbles = [raw[c // 2] >> (4 * (c % 2)) & 15 for c in range(matrix.columns)]
        rows.append([nibble - 16 if nibble > 7 else nibble for nibble in nibbles])
        if matrix.columns % 2:
            assert raw[-1] >> 4 == 0, "unused bits are 0"
    return rows


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
def test_against_the_twin(rows: int, columns: int, group: int, bits: int) -> None:
    weights = gaussian(rows, columns, seed=columns)
    weights[0] = 0.0
    weights[1, : columns // 2] *= 100
    matrix = quantize_outer(weights, bits, group)
    codes, scales = twin(weights, bits, group)
    assert decoded(matrix) == codes
    assert matrix.scales.tolist() == scales
    expected = [[code * scales[r][c // group] for c, code in enumerate(row)] for r, row in enumerate(codes)]
    assert matrix.dequantize().double().tolist() == expected
    assert {name: (t.dtype, tuple(t.shape)) for name, t in matrix.tensors().items()} == outer_matrix_shapes(
        rows, columns, bits, group
    )
    some = torch.tensor([rows - 1, 0, rows - 1])
    assert torch.equal(matrix.select(some).dequantize(), matrix.dequantize()[some])
    # Half a step, but for what lies on the far side of the largest weight and is cut off there: one step.
    steps = matrix.scales.float().abs().repeat_interleave(group, dim=1)[:, :columns]
    assert bool(((matrix.dequantize() - weights).abs() <= 1.01 * steps).all())


def test_rounding_twice_changes_nothing() -> None:
    for bits in (8, 4):
        once = quantize_outer(gaussian(9, 300), bits, 128).dequantize()
        assert torch.equal(quantize_outer(once, bits, 128).dequantize(), once)


def test_many_rows_are_those_of_each_alone() -> None:
    weights = gaussian(ROWS_AT_ONCE + 3, 16)
    whole = quantize_outer(weights.bfloat16(), 4, 8)
    last = quantize_outer(weights[-5:].bfloat16(), 4, 8)
    assert torch.equal(whole.codes[-5:], last.codes)
    assert torch.equal(whole.scales[-5:], last.scales)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_weights_that_cannot_be_stored(value: float) -> None:
    weights = gaussian(4, 20)
    weights[2, 19] = value
    with pytest.raises(ValueError, match="NaN or infinite" if abs(value) != 1e38 else "too large for an fp16 scale"):
        quantize_outer(weights, 8, 8)


def test_weights_too_small_for_a_scale_are_zero() -> None:
    assert not quantize_outer(torch.full((2, 8), 1e-9), 4, 8).dequantize().any()


# --- the kernel -------------------------------------------------------------------------------------------------------


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 numbers, rounded once: products are exact in fp64, which has bits to spare for these sums."""
    return (a.double() * b.double() + c.double()).float()


def in_order(x: Tensor, matrix: OuterMatrix) -> Tensor:
    """csrc/head/kernels.h in torch: fp32 [tokens, rows]."""
    codes = torch.tensor(decoded(matrix), dtype=torch.float32)
    total = torch.zeros(len(x), matrix.rows, 8)
    for group in range(matrix.scales.shape[1]):
        part = torch.zeros_like(total)
        for i in range(group * matrix.group, min(matrix.columns, (group + 1) * matrix.group)):
            part[..., i % 8] = fma(x[:, i, None], codes[None, :, i], part[..., i % 8])
        total = fma(part, matrix.scales[None, :, group, None].float().expand_as(part), total)
    pairs = total[..., :4] + total[..., 4:]
    fours = pairs[..., :2] + pairs[..., 2:]
    return fours[..., 0] + fours[..., 1]


def multiply(x: Tensor, matrix: OuterMatrix) -> Tensor:
    y: Tensor = ops.head_linear(x, matrix.codes, matrix.scales, matrix.group)
    return y


@needs_native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 11])
def test_all_variants_agree_to_the_last_bit(tokens: int, rows: int, columns: int, group: int, bits: int) -> None:
    matrix = quantize_outer(gaussian(rows, columns), bits, group)
    x = gaussian(tokens, columns, seed=1)
    found = on_every_variant(lambda: multiply(x, matrix), count=3)
    for name, y in found.items():
        assert torch.equal(y, found["scalar"]), name
        # A token's logits do not depend on its neighbours.
        assert torch.equal(y[-1:], on_every_variant(lambda: multiply(x[-1:], matrix))[name])
    # Rounding twice where the kernel rounds once is rare and small.
    torch.testing.assert_close(found["scalar"], in_order(x, matrix), rtol=1e-6, atol=1e-5)
    assert (found["scalar"] != in_order(x, matrix)).float().mean() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_is_the_product_with_the_dequantized_weights(backend: str, bits: int) -> None:
    matrix = quantize_outer(gaussian(67, 300), bits, 128)
    x = gaussian(2, 3, 300, seed=2)
    expected = x.double() @ matrix.dequantize().double().T
    torch.testing.assert_close(multiply(x, matrix).double(), expected, rtol=1e-5, atol=1e-4)
    assert multiply(x[:0], matrix).shape == (0, 3, 67)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 40])
def test_inputs_that_are_not_finite_give_no_finite_number(backend: str, value: float, place: int) -> None:
    matrix = quantize_outer(gaussian(9, 41), 4, 32)
    x = gaussian(5, 41)
    clean = multiply(x, matrix)
    x[2, place] = value
    y = multiply(x, matrix)
    assert not torch.isfinite(y[2]).any()
    rest = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(y[rest], clean[rest])


def test_tensors_that_do_not_belong_together(backend: str) -> None:
    matrix = quantize_outer(gaussian(9, 41), 8, 32)
    for x, codes, scales, group in (
        (gaussian(1, 40), matrix.codes, matrix.scales, 32),
        (gaussian(1, 41).double(), matrix.codes, matrix.scales, 32),
        (gaussian(1, 41), matrix.codes, matrix.scales.float(), 32),
        (gaussian(1, 41), matrix.codes, matrix.scales[:8], 32),
        (gaussian(1, 41), matrix.codes.view(torch.uint8), matrix.scales, 32),
        (gaussian(1, 41), matrix.codes, matrix.scales, 20),
        (gaussian(1, 41), matrix.codes, matrix.scales, 0),
    ):
        with pytest.raises(ValueError, match=r"must be float32|have other shapes"):
            ops.head_linear(x, codes, scales, group)


# --- the modules ------------------------------------------------------------------------------------------------------


def filled(module: QuantizedEmbedding | QuantizedHead, matrix: OuterMatrix) -> None:
    for name, tensor in matrix.tensors().items():
        setattr(module, name, tensor)


@pytest.mark.parametrize("bits", [8, 4])
def test_modules(backend: str, bits: int) -> None:
    spec = OuterSpec(rows=30, columns=41, bits=bits, group=16)
    matrix = quantize_outer(gaussian(30, 41), bits, 16)
    embedding = QuantizedEmbedding(spec, torch.bfloat16)
    filled(embedding, matrix)
    ids = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(embedding(ids), matrix.dequantize()[ids].bfloat16())
    tied = QuantizedHead(spec, torch.bfloat16, tied=embedding)
    x = gaussian(2, 41).bfloat16()
    assert torch.equal(tied(x), multiply(x.float(), matrix))
    assert not tied.state_dict()
    alone = QuantizedHead(spec, torch.float32, bias=True)
    filled(alone, matrix)
    alone.bias.copy_(torch.arange(30))
    assert torch.equal(alone(x), tied(x) + torch.arange(30))
    assert tied(x).dtype == torch.float32
    for module in (embedding, alone):
        cast = copy.deepcopy(module).to(torch.float16)
        assert torch.equal(cast.scales, matrix.scales)
        assert cast.codes.dtype == matrix.codes.dtype
        assert cast.weight.dtype == torch.float16
        cast = copy.deepcopy(module).to(torch.bfloat16)
        assert torch.equal(cast.scales, matrix.scales)
    # A copy of a tied pair is tied to its own embedding.
    both = copy.deepcopy(torch.nn.ModuleList([embedding, tied]))
    both[0].codes.zero_()
    assert not both[1](x).any()
    assert tied(x).any()


def test_shapes_and_descriptions() -> None:
    spec = OuterSpec(rows=30, columns=41, bits=4, group=16)
    assert outer_shapes("head", spec, torch.bfloat16) == {
        "head.codes": (torch.uint8, (30, 21)),
        "head.scales": (torch.float16, (30, 3)),
        "head.weight": (torch.bfloat16, (0,)),
    }
    assert OuterSpec.from_dict("head", spec.to_dict() | {"note": 1}) == spec
    for change, words in (
        ({"bits": 5}, "bits = 5"),
        ({"group": 12}, "group = 12"),
        ({"rows": 0}, "rows = 0"),
        ({"columns": "41"}, "columns = '41'"),
    ):
        with pytest.raises(ArtifactError, match=words):
            OuterSpec.from_dict("head", spec.to_dict() | change)
    with pytest.raises(ArtifactError, match="without group"):
        OuterSpec.from_dict("head", {key: value for key, value in spec.to_dict().items() if key != "group"})
