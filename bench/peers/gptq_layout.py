"""What other tools store for a linear layer: its weights again, and the bits that it needs. Torch alone.

GPTQ's layout, which GPTQModel and AutoRound write: `qweight` int32 [inputs * bits / 32, outputs] and `qzeros` int32
[groups, outputs * bits / 32], fields from the lowest bit up, along the first dimension in the one and along the last in
the other; `scales` fp16 [groups, outputs]; `g_idx` int32 [inputs], the group of each input, where the file has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def fields(words: Tensor, bits: int) -> Tensor:
    """int32 [..., words] -> int64 [..., words * 32 / bits], unsigned."""
    if 32 % bits:
        raise ValueError(f"fields of {bits} bits do not fill a word of 32")
    shifts = torch.arange(0, 32, bits)
    unpacked = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return unpacked.flatten(-2)


def groups_in_order(inputs: int, groups: int) -> Tensor:
    """int64 [inputs]: the group of each input where groups are of consecutive inputs, which needs no storage."""
    return torch.arange(inputs) // (inputs // groups)


def dequantize_gptq(parts: dict[str, Tensor], bits: int, zero_offset: int) -> Tensor:
    """fp32 [outputs, inputs] from the parts of one layer; `zero_offset` is 1 where zero points are stored less one."""
    codes = fields(parts["qweight"].t(), bits).t()
    zeros = fields(parts["qzeros"], bits) + zero_offset
    scales = parts["scales"].float()
    group = groups_in_order(codes.shape[0], scales.shape[0])
    if "g_idx" in parts:
        group = parts["g_idx"].to(torch.int64)
    return ((codes - zeros[group]) * scales[group]).t().contiguous()


def stored_bits(parts: dict[str, Tensor]) -> int:
    """Bits that the parts of one layer take, as they are stored.

    Two are not counted, to the tool's favour, where a reader could do without: groups that are in order, and zero
    points whose words are all the same (a symmetric grid).
    """
    needed = dict(parts)
    if "g_idx" in parts:
        group = parts["g_idx"].to(torch.int64)
        if torch.equal(group, groups_in_order(len(group), parts["scales"].shape[0])):
            del needed["g_idx"]
    if "qzeros" in parts and int(parts["qzeros"].min()) == int(parts["qzeros"].max()):
        del needed["qzeros"]
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in needed.values())
