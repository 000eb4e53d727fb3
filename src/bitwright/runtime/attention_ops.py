"""Ops on the quantized cache: append to it, and attend to it without dequantizing it whole.

Both work on records (bitwright.runtime.kv_cache) in a buffer that is allocated once, uint8 [heads, capacity, bytes],
so that a decode step neither copies nor decodes what is cached already. Native and reference kernels; the
schemas stand in schemas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.runtime.block_ops import rope_eager
from bitwright.runtime.kv_cache import decode, encode, record_bytes
from bitwright.runtime.schemas import kernel, require_float32


def _check_records(name: str, records: Tensor, head_dim: int, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8; found {bits}")
    expected = record_bytes(head_dim, bits)
    if records.dtype != torch.uint8 or records.dim() != 3 or records.shape[2] != expected:
        raise ValueError(
            f"{name} must be uint8 [heads, capacity, {expected}] for {bits} bits and head_dim {head_dim};"
            f" found {records.dtype} {list(records.shape)}"
        )
    if not records.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _check_clip(clip: float) -> None:
    if not 0.0 < clip <= 1.0:
        raise ValueError(f"clip must be above 0 and at most 1; found {clip}")


def _check_states(name: str, states: Tensor) -> None:
    if states.dtype != torch.float32 or states.dim() != 3 or states.shape[2] < 1:
        raise ValueError(f"{name} must be float32 [heads, tokens, head_dim]; found {states.dtype} {list(states.shape)}")


@kernel("kv_append")
def kv_append_eager(records: Tensor, states: Tensor, position: int, bits: int, clip: float = 1.0) -> None:
    """states fp32 [heads, new, head_dim] -> records [:, position : position + new], in place.

    The bytes are those of kv_cache.encode. `states` may be a transposed view, as long as head_dim is contiguous.
    """
    _check_states("states", states)
    heads, tokens, head_dim = states.shape
    _check_records("records", records, head_dim, bits)
    if records.shape[0] != heads or position < 0 or position + tokens > records.shape[1]:
        raise ValueError(
            f"states of {heads} heads and {tokens} tokens do not fit at position {position} of"
            f" {records.shape[0]} heads and a capacity of {records.shape[1]}"
        )
    _check_clip(clip)
    module = native()
    if module is None:
        records[:, position : position + tokens] = encode(states, bits, clip)
        return
    if states.stride(2) != 1:
        states = states.contiguous()
    module.kv_append(
        states.data_ptr(),
        states.stride(0),
        states.stride(1),
        tokens,
        position,
        records.data_ptr(),
        heads,
        records.shape[1],
        head_dim,
        bits,
        (1.0 - clip) / 2.0,
        torch.get_num_threads(),
    )


@kernel("kv_attention")
def kv_attention_eager(
    queries: Tensor, keys: Tensor, values: Tensor, length: int, scale: float, window: int, bits: int
) -> Tensor:
    """Causal attention of queries fp32 [query heads, new, head_dim] over the first `length` tokens of the cache.

    The queries are the last `new` of these tokens; their own keys and values were appended before. keys and values
    are records uint8 [heads, capacity, bytes]; consecutive query heads share a head of the cache. A query sees
    `window` tokens, itself included (0: all). Returns fp32 [new, query heads, head_dim], as the output projection
    reads it.
    """
    _check_states("queries", queries)
    heads_q, tokens, head_dim = queries.shape
    _check_records("keys", keys, head_dim, bits)
    _check_records("values", values, head_dim, bits)
    heads, capacity, _ = keys.shape
    if keys.shape != values.shape:
        raise ValueError(f"keys and values must have one shape; found {list(keys.shape)} and {list(values.shape)}")
    if heads < 1 or heads_q % heads:
        raise ValueError(f"{heads_q} query heads are no multiple of the {heads} heads of the cache")
    if not tokens <= length <= capacity:
        raise ValueError(f"length must lie between {tokens} new tokens and the capacity {capacity}; found {length}")
    if window < 0:
        raise ValueError(f"window must be 0 (none) or a number of tokens; found {window}")
    module = native()
    if module is None:
        return _kv_attention_reference(queries, keys, values, length, scale, window, bits)
    if queries.stride(2) != 1:
        queries = queries.contiguous()
    y = torch.empty((tokens, heads_q, head_dim), dtype=torch.float32)
    if y.numel():
        module.kv_attention(
            queries.data_ptr(),
            queries.stride(0),
            queries.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            heads,
            capacity,
            head_dim,
            bits,
            heads_q // heads,
            tokens,
            length,
            window,
            scale,
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y


def _kv_attention_reference(
    queries: Tensor, keys: Tensor, values: Tensor, length: int, scale: float, window: int, bits: int
) -> Tensor:
    heads_q, tokens, head_dim = queries.shape
    group = heads_q // keys.shape[0]
    k, v = (
        decode(records[:, :length], head_dim, bits, torch.float32).repeat_interleave(group, dim=0)
        for records in (keys, values)
    )
    key, query = torch.arange(length), torch.arange(length - tokens, length).unsqueeze(1)
    seen = key <= query
    if window:
        seen &= key > query - window
    y = torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=seen, scale=scale)
    return y.transpose(0, 1).contiguous()


@kernel("attention_step")
def attention_step_eager(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int,
    query_heads: int,
    key: int,
    value: int,
    scale: float,
    window: int,
    bits: int,
    clip: float = 1.0,
) -> Tensor:
    """All that a decode step does between the projections of a block: rope, kv_append twice, kv_attention, in one call.

    x fp32 [new, columns] holds the queries of `query_heads` heads in its first columns, the keys and values of the
    cache's heads from the columns `key` and `value` on; cos and sin fp32 [new, head_dim]. keys and values are records
    uint8 [heads, capacity, bytes] that get the new tokens at `position`, in place. Returns fp32 [new, query heads,
    head_dim]. The numbers are those of the single ops.
    """
    require_float32(x=x, cos=cos, sin=sin)
    tokens, head_dim = cos.shape
    _check_records("keys", keys, head_dim, bits)
    _check_records("values", values, head_dim, bits)
    heads, capacity, _ = keys.shape
    if keys.shape != values.shape or heads < 1 or query_heads < 1 or query_heads % heads:
        raise ValueError(
            f"{query_heads} query heads do not fit keys {list(keys.shape)} and values {list(values.shape)}"
        )
    if x.dim() != 2 or x.shape[0] != tokens or sin.shape != cos.shape or head_dim % 2:
        raise ValueError(f"x {list(x.shape)} does not fit cos {list(cos.shape)} and sin {list(sin.shape)}")
    last = x.shape[1] - heads * head_dim
    if not (query_heads * head_dim <= x.shape[1] and 0 <= key <= last and 0 <= value <= last):
        raise ValueError(f"x of {x.shape[1]} columns has no {heads} heads of {head_dim} at {key} and {value}")
    if position < 0 or position + tokens > capacity or window < 0:
        raise ValueError(f"{tokens} tokens at {position}, window {window}, do not fit a capacity of {capacity}")
    _check_clip(clip)
    module = native()
    if module is None:
        q, k, v = (
            x[:, at : at + count * head_dim].unflatten(1, (-1, head_dim))
            for at, count in ((0, query_heads), (key, heads), (value, heads))
        )
        kv_append_eager(keys, rope_eager(k, cos, sin).transpose(0, 1), position, bits, clip)
        kv_append_eager(values, v.transpose(0, 1), position, bits, clip)
        q, length = rope_eager(q, cos, sin).transpose(0, 1), position + tokens
        return _kv_attention_reference(q, keys, values, length, scale, window, bits)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty((tokens, query_heads, head_dim), dtype=torch.float32)
    if tokens:
        module.attention_step(
            x.data_ptr(),
            tokens,
            x.shape[1],
            query_heads,
            key,
            value,
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            heads,
            capacity,
            head_dim,
            bits,
            position,
            (1.0 - clip) / 2.0,
            window,
            scale,
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y


kv_append = torch.ops.bitwright.kv_append.default
kv_attention = torch.ops.bitwright.kv_attention.default
attention_step = torch.ops.bitwright.attention_step.default
