"""The layout in which GPTQModel and AutoRound store a linear, as bench/peers/two_bits.py reads it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .twins import examples

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "peers"))

layout = pytest.importorskip("gptq_layout", reason="a source distribution has no bench/")


def word(values: list[int], bits: int) -> int:
    """The int32 that holds these, the first in its lowest bits."""
    whole = sum(value << (bits * place) for place, value in enumerate(values))
    return whole - 2**32 if whole >= 2**31 else whole


def stored(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes [inputs, outputs] and zero points [groups, outputs] in words, field by field."""
    each = 32 // bits
    down = [
        [word(codes[top : top + each, column].tolist(), bits) for column in range(codes.shape[1])]
        for top in range(0, codes.shape[0], each)
    ]
    along = [[word(row[left : left + each], bits) for left in range(0, len(row), each)] for row in zeros.tolist()]
    return {
        "qweight": torch.tensor(down, dtype=torch.int32),
        "qzeros": torch.tensor(along, dtype=torch.int32),
        "scales": scales,
    }


@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
@examples(40)
def test_weights_come_back(bits: int, groups: int, ordered: bool, less_one: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = 32 * groups, 32
    top = 2**bits
    codes = torch.randint(0, top, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, top, (groups, outputs), generator=generator)
    scales = (torch.rand(groups, outputs, generator=generator) - 0.5).half()
    parts = stored(codes, zeros, scales, bits)
    of = [channel // 32 for channel in range(inputs)]
    if not ordered:
        of = [of[place] for place in torch.randperm(inputs, generator=generator).tolist()]
        parts["g_idx"] = torch.tensor(of, dtype=torch.int32)
    found = layout.dequantize_gptq(parts, bits, int(less_one))
    assert found.shape == (outputs, inputs)
    for row, column in [(0, 0), (outputs - 1, inputs - 1), (7, inputs // 2)]:
        zero = int(zeros[of[column], row]) + less_one
        assert float(found[row, column]) == (int(codes[column, row]) - zero) * float(scales[of[column], row])
    wanted = torch.stack([(codes[c] - zeros[of[c]] - int(less_one)) * scales[of[c]].float() for c in range(inputs)])
    assert torch.equal(found, wanted.t())


def test_bits_are_those_that_a_reader_needs() -> None:
    codes, scales = torch.zeros(64, 32, dtype=torch.int64), torch.ones(2, 32, dtype=torch.float16)
    zeros = torch.randint(0, 4, (2, 32), generator=torch.Generator().manual_seed(0))
    parts = stored(codes, zeros, scales, 2)
    weights = 64 * 32
    # 2 bits a code; 16 bits of scale and 2 of zero point for 32 weights.
    assert layout.stored_bits(parts) == weights * (2 + 18 / 32)
    # Groups in order are known without being stored; others cost an int32 an input.
    assert layout.stored_bits(parts | {"g_idx": torch.arange(64) // 32}) == weights * (2 + 18 / 32)
    shuffled = (torch.arange(64) % 2).to(torch.int32)
    assert layout.stored_bits(parts | {"g_idx": shuffled}) == weights * (2 + 18 / 32) + 64 * 32
    # One zero point for all need not be stored either.
    same = stored(codes, torch.full((2, 32), 2), scales, 2)
    assert layout.stored_bits(same) == weights * (2 + 16 / 32)
    assert layout.stored_bits({"codes": torch.zeros(16, 32, dtype=torch.uint8)}) == 16 * 32 * 8


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        layout.fields(torch.zeros(1, dtype=torch.int32), 3)
