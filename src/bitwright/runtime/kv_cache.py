"""The quantized key-value cache: append-only, asymmetric, one scale and one minimum a token and head.

Keys are quantized *after* RoPE. The paper follows Atom and quantizes them before; the cache interface of transformers
hands over rotated keys and no angles, and undoing the rotation for every cached token at every step would cost more
than the attention. RoPE turns pairs of channels by the same angle, so the range of a head changes little.

A token's record for one head is bytes: the codes, two to a byte at 4 bits (channel 2 j in the low nibble), then scale
and minimum as fp16. Because a record is one row of a uint8 tensor, everything that transformers does to a dynamic cache
(crop, beam reordering, batch selection, offloading) works on it unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from bitwright.recipe import KVRecipe

_FP16_MAX = 65504.0


def encode(states: Tensor, bits: int) -> Tensor:
    """Float [..., head_dim] -> uint8 records [..., bytes]."""
    x = states.to(torch.float32).clamp(-_FP16_MAX, _FP16_MAX)
    top = 2**bits - 1
    # Plus zero: of two zeros the smallest value may be either, and the bytes should not depend on it.
    low = x.amin(dim=-1, keepdim=True).to(torch.float16) + 0.0
    span = x.amax(dim=-1, keepdim=True) - low.float()
    scale = (span / top).clamp_min(6e-8).to(torch.float16)
    codes = torch.round((x - low.float()) / scale.float()).clamp(0, top).to(torch.uint8)
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return torch.cat([codes, torch.cat([scale, low], dim=-1).view(torch.uint8)], dim=-1)


def decode(records: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """uint8 records [..., bytes] -> [..., head_dim] in `dtype`."""
    # Copied also where it is contiguous, as in a single record: there it may begin at an odd byte.
    tail = records[..., -4:].clone(memory_format=torch.contiguous_format)
    codes, parameters = records[..., :-4], tail.view(torch.float16).float()
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :head_dim]
    return (codes.float() * parameters[..., 0:1] + parameters[..., 1:2]).to(dtype)


class QuantizedKVLayer(DynamicLayer):
    """One layer of the cache; `keys` and `values` hold uint8 records [batch, heads, tokens, bytes]."""

    def __init__(self, bits: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bits = bits

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append float states [batch, heads, new, head_dim]; returns all of them, dequantized, in the same dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, encode(key_states, self.bits)], dim=-2)
        self.values = torch.cat([self.values, encode(value_states, self.bits)], dim=-2)
        return (
            decode(self.keys, key_states.shape[-1], self.bits, key_states.dtype),
            decode(self.values, value_states.shape[-1], self.bits, value_states.dtype),
        )


class QuantizedKVCache(Cache):
    """A cache for `past_key_values`, with a layer of `kv.bits` bits for each of the model's `layers` decoder blocks."""

    def __init__(self, layers: int, kv: KVRecipe) -> None:
        super().__init__(layers=[QuantizedKVLayer(kv.bits) for _ in range(layers)])

    def stored_bytes(self) -> int:
        """Bytes that the cached tokens take."""
        parts = (
            part for layer in self.layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        )
        return sum(part.numel() for part in parts if part is not None)
