"""The Hadamard transforms as ops: native and reference kernels; the schemas stand in schemas.py."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime.schemas import kernel
from bitwright.transforms import SiteHadamard
from bitwright.transforms.hadamard import Factors, butterflies, dense_factor, dense_steps, factors


def _check(x: Tensor, block: int) -> Factors:
    if x.dtype != torch.float32 or x.dim() < 1:
        raise ValueError(f"x must be float32 [..., columns]; found {x.dtype} {list(x.shape)}")
    if block < 1 or x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of blocks of {block}")
    return factors(block)


@lru_cache(maxsize=64)
def signs(order: int) -> Tensor:
    """uint8 [order, order / 4] of a dense factor: 16 times the signs of four columns, bit j for column 4 g + j."""
    negative = (dense_factor(order) < 0).to(torch.uint8).unflatten(-1, (-1, 4))
    return (negative * torch.tensor([16, 32, 64, 128], dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


@kernel("hadamard")
def _hadamard(x: Tensor, block: int) -> Tensor:
    """x fp32 [..., columns] -> the same shape, each `block` consecutive columns times H / sqrt(block).

    H is the symmetric matrix of `bitwright.transforms.hadamard.matrix`, for powers of two Sylvester's; the transform is
    its own inverse. Raises TransformError for a size that has none.
    """
    parts = _check(x, block)
    module = native()
    if module is None:
        return _hadamard_reference(x, block)
    x = x.contiguous()
    y = torch.empty_like(x)
    threads = torch.get_num_threads()
    module.hadamard(x.data_ptr(), y.data_ptr(), x.numel() // parts.power, parts.power, 1.0 / math.sqrt(block), threads)
    for order, inner in dense_steps(parts):
        count = x.numel() // (order * inner)
        # Held by a name: of two threads that make it at the same time, only one's tensor is in the cache.
        table = signs(order)
        module.signed_sums(y.data_ptr(), count, order, inner, table.data_ptr(), threads)
    return y


def _hadamard_reference(x: Tensor, block: int) -> Tensor:
    """The same float operations as the native kernels (csrc/decoder.h): scaled, butterflies, then sums of four."""
    parts = _check(x, block)
    y = butterflies(x * torch.tensor(1.0 / math.sqrt(block), dtype=torch.float32), parts.power)
    for order, inner in dense_steps(parts):
        y = _signed_sums(y.unflatten(-1, (-1, order, inner)), signs(order)).flatten(-3)
    return y


def _signed_sums(values: Tensor, signs: Tensor) -> Tensor:
    """values [..., order, inner] by the matrix of `signs`, summed as `signed_sums` of csrc/decoder.h does."""
    x0, x1, x2, x3 = values.unflatten(-2, (-1, 4)).unbind(-2)  # [..., groups, inner]
    low = torch.stack([x0 + x1, x1 - x0, x0 - x1, -(x0 + x1)], dim=-2)
    high = torch.stack([x2 + x3, x3 - x2, x2 - x3, -(x2 + x3)], dim=-2)
    tables = (low.unsqueeze(-3) + high.unsqueeze(-2)).flatten(-3, -2)  # [..., groups, sign, inner]
    entries = (signs // 16).to(torch.int64)
    total = tables[..., 0, :, :].index_select(-2, entries[:, 0])
    for group in range(1, entries.shape[1]):
        total = total + tables[..., group, :, :].index_select(-2, entries[:, group])
    return total


@kernel("site_hadamard")
def site_hadamard_eager(x: Tensor, order: Tensor | None, size: int, stride: int, normal: int) -> Tensor:
    """x fp32 [..., columns] in the model's channel order -> the same shape, in site order and transformed.

    `order` is int32 [columns] or None; what is done to the first `normal` channels says transforms.SiteHadamard. Raises
    ValueError for what does not fit, TransformError for a size without a Hadamard matrix.
    """
    if x.dtype != torch.float32 or x.dim() < 1:
        raise ValueError(f"x must be float32 [..., columns]; found {x.dtype} {list(x.shape)}")
    columns = x.shape[-1]
    if order is not None and (order.dtype != torch.int32 or order.shape != (columns,)):
        raise ValueError(f"order must be int32 [{columns}]; found {order.dtype} {list(order.shape)}")
    if size < 1 or stride < 1 or not 0 <= normal <= columns:
        raise ValueError(f"{columns} columns have no blocks of {size} x {stride} in {normal} normal channels")
    module = native()
    if module is None or stride > 1 or size & (size - 1):
        return _site_pieces(x, order, SiteHadamard(size, stride, normal))
    x = x.contiguous()
    y = torch.empty_like(x)
    order = None if order is None else order.contiguous()
    module.site_hadamard(
        x.data_ptr(),
        0 if order is None else order.data_ptr(),
        y.data_ptr(),
        x.numel() // columns if columns else 0,
        columns,
        normal,
        size,
        torch.get_num_threads(),
    )
    return y


def _site_pieces(x: Tensor, order: Tensor | None, site: SiteHadamard) -> Tensor:
    """By the op of whole blocks: the same float operations."""
    y = x.clone() if order is None else x.index_select(-1, order)
    for begin, end, size in site.pieces():
        values = y[..., begin:end]
        if site.stride > 1:
            turned = values.unflatten(-1, (-1, size, site.stride)).transpose(-1, -2).contiguous()
            y[..., begin:end] = _hadamard(turned, size).transpose(-1, -2).flatten(-3)
        else:
            y[..., begin:end] = _hadamard(values, size)
    return y


hadamard = torch.ops.bitwright.hadamard.default
site_hadamard = torch.ops.bitwright.site_hadamard.default
