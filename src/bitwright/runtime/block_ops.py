"""The small rest of a decoder block as ops: norm and rotary embedding; fp32.

At one token each of them is a handful of torch ops of some thousand numbers, whose calls cost more than their
arithmetic. (The gated activation is not here: torch's silu and product are as fast.) Rows do not touch each other, and
results do not depend on the number of threads. Numerics are those of transformers' Llama in fp32. Native and
reference kernels; the schemas stand in schemas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime.schemas import kernel, require_float32


@kernel("rms_norm")
def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x fp32 [..., width], weight fp32 [width] -> weight * x / sqrt(mean(x^2) + eps), as LlamaRMSNorm."""
    require_float32(x=x, weight=weight)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1] if x.dim() else 1}]; found {list(weight.shape)}")
    module = native()
    if module is None:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        module.rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // width, width, torch.get_num_threads()
        )
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
rope = torch.ops.bitwright.rope.default
