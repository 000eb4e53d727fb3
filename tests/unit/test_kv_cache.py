from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.recipe import KVRecipe
from bitwright.runtime import QuantizedKVCache
from bitwright.runtime.kv_cache import decode, encode

from .twins import examples, gaussian


def twin(row: list[float], bits: int, clip: float = 1.0) -> tuple[list[int], float, float]:
    """(codes, scale, minimum) of one token and head: asymmetric, scale and minimum rounded to fp16."""
    top = 2**bits - 1
    row = [min(max(x, -65504.0), 65504.0) for x in row]
    cut = (max(row) - min(row)) * (1 - clip) / 2
    low = float(np.float16(min(row) + cut))
    scale = float(np.float16(max((max(row) - cut - low) / top, 2.0**-24)))
    return [min(max(round((x - low) / scale), 0), top) for x in row], scale, low


def bound(row: list[float], bits: int) -> float:
    """Half a step, the rounding of the minimum, and what the rounding of the scale adds up to at the top code."""
    low, high = min(row), max(row)
    step = max((high - low) / (2**bits - 1), 2.0**-24)
    rounded_low = max(abs(low) * 2.0**-11, 2.0**-25)
    step += rounded_low / (2**bits - 1)
    return (step / 2 + rounded_low + (2**bits - 1) * max(step * 2.0**-11, 2.0**-25)) * (1 + 1e-3) + abs(high) * 1e-6


@given(
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=33),
    st.integers(2, 8),
)
@examples(150)
def test_round_trip_of_one_head(row: list[float], bits: int) -> None:
    records = encode(torch.tensor([row]), bits)
    width = len(row)
    assert records.dtype == torch.uint8
    assert records.shape == (1, -(-width * bits // 8) + 4)
    found = decode(records, width, bits, torch.float32)
    assert found.shape == (1, width)
    error = (found.double() - torch.tensor([row], dtype=torch.float64)).abs().max()
    assert float(error) <= bound(row, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 80])
@pytest.mark.parametrize("clip", [1.0, 0.75])
def test_documented_bytes(bits: int, head_dim: int, clip: float) -> None:
    """Code i from bit i * bits on, the least significant first; then scale and minimum as little-endian fp16."""
    states = gaussian(5, head_dim, seed=head_dim) + 0.5
    for row, record in zip(states.tolist(), encode(states, bits, clip).tolist(), strict=True):
        codes, scale, low = twin([float(np.float32(x)) for x in row], bits, clip)
        whole = sum(code << place * bits for place, code in enumerate(codes))
        expected = whole.to_bytes(-(-head_dim * bits // 8), "little")
        assert bytes(record) == expected + np.array([scale, low], dtype="<f2").tobytes()


def test_a_clip_ratio_trades_the_ends_for_the_middle() -> None:
    """Three bits of Gaussian heads: at 0.8 the squared error is less than at 1, at 0.3 more."""
    states = gaussian(400, 64, seed=4)
    errors = [
        float((decode(encode(states, 3, clip), 64, 3, torch.float32) - states).square().mean())
        for clip in (1.0, 0.8, 0.3)
    ]
    assert errors[1] < 0.9 * errors[0] < errors[2]


def test_layers_have_clip_ratios_of_their_own() -> None:
    keys = gaussian(1, 2, 5, 9)
    one, other = (QuantizedKVCache(2, KVRecipe(bits=3, clip=0.9), clips) for clips in (None, [0.5, 1.0]))
    for cache, ratios in ((one, (0.9, 0.9)), (other, (0.5, 1.0))):
        for layer, ratio in enumerate(ratios):
            found, _ = cache.update(keys, keys, layer)
            assert torch.equal(found, decode(encode(keys, 3, ratio), 9, 3, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 60000.0, -60000.0])
def test_constants_are_kept(bits: int, value: float) -> None:
    found = decode(encode(torch.full((2, 3, 9), value), bits), 9, bits, torch.float32)
    assert torch.allclose(found, torch.full((2, 3, 9), value), rtol=5e-4, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "row", [[65504.0, -65504.0, 0.0], [1e6, -1e6, 1.0], [1e-7, 0.0, -1e-7], [-5e4, -4e4, -4.5e4], [3e38, 0.0, 0.0]]
)
def test_extremes_stay_finite(bits: int, row: list[float]) -> None:
    found = decode(encode(torch.tensor([row]), bits), 3, bits, torch.float32)
    assert found.isfinite().all()
    clamped = torch.tensor([row]).clamp(-65504, 65504)
    assert float((found - clamped).abs().max()) <= bound(clamped[0].tolist(), bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_model_comes_back(dtype: torch.dtype) -> None:
    states = gaussian(2, 3, 8).to(dtype)
    found = decode(encode(states, 4), 8, 4, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, decode(encode(states.float(), 4), 8, 4, torch.float32).to(dtype))


# --- through the interface of transformers ---

BATCH, HEADS, DIM = 3, 2, 9


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    return gaussian(BATCH, HEADS, tokens, DIM, seed=seed), gaussian(BATCH, HEADS, tokens, DIM + 2, seed=seed + 50)


def filled(tokens: int = 7, bits: Any = 4) -> tuple[QuantizedKVCache, Tensor, Tensor]:
    """A cache of two layers, and what the first returned."""
    cache = QuantizedKVCache(2, KVRecipe(bits=bits))
    keys, values = cache.update(*states(tokens, 1), 0)
    cache.update(*states(tokens, 2), 1)
    return cache, keys, values


def contents(cache: QuantizedKVCache, layer: int = 0) -> tuple[Tensor, Tensor]:
    """All that is cached, by appending nothing."""
    batch = cache.layers[layer].keys.shape[0]
    return cache.update(torch.zeros(batch, HEADS, 0, DIM), torch.zeros(batch, HEADS, 0, DIM + 2), layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_update_returns_everything_dequantized(bits: Any) -> None:
    cache, keys, values = filled(7, bits)
    k, v = states(7, 1)
    assert torch.equal(keys, decode(encode(k, bits), DIM, bits, torch.float32))
    assert torch.equal(values, decode(encode(v, bits), DIM + 2, bits, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), (keys, values), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 4], [6, 1]])
def test_pieces_are_the_whole(bits: Any, pieces: list[int]) -> None:
    _, keys, values = filled(7, bits)
    cache = QuantizedKVCache(1, KVRecipe(bits=bits))
    k, v = states(7, 1)
    start = 0
    for count in pieces:
        assert cache.get_seq_length() == start
        found = cache.update(k[:, :, start : start + count], v[:, :, start : start + count], 0)
        start += count
    assert cache.get_seq_length() == 7
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)


def test_lengths_and_bytes() -> None:
    cache = QuantizedKVCache(2, KVRecipe())
    assert len(cache) == 2
    assert cache.get_seq_length() == 0
    assert cache.stored_bytes() == 0
    cache.update(*states(7, 1), 0)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (7, 0)
    # Odd heads fill up to a whole byte: 5 + 4 bytes for a key, 6 + 4 for a value.
    assert cache.stored_bytes() == BATCH * HEADS * 7 * (9 + 10)
    cache.update(*states(1, 2), 1)
    assert cache.stored_bytes() == BATCH * HEADS * (7 + 1) * (9 + 10)
    assert filled(7, 8)[0].stored_bytes() == 2 * BATCH * HEADS * 7 * (9 + 4 + 11 + 4)


def test_crop() -> None:
    cache, keys, values = filled()
    cache.crop(-3)
    assert cache.get_seq_length() == 4
    found = contents(cache)
    assert torch.equal(found[0], keys[:, :, :4])
    assert torch.equal(found[1], values[:, :, :4])
    # And it goes on from there.
    more = cache.update(*states(2, 9), 0)
    assert torch.equal(more[0][:, :, :4], keys[:, :, :4])
    assert more[0].shape[2] == cache.get_seq_length() == 6


@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 1]])
def test_reorder(index: list[int]) -> None:
    cache, keys, values = filled()
    cache.reorder_cache(torch.tensor(index))
    found = contents(cache)
    assert torch.equal(found[0], keys[index])
    assert torch.equal(found[1], values[index])


