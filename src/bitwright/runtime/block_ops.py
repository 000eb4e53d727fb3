"""The small rest of a decoder block as ops: norm, rotary embedding, gated activation; fp32.

At one token each of them is a handful of torch ops of some thousand numbers, whose calls cost more than their
arithmetic. Rows do not touch each other, and results do not depend on the number of threads. Numerics are those of
transformers' Llama in fp32. Native and reference kernels; the schemas stand in schemas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime.schemas import kernel, require_float32


@kernel("rms_norm")
def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x fp32 [..., width], weight fp32 [width] -> weight * x / sqrt(mean(x^2) + eps), as LlamaRMSNorm."""
    _check_norm(x, weight)
    if native() is None:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    x = x.contiguous()
    normed = torch.empty_like(x)
    _run_norm(x, None, weight, eps, None, normed)
    return normed


@kernel("add_rms_norm")
def add_rms_norm_eager(x: Tensor, add: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and add fp32 [..., width] -> (x + add, its rms_norm): the residual stream behind a product, and its norm."""
    _check_norm(x, weight)
    require_float32(add=add)
    if add.shape != x.shape:
        raise ValueError(f"add must be {list(x.shape)} as x; found {list(add.shape)}")
    if native() is None:
        total = x + add
        return total, rms_norm_eager(total, weight, eps)
    x, add = x.contiguous(), add.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _run_norm(x, add, weight, eps, total, normed)
    return total, normed


def _check_norm(x: Tensor, weight: Tensor) -> None:
    require_float32(x=x, weight=weight)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1] if x.dim() else 1}]; found {list(weight.shape)}")


def _run_norm(x: Tensor, add: Tensor | None, weight: Tensor, eps: float, total: Tensor | None, normed: Tensor) -> None:
    module, width = native(), x.shape[-1]
    if module is None or not x.numel():
        return
    weight = weight.contiguous()
    module.rms_norm(
        x.data_ptr(),
        0 if add is None else add.data_ptr(),
        weight.data_ptr(),
        eps,
        0 if total is None else total.data_ptr(),
        normed.data_ptr(),
        x.numel() // width,
        width,
        torch.get_num_threads(),
    )


@kernel("gated")
def gated_eager(x: Tensor, up: int, size: int) -> Tensor:
    """x fp32 [..., columns] -> silu(x[..., :size]) * x[..., up : up + size] (SwiGLU), silu(v) = v / (1 + exp(-v))."""
    require_float32(x=x)
    if x.dim() < 1 or not 0 < size <= up or up + size > x.shape[-1]:
        raise ValueError(f"x {list(x.shape)} has no gate in its first {size} columns and as many from {up} on")
    module = native()
    if module is None:
        return torch.nn.functional.silu(x[..., :size]) * x[..., up : up + size]
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], size), dtype=torch.float32)
    columns = x.shape[-1]
    module.gated(x.data_ptr(), x.numel() // columns, columns, up, size, y.data_ptr(), torch.get_num_threads())
    return y


@kernel("rope")
def rope_eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x fp32 [tokens, heads, head_dim], cos and sin fp32 [tokens, head_dim] -> x rotated, contiguous.

    The half-split rotation of transformers' apply_rotary_pos_emb: x cos + (-second half, first half) sin. `x` may be a
    view into a wider tensor, as long as head_dim is contiguous.
    """
    require_float32(x=x, cos=cos, sin=sin)
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x must be [tokens, heads, head_dim] with an even head_dim; found {list(x.shape)}")
    tokens, heads, head_dim = x.shape
    if cos.shape != (tokens, head_dim) or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [{tokens}, {head_dim}]; found {list(cos.shape)} and {list(sin.shape)}")
    module = native()
    if module is None:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty((tokens, heads, head_dim), dtype=torch.float32)
    module.rope(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        head_dim,
        torch.get_num_threads(),
    )
    return y


rms_norm = torch.ops.bitwright.rms_norm.default
add_rms_norm = torch.ops.bitwright.add_rms_norm.default
gated = torch.ops.bitwright.gated.default
rope = torch.ops.bitwright.rope.default
