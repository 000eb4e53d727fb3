"""The Hadamard transform as an op: native and reference kernel; the schema stands in schemas.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime.schemas import kernel


def _check(x: Tensor, block: int) -> None:
    if x.dtype != torch.float32 or x.dim() < 1:
        raise ValueError(f"x must be float32 [..., columns]; found {x.dtype} {list(x.shape)}")
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two; found {block}")
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of blocks of {block}")


@kernel("hadamard")
def _hadamard(x: Tensor, block: int) -> Tensor:
    """x fp32 [..., columns] -> the same shape, each `block` consecutive columns times H / sqrt(block).

    H is the Sylvester matrix, H[i, j] = (-1)^popcount(i & j); the transform is its own inverse.
    """
    _check(x, block)
    module = native()
    if module is None:
        return _hadamard_reference(x, block)
    x = x.contiguous()
    y = torch.empty_like(x)
    module.hadamard(x.data_ptr(), y.data_ptr(), x.numel() // block, block, torch.get_num_threads())
    return y


def _hadamard_reference(x: Tensor, block: int) -> Tensor:
    """The same float operations as the native kernels: scaled first, then butterflies of distance 1, 2, 4, ..."""
    y = x * torch.tensor(1.0 / math.sqrt(block), dtype=torch.float32)
    distance = 1
    while distance < block:
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return y


hadamard = torch.ops.bitwright.hadamard.default
