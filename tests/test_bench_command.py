"""`bitwright bench`: figures that are consistent with each other, on small shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright import native
from bitwright.evaluation import shapes, speed

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

TINY: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", ("LlamaConfig", TINY))
    monkeypatch.setitem(shapes.SHAPES, "tiny-biases", ("Qwen2Config", TINY))
    monkeypatch.setattr(speed, "MEMORY", 1 << 20)


def test_kernels() -> None:
    words = ["bench", "kernels", "--shape", "tiny", "--tokens", "1,17", "--seconds", "0"]
    rows = json.loads(support.run_cli(*words, "--json").out)
    assert [(row["site"], row["rows"], row["columns"]) for row in rows[::2]] == [
        ("attn_in", 96 + 2 * 48, 96),
        ("attn_out", 96, 96),
        ("mlp_in", 320, 96),
        ("mlp_out", 96, 160),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["gigaflops"] == pytest.approx(2e-9 * row["rows"] * row["columns"] * row["tokens"] / row["seconds"])
        assert row["over_read"] == pytest.approx(row["seconds"] / row["read_seconds"])
        assert set(row["peers"]) == ({"torch bf16"} if row["tokens"] == 1 else {"torch bf16", "torch int_mm"})
    printed = support.run_cli(*words, "--no-peers").out
    assert "192 x 96" in printed
    assert "torch bf16" not in printed


@pytest.mark.parametrize("name", ["tiny", "tiny-biases"])
def test_a_model_by_shape(name: str) -> None:
    words = ["bench", "model", name, "--prompt", "12", "--tokens", "4"]
    found = json.loads(support.run_cli(*words, "--json").out)
    assert found["prefill_tokens_per_second"] > 0
    assert found["first_token_seconds"] >= 12 / found["prefill_tokens_per_second"]
    moved = found["bytes_per_token"] * found["decode_tokens_per_second"] / 1e9
    assert found["decode_gigabytes_per_second"] == pytest.approx(moved)
    ratio = found["decode_tokens_per_second"] / found["generate_tokens_per_second"]
    assert found["generate_over_decode"] == pytest.approx(ratio)
    model = shapes.random_model(name, bitwright.preset("bwa"), layers=1)
    assert len(model.model.layers) == 1
    assert "tokens/s (12 tokens)" in support.run_cli(*words).out


@pytest.mark.parametrize(("embedding", "head"), [(8, 4), (16, 8)])
def test_outer_matrices_of_a_shape(embedding: int, head: int) -> None:
    words = ["bench", "model", "tiny", "--prompt", "12", "--tokens", "2", "--json"]
    plain = support.run_cli(*words).json
    found = support.run_cli(*words, "--embedding", str(embedding), "--head", str(head)).json
    # 70 rows of 96 columns, a group a row; a token reads the head alone.
    assert plain["bytes_per_token"] - found["bytes_per_token"] == 70 * (96 * 2 - 96 * head // 8 - 2)
    assert found["resident_bytes"] > 0


def test_an_artifact(artifact: Callable[..., Path]) -> None:
    directory = artifact("llama", "bwa", {"activations.balance": "none"})
    found = json.loads(support.run_cli("bench", "model", directory, "--prompt", "9", "--tokens", "2", "--json").out)
    assert found["name"] == str(directory)
    assert found["new_tokens"] == 2


def test_bad_calls() -> None:
    for words, expected in (
        (["kernels", "--shape", "llama-9"], "there is no shape 'llama-9'; the shapes are llama-2-7b"),
        (["kernels", "--tokens", "one"], "--tokens 'one' is no list of numbers"),
        (["model", "tiny", "--head", "5"], "outer.head = 5"),
        (["model", "nowhere"], "'nowhere' is neither a directory nor one of the shapes"),
    ):
        outcome = support.run_cli("bench", *words)
        assert outcome.code == 1
        assert expected in outcome.err