def test_batch_repeat_and_select() -> None:
    cache, keys, values = filled()
    cache.batch_repeat_interleave(2)
    found = contents(cache)
    assert torch.equal(found[0], keys.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    found = contents(cache)
    assert torch.equal(found[0], keys[[2, 0]])
    assert torch.equal(found[1], values[[2, 0]])


def test_reset_empties_it() -> None:
    cache, keys, _ = filled()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stored_bytes() == 0
    assert torch.equal(cache.update(*states(7, 1), 0)[0], keys)


def test_early_initialization() -> None:
    """What exporters do before the first token: it has to be as if nothing had happened."""
    cache = QuantizedKVCache(2, KVRecipe())
    cache.early_initialization(BATCH, HEADS, DIM, torch.float32, torch.device("cpu"))
    assert cache.get_seq_length() == 0
    assert cache.stored_bytes() == 0
    k, _ = states(7, 1)
    assert torch.equal(cache.update(k, k, 0)[0], filled()[1])


def test_growth_keeps_every_record_and_copies_seldom() -> None:
    layer = QuantizedKVCache(1, KVRecipe()).layers[0]
    states = gaussian(2, 3, 700, 8, seed=1)
    begins = set()
    for token in range(700):
        layer.append(states[:, :, token : token + 1], -states[:, :, token : token + 1])
        begins.add(layer.keys.data_ptr())
    assert torch.equal(layer.keys, encode(states, 4))
    assert torch.equal(layer.values, encode(-states, 4))
    assert len(begins) <= 3, "the room doubles"


def test_append_after_crop_and_outside_inference_mode() -> None:
    layer = QuantizedKVCache(1, KVRecipe()).layers[0]
    states = gaussian(1, 2, 20, 8, seed=2)
    with torch.inference_mode():
        layer.append(states, states)
        kept = layer.keys.clone()
        layer.crop(-13)
        layer.append(states[:, :, 12:15], states[:, :, 12:15])
    layer.append(states[:, :, :1], states[:, :, :1])
    expected = torch.cat([states[:, :, :7], states[:, :, 12:15], states[:, :, :1]], dim=2)
    assert torch.equal(layer.keys, encode(expected, 4))
    assert torch.equal(kept, encode(states, 4))


@pytest.mark.parametrize("shape", [(1, HEADS, 1, DIM), (4, HEADS, 1, DIM), (BATCH, 1, 1, DIM), (BATCH, HEADS, 1, 8)])
def test_tokens_of_another_batch_are_refused(shape: tuple[int, ...]) -> None:
    cache, keys, values = filled()
    with pytest.raises(ValueError, match=r"holds 7 tokens of 3 sequences, 2 heads .* take a fresh one"):
        cache.update(torch.zeros(shape), torch.zeros(*shape[:-1], DIM + 2), 0)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), (keys, values), strict=True)), "and nothing written"
    with pytest.raises(ValueError, match="found tokens of 1 sequences"):
        cache.layers[0].reserve(HEADS, 1, DIM)
    cache.crop(-7)
    found, _ = cache.update(torch.ones(shape), torch.ones(*shape[:-1], DIM + 2), 0)
    assert found.shape == shape, "an empty cache takes any batch"
