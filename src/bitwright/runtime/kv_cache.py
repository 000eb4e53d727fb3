"""The quantized key-value cache: append-only, asymmetric, one scale and one minimum a token and head.

Keys are quantized *after* RoPE. The paper follows Atom and quantizes them before; the cache interface of transformers
hands over rotated keys and no angles, and undoing the rotation for every cached token at every step would cost more
than the attention. RoPE turns pairs of channels by the same angle, so the range of a head changes little.

Keys may be cached times a Hadamard matrix, which spreads what a few channels hold over all of them (QuaRot, section 4:
attention is the same where the queries are turned, too, or the keys back).

A token's record for one head is bytes: the codes one behind the other, least significant bit first, without gaps (at 4
bits two to a byte, channel 2 j in the low nibble), then scale and minimum as fp16. Because a record is one row of a
uint8 tensor, everything that transformers does to a dynamic cache (crop, beam reordering, batch selection, offloading)
works on it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from bitwright.recipe import KVRecipe
from bitwright.runtime.hadamard_ops import hadamard
from bitwright.transforms.hadamard import largest_block, transform

_FP16_MAX = 65504.0


def record_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one token's record for one head."""
    return (head_dim * bits + 7) // 8 + 4


def encode(states: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Float [..., head_dim] -> uint8 records [..., bytes]; the codes span the share `clip` of a record's range."""
    x = states.to(torch.float32).clamp(-_FP16_MAX, _FP16_MAX)
    top = 2**bits - 1
    lowest, highest = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if clip != 1.0:
        cut = (highest - lowest) * ((1.0 - clip) / 2.0)
        lowest, highest = lowest + cut, highest - cut
    # Plus zero: of two zeros the smallest value may be either, and the bytes should not depend on it.
    low = lowest.to(torch.float16) + 0.0
    span = highest - low.float()
    scale = (span / top).clamp_min(6e-8).to(torch.float16)
    codes = torch.round((x - low.float()) / scale.float()).clamp(0, top).to(torch.uint8)
    codes = _packed(codes, bits)
    # Cloned, not contiguous(): of no tokens at all, that keeps strides which cannot be viewed as bytes.
    parameters = [part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in (scale, low)]
    return torch.cat([codes, *parameters], dim=-1)


def decode(records: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """uint8 records [..., bytes] -> [..., head_dim] in `dtype`."""
    # Copied also where it is contiguous, as in a single record: there it may begin at an odd byte.
    tail = records[..., -4:].clone(memory_format=torch.contiguous_format)
    codes, parameters = records[..., :-4], tail.view(torch.float16).float()
    codes = _unpacked(codes, head_dim, bits)
    return (codes.float() * parameters[..., 0:1] + parameters[..., 1:2]).to(dtype)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., channels] -> uint8 [..., ceil(channels * bits / 8)]: code i from bit i * bits on."""
    if bits == 8:
        return codes
    size = (codes.shape[-1] * bits + 7) // 8
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    # Eight codes fill `bits` whole bytes.
    eights = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    words = (eights << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(dim=-1, keepdim=True)
    whole = words >> torch.arange(0, 8 * bits, 8, device=codes.device)
    return (whole & 255).to(torch.uint8).flatten(-2)[..., :size]


def _unpacked(packed: Tensor, channels: int, bits: int) -> Tensor:
    """Undoes `_packed`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :channels]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    words = (padded << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(dim=-1, keepdim=True)
    codes = words >> torch.arange(0, 8 * bits, bits, device=packed.device)
    return (codes & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :channels]


class _Records:
    """Records [batch, heads, tokens, bytes] at the front of a buffer with room for more, so that a token costs a token.

    The cache's methods (crop, reorder, select) replace the visible tensor; the next append sees that it is another one
    and begins a new buffer with it.
    """

    FIRST = 256  # tokens of room at the start; the room doubles

    def __init__(self) -> None:
        self.room: Tensor | None = None

    def append(self, seen: Tensor, new: Tensor) -> Tensor:
        """`seen` with `new` behind it along the tokens."""
        room, length = self.reserve(seen, new.shape)
        total = length + new.shape[-2]
        room[..., length:total, :] = new
        return room[..., :total, :]

    def reserve(self, seen: Tensor, new: Sequence[int]) -> tuple[Tensor, int]:
        """The buffer with `seen` at its front and room for `new` [batch, heads, tokens, bytes]; the tokens seen.

        Raises ValueError for records of another batch, number of heads or size than those seen.
        """
        batch, heads, tokens, size = new
        length = seen.shape[-2] if seen.numel() else 0
        expected = (batch, heads, size)
        if length and expected != (*seen.shape[:2], seen.shape[-1]):
            raise ValueError(
                f"the cache holds {length} tokens of {seen.shape[0]} sequences, {seen.shape[1]} heads and"
                f" {seen.shape[-1]} bytes; found tokens of {batch} sequences, {heads} heads and {size} bytes"
                " (a cache belongs to one batch: take a fresh one, or select or repeat its sequences)"
            )
        fits = self.room is not None and expected == (*self.room.shape[:2], self.room.shape[-1])
        if self.room is None or not fits or not self._holds(seen, length + tokens):
            capacity = max(self.FIRST, 2 * (length + tokens))
            self.room = torch.empty((batch, heads, capacity, size), dtype=torch.uint8, device=seen.device)
            if length:
                self.room[..., :length, :] = seen
        return self.room, length

    def _holds(self, seen: Tensor, total: int) -> bool:
        room = self.room
        if room is None or room.shape[-2] < total or room.shape[:2] != seen.shape[:2]:
            return False
        if room.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return room.device == seen.device and room.data_ptr() == seen.data_ptr() and room.stride() == seen.stride()


class QuantizedKVLayer(DynamicLayer):
    """One layer of the cache; `keys` and `values` hold uint8 records [batch, heads, tokens, bytes]."""

    def __init__(self, bits: int = 4, hadamard: bool = False, clip: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bits, self.hadamard, self.clip = bits, hadamard, clip
        self._key_records, self._value_records = _Records(), _Records()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Quantize and append float states [batch, heads, new, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = self._key_records.append(self.keys, encode(self.turned(key_states), self.bits, self.clip))
        values = self._value_records.append(self.values, encode(value_states, self.bits, self.clip))
        self.keys, self.values = keys, values

    def turned(self, states: Tensor) -> Tensor:
        """Keys [..., head_dim] as they are cached: where the recipe says so, times the largest Hadamard matrix whose
        order divides head_dim, in fp32. Its own inverse; queries turned like this may meet keys as they lie here."""
        if not self.hadamard:
            return states
        turn = hadamard if states.device.type == "cpu" else transform
        turned: Tensor = turn(states.to(torch.float32), largest_block(states.shape[-1]))
        return turned

    def reserve(self, heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor, int]:
        """Room for more tokens of one sequence, to be written by the caller: buffers uint8 [heads, capacity, bytes] of
        keys and values, and the position from which on to write; keys go there `turned`. The tokens count as cached
        from now on.
        """
        if not self.is_initialized:
            self.lazy_initialization(torch.empty(0))
        assert self.keys is not None
        assert self.values is not None
        shape = (1, heads, tokens, record_bytes(head_dim, self.bits))
        keys, position = self._key_records.reserve(self.keys, shape)
        values, _ = self._value_records.reserve(self.values, shape)
        self.keys, self.values = keys[:, :, : position + tokens], values[:, :, : position + tokens]
        return keys[0], values[0], position

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append float states [batch, heads, new, head_dim]; returns all of them, dequantized, in the same dtype."""
        self.append(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = decode(self.keys, key_states.shape[-1], self.bits, torch.float32 if self.hadamard else key_states.dtype)
        return (
            self.turned(keys).to(key_states.dtype),
            decode(self.values, value_states.shape[-1], self.bits, value_states.dtype),
        )


class QuantizedKVCache(Cache):
    """A cache for `past_key_values`, with a layer of `kv.bits` bits for each of the model's `layers` decoder blocks.

    `clips` gives each layer a clip ratio of its own, in place of `kv.clip`.
    """

    def __init__(self, layers: int, kv: KVRecipe, clips: Sequence[float] | None = None) -> None:
        ratios = [kv.clip] * layers if clips is None else clips
        super().__init__(layers=[QuantizedKVLayer(kv.bits, kv.hadamard, ratio) for ratio in ratios])

    def stored_bytes(self) -> int:
        """Bytes that the cached tokens take."""
        parts = (
            part for layer in self.layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        )
        return sum(part.numel() for part in parts if part is not None)
