"""The ops on the quantized cache: every variant against torch on the decoded cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.runtime import attention_ops, block_ops
from bitwright.runtime.attention_ops import record_bytes
from bitwright.runtime.kv_cache import decode, encode

from .backends import VARIANTS, module, needs_native, restore, threads
from .twins import examples, gaussian

SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "shifted": lambda x: x + 3,
    "large": lambda x: x * 1e4,
    "beyond fp16": lambda x: x * 1e6,
    "tiny": lambda x: x * 1e-7,
    "zeros": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, -2.5),
    "outlier": lambda x: torch.cat([x[..., :1] * 1e4, x[..., 1:]], dim=-1),
}


def filled(states: Tensor, bits: int, capacity: int) -> Tensor:
    """Records of states [heads, tokens, head_dim] at the front of a buffer whose rest is rubbish."""
    records = torch.full((states.shape[0], capacity, record_bytes(states.shape[2], bits)), 0xAB, dtype=torch.uint8)
    records[:, : states.shape[1]] = encode(states, bits)
    return records


def exact(
    queries: Tensor, keys: Tensor, values: Tensor, length: int, scale: float, window: int, bits: int
) -> tuple[Tensor, float, Tensor]:
    """In fp64: attention on the decoded cache, the largest sum of |q k| (it bounds the rounding of scores), values."""
    heads_q, new, head_dim = queries.shape
    k, v = (
        decode(r[:, :length], head_dim, bits, torch.float64).repeat_interleave(heads_q // keys.shape[0], dim=0)
        for r in (keys, values)
    )
    q = queries.double() * scale
    key, query = torch.arange(length), torch.arange(length - new, length).unsqueeze(1)
    hidden = (key > query) | ((key <= query - window) if window else torch.zeros(1, dtype=torch.bool))
    scores = (q @ k.transpose(1, 2)).masked_fill(hidden, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(0, 1), float((q.abs() @ k.abs().transpose(1, 2)).max()), v


def check(found: Tensor, arguments: tuple[Any, ...]) -> None:
    expected, size, values = exact(*arguments)
    # fp32 scores err by some units in the last place of their terms; weights err by as much, relatively.
    slack = min(2.0, 1e-4 + 1e-6 * size)
    error = (found.double() - expected).abs().max()
    assert found.isfinite().all()
    assert float(error) <= slack * float(values.abs().max()) + 1e-12


@given(
    heads=st.integers(1, 3),
    tokens=st.integers(0, 9),
    head_dim=st.integers(1, 160),
    position=st.integers(0, 5),
    bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 1.0, 0.9, 0.53125, 0.01]),
    spread=st.sampled_from(sorted(SPREADS)),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(100)
def test_append_writes_the_bytes_of_encode(
    heads: int, tokens: int, head_dim: int, position: int, bits: int, clip: float, spread: str, count: int, seed: int
) -> None:
    states = SPREADS[spread](gaussian(tokens, heads, head_dim, seed=seed)).transpose(0, 1)  # a strided view
    before = torch.full((heads, position + tokens + 2, record_bytes(head_dim, bits)), 0x5A, dtype=torch.uint8)
    expected = before.clone()
    expected[:, position : position + tokens] = encode(states, bits, clip)
    try:
        for name in VARIANTS:
            module.choose(name)
            records = before.clone()
            with threads(count):
                attention_ops.kv_append(records, states, position, bits, clip)
            assert torch.equal(records, expected), name
    finally:
        restore()


@given(row=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), bits=st.integers(2, 8))
@examples(150)
def test_any_finite_or_infinite_number_appends_as_encode(row: list[float], bits: int) -> None:
    states = torch.tensor(row).reshape(1, 1, -1)
    try:
        for name in VARIANTS:
            module.choose(name)
            records = torch.zeros(1, 1, record_bytes(len(row), bits), dtype=torch.uint8)
            attention_ops.kv_append(records, states, 0, bits)
            assert torch.equal(records, encode(states, bits)), name
    finally:
        restore()


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("channel", [0, 9, 20])
def test_a_nan_makes_its_record_nan(backend: str, bits: int, channel: int) -> None:
    states = gaussian(1, 3, 21)
    states[0, 1, channel] = float("nan")
    records = torch.zeros(1, 3, record_bytes(21, bits), dtype=torch.uint8)
    attention_ops.kv_append(records, states, 0, bits)
    found = decode(records, 21, bits, torch.float32)
    assert bool(found[0, 1].isnan().all())
    assert bool(found[0, [0, 2]].isfinite().all())


@needs_native
@given(
    head_dim=st.integers(1, 160),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    length=st.integers(1, 300),
    new=st.sampled_from([1, 1, 1, 2, 5, 17, 60, 300]),
    window=st.sampled_from([0, 0, 1, 7, 64, 100, 400]),
    bits=st.integers(2, 8),
    spread=st.sampled_from(sorted(SPREADS)),
    seed=st.integers(0, 1000),
)
@examples(80)
def test_attention_over_the_cache(
    head_dim: int, heads: int, group: int, length: int, new: int, window: int, bits: int, spread: str, seed: int
) -> None:
    new = min(new, length)
    keys = filled(SPREADS[spread](gaussian(heads, length, head_dim, seed=seed)), bits, length + seed % 3)
    values = filled(SPREADS[spread](gaussian(heads, length, head_dim, seed=seed + 1)), bits, length + seed % 3)
    queries = gaussian(new, heads * group, head_dim, seed=seed + 2).transpose(0, 1)
    arguments = (queries, keys, values, length, head_dim**-0.5, window, bits)
    try:
        for name in VARIANTS:
            module.choose(name)
            with threads(1):
                found = attention_ops.kv_attention(*arguments)
            assert found.shape == (new, heads * group, head_dim)
            check(found, arguments)
            for count in (2, 3):
                with threads(count):
                    assert torch.equal(attention_ops.kv_attention(*arguments), found), (name, count)
    finally:
        restore()


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("heads", "group", "new", "length", "window"),
    [(2, 1, 1, 1700, 0), (1, 4, 1, 1700, 1100), (2, 3, 2, 1030, 0), (1, 2, 200, 513, 0), (3, 1, 64, 600, 90)],
)
def test_long_contexts_in_parts(
    backend: str,
    bits: int,
    heads: int,
    group: int,
    new: int,
    length: int,
    window: int,
) -> None:
    states = [gaussian(heads, length, 128, seed=seed) * 2 for seed in (1, 2)]
    keys, values = (filled(part, bits, length) for part in states)
    arguments = (gaussian(heads * group, new, 128, seed=3), keys, values, length, 128**-0.5, window, bits)
    found: list[Tensor] = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(attention_ops.kv_attention(*arguments))
    check(found[0], arguments)
    reference = attention_ops._kv_attention_reference(*arguments)
    torch.testing.assert_close(found[0], reference, rtol=1e-4, atol=2e-5)
    if backend != "reference":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_one_by_one_is_all_at_once(backend: str) -> None:
    keys, values, queries = (gaussian(2, 70, 80, seed=seed) for seed in (1, 2, 3))
    whole = [torch.zeros(2, 70, record_bytes(80, 4), dtype=torch.uint8) for _ in range(4)]
    attention_ops.kv_append(whole[0], keys, 0, 4)
    attention_ops.kv_append(whole[1], values, 0, 4)
    expected = attention_ops.kv_attention(queries, whole[0], whole[1], 70, 0.2, 0, 4)
    for token in range(70):
        now = slice(token, token + 1)
        attention_ops.kv_append(whole[2], keys[:, now], token, 4)
        attention_ops.kv_append(whole[3], values[:, now], token, 4)
        found = attention_ops.kv_attention(queries[:, now], whole[2], whole[3], token + 1, 0.2, 0, 4)
        torch.testing.assert_close(found[0], expected[token], rtol=1e-4, atol=1e-5)
    assert torch.equal(whole[0], whole[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("new", [1, 20])
def test_what_is_not_finite_stays_visible(backend: str, value: float, new: int) -> None:
    keys, values = (filled(gaussian(1, 90, 33, seed=seed), 4, 90) for seed in (1, 2))
    queries = gaussian(2, new, 33)
    queries[1, new - 1, 5] = value
    found = attention_ops.kv_attention(queries, keys, values, 90, 0.2, 0, 4)
    assert bool(found[new - 1, 1].isnan().all())
    assert bool(found[:, 0].isfinite().all())


def test_what_does_not_fit_is_refused(backend: str) -> None:
    states, records = gaussian(2, 3, 10), torch.zeros(2, 8, record_bytes(10, 4), dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit at position 6"):
        attention_ops.kv_append(records, states, 6, 4)
    with pytest.raises(ValueError, match="records must be uint8"):
        attention_ops.kv_append(records, states, 0, 8)
    with pytest.raises(ValueError, match="contiguous"):
        attention_ops.kv_append(records[:, ::2], states, 0, 4)
    with pytest.raises(ValueError, match="bits must be"):
        attention_ops.kv_append(records, states, 0, 1)
    with pytest.raises(ValueError, match="clip must be"):
        attention_ops.kv_append(records, states, 0, 4, 0.0)
    with pytest.raises(ValueError, match="float32"):
        attention_ops.kv_attention(states.double(), records, records, 3, 1.0, 0, 4)
    with pytest.raises(ValueError, match="length must lie"):
        attention_ops.kv_attention(states, records, records, 2, 1.0, 0, 4)
    with pytest.raises(ValueError, match="length must lie"):
        attention_ops.kv_attention(states, records, records, 9, 1.0, 0, 4)
    with pytest.raises(ValueError, match="no multiple"):
        attention_ops.kv_attention(gaussian(3, 1, 10), records, records, 2, 1.0, 0, 4)
    with pytest.raises(ValueError, match="window"):
        attention_ops.kv_attention(states, records, records, 3, 1.0, -1, 4)
    with pytest.raises(ValueError, match="one shape"):
        attention_ops.kv_attention(states, records, records[:, :7].contiguous(), 3, 1.0, 0, 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 1, 8), (3, 2, 80), (1, 4, 64)])
@pytest.mark.parametrize("window", [0, 4])
def test_a_step_is_the_single_ops(backend: str, bits: int, heads: int, group: int, dim: int, window: int) -> None:
    wide, capacity = (heads * group + 2 * heads) * dim + 5, 20
    key, value = heads * group * dim + 2, (heads * group + heads) * dim + 5
    buffers = [filled(gaussian(heads, 6, dim, seed=seed), bits, capacity) for seed in (1, 2)]
    ours, theirs = [b.clone() for b in buffers], [b.clone() for b in buffers]
    position = 6
    for tokens in (1, 5, 1):
        x, angle = gaussian(tokens, wide, seed=position), gaussian(tokens, dim, seed=9)
        cos, sin = angle.cos(), angle.sin()
        parts = (x[:, : heads * group * dim], x[:, key : key + heads * dim], x[:, value : value + heads * dim])
        q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)
        attention_ops.kv_append(theirs[0], block_ops.rope(k, cos, sin).transpose(0, 1), position, bits)
        attention_ops.kv_append(theirs[1], v.transpose(0, 1), position, bits)
        q, length = block_ops.rope(q, cos, sin).transpose(0, 1), position + tokens
        expected = attention_ops.kv_attention(q, *theirs, length, 0.3, window, bits)
        found = attention_ops.attention_step(x, cos, sin, *ours, position, heads * group, key, value, 0.3, window, bits)
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        position += tokens


def test_a_step_refuses_what_does_not_fit(backend: str) -> None:
    keys = filled(gaussian(2, 5, 8), 4, 9)
    x, cos = gaussian(1, 64), gaussian(1, 8)

    def step(x: Tensor = x, position: int = 5, heads: int = 4, value: int = 48, at: Tensor = keys) -> Any:
        return attention_ops.attention_step(x, cos, cos, keys, at, position, heads, 32, value, 0.3, 0, 4)

    step()
    with pytest.raises(ValueError, match="do not fit a capacity of 9"):
        step(position=9)
    with pytest.raises(ValueError, match="3 query heads do not fit"):
        step(heads=3)
    with pytest.raises(ValueError, match="no 2 heads of 8 at 32 and 49"):
        step(value=49)
    with pytest.raises(ValueError, match="does not fit cos"):
        step(x=gaussian(2, 64))
    with pytest.raises(ValueError, match="x must be float32"):
        step(x=x.double())
    with pytest.raises(ValueError, match="values must be uint8"):
        step(at=keys.int())


# --- as ops of torch ---


def test_compile_of_a_decode_step(backend: str) -> None:
    def step(x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        x = block_ops.rms_norm(x, weight, 1e-6)
        q = block_ops.rope(x.unflatten(1, (2, 8)), cos, cos).transpose(0, 1)
        attention_ops.kv_append(keys, q, position, 4)
        attention_ops.kv_append(values, q + 1, position, 4)
        y = attention_ops.kv_attention(q, keys, values, position + 1, 0.3, 0, 4)
        return torch.nn.functional.silu(y.flatten(1)) * x

    weight, cos = gaussian(16), gaussian(1, 8)
    buffers = [filled(gaussian(2, 5, 8, seed=seed), 4, 9) for seed in (0, 1)]
    ours, compiled = [b.clone() for b in buffers], [b.clone() for b in buffers]
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for position in (5, 6, 7):
        x = gaussian(1, 16, seed=position)
        expected = step(x, *ours, position)
        assert torch.equal(compiled_step(x, *compiled, position), expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, compiled, strict=True))
