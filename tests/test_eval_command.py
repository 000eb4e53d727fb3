"""`eval`: the number is that of a plain loop, with the protocol beside it."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitwright
import simulation
import support
from bitwright import native
from bitwright.calibration import read_text
from bitwright.evaluation import evaluate_model

KEYS = {"perplexity", "bits_per_byte", "loss", "tokens", "windows", "protocol", "text", "text_sha256"}


def tokens_of(directory: Path, content: str) -> torch.Tensor:
    return torch.tensor(AutoTokenizer.from_pretrained(directory)(content)["input_ids"])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_original_equals_a_plain_loop(name: str, models: dict[str, Path], evaluation_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    content = evaluation_file.read_text()
    tokens = tokens_of(models[name], content)
    for window, limit in ((None, 7), (50, 9), (64, None)):
        result = bitwright.evaluate(models[name], read_text([evaluation_file]), window=window, limit=limit)
        expected, count = simulation.plain_perplexity(model, tokens, window or support.CONTEXT, limit)
        assert result.perplexity == pytest.approx(expected, rel=1e-6)
        assert result.tokens == count
        bos = int(tokens[0] == 0)
        assert result.bits_per_byte == pytest.approx(
            math.log2(expected) * (len(tokens) - bos) / len(content.encode()), rel=1e-6
        )
        assert "nothing quantized" in result.protocol
        available = len(tokens) // (window or support.CONTEXT)
        cut = f"the first {limit} of {available} windows of the text" if limit else "windows averaged;"
        assert cut in result.protocol
        assert ("BOS once at the start of the text" if bos else "no BOS") in result.protocol


def test_artifact_equals_a_plain_loop_over_the_simulation(
    models: dict[str, Path], artifact: Callable[..., Path], evaluation_file: Path
) -> None:
    """All quantizers are in the measurement: an independent simulation of all three gives the same."""
    simulated, recipe = simulation.simulate(models["llama"], artifact("llama"), "kernels" if native.find() else "site")
    tokens = tokens_of(models["llama"], evaluation_file.read_text())
    expected, _ = simulation.plain_perplexity(simulated, tokens, 100, 8, recipe)
    result = bitwright.evaluate(artifact("llama"), read_text([evaluation_file]), window=100, limit=8)
    # The lean path sums attention in another order; now and then that tips a 4-bit code.
    assert result.perplexity == pytest.approx(expected, rel=1e-3)
    assert "weights 2-bit bwa, activations 4-bit, KV cache 4-bit" in result.protocol


def test_stories260k(shared: Path) -> None:
    """A real model on real text. The whole text (122.33 a token, 4.360 bits a byte) takes minutes: 8 windows."""
    directory = shared / "models" / "stories260K"
    text = read_text([shared / "text" / "wikitext2_test.txt"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = tokens_of(directory, text.content)
    result = evaluate_model(model, AutoTokenizer.from_pretrained(directory), text, limit=8)
    expected, count = simulation.plain_perplexity(model, tokens, 512, 8)
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.windows) == (count, 8)
    # The first windows are harder than the whole; the ratio of bits to nats is the same for both.
    assert result.bits_per_byte / math.log(result.perplexity) == pytest.approx(4.360 / math.log(122.33), rel=1e-4)


def test_json(artifact: Callable[..., Path], evaluation_file: Path) -> None:
    directory = artifact("llama")
    command = ["eval", directory, "--text", evaluation_file, "--window", "60", "--windows", "5"]
    outcome = support.run_cli(*command, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    said = outcome.json
    assert set(said) == KEYS
    assert said["tokens"] == 300
    assert said["windows"] == 5
    assert said["text_sha256"] == hashlib.sha256(evaluation_file.read_bytes()).hexdigest()
    assert said["perplexity"] == pytest.approx(math.exp(said["loss"]), rel=1e-12)
    assert said["protocol"].startswith("windows of 60 tokens, stride 60, BOS once at the start of the text")
    words = support.run_cli(*command)
    assert words.code == 0
    for part in (f"{said['perplexity']:.4f}", f"{said['bits_per_byte']:.4f}", said["text_sha256"], said["protocol"]):
        assert part in words.out


def test_threads_do_not_change_it(artifact: Callable[..., Path], evaluation_file: Path) -> None:
    command = ["eval", artifact("mistral"), "--text", evaluation_file, "--windows", "6", "--json", "--threads"]
    assert len({support.run_cli(*command, str(threads)).out for threads in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": None}, "weights 2-bit bwa, activations 16-bit, KV cache 4-bit"),
        ({"kv": None}, "weights 2-bit bwa, activations 4-bit, KV cache 16-bit"),
        ({"weights.bits": 1}, "weights 1-bit bwa, activations 4-bit, KV cache 4-bit"),
    ],
)
def test_protocol_says_what_was_quantized(
    options: dict[str, object], words: str, artifact: Callable[..., Path], evaluation_file: Path
) -> None:
    outcome = support.run_cli("eval", artifact("llama", "bwa", options), "--text", evaluation_file, "--windows", "1")
    assert outcome.code == 0
    assert words in outcome.out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype: str, artifact: Callable[..., Path], evaluation_file: Path) -> None:
    outcome = support.run_cli(
        "eval", artifact("llama"), "--text", evaluation_file, "--windows", "2", "--dtype", dtype, "--json"
    )
    assert outcome.code == 0
    assert outcome.json["protocol"].endswith(f"; {dtype}")
    assert 50 < outcome.json["perplexity"] < 2000


def test_kinds_of_text_files(models: dict[str, Path], tmp_path: Path) -> None:
    """Plain, compressed, JSON lines, several files, and lines joined: each is the text that it says."""
    content = support.words(600, 5)
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content.encode()))
    half = content.split("\n\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": part.strip()}) for part in half) + "\n\n")

    def digest(*arguments: str | Path) -> str:
        outcome = support.run_cli("eval", models["llama"], "--windows", "1", "--json", *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.json["text_sha256"]

    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert digest("--text", tmp_path / "a.txt") == sha(content)
    assert digest("--text", tmp_path / "a.txt.xz") == sha(content)
    assert digest("--text", tmp_path / "a.jsonl") == sha(content.strip())
    assert digest("--text", tmp_path / "a.txt", "--text", tmp_path / "a.txt.xz") == sha(f"{content}\n\n{content}")
    lines = [line.strip() for line in content.splitlines()]
    assert digest("--text", tmp_path / "a.txt", "--join", "space") == sha(" ".join(lines))
    assert digest("--text", tmp_path / "a.txt", "--join", "blank-line") == sha("\n\n".join(lines))


def test_card_and_quantize_agree_with_eval(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path
) -> None:
    """What `quantize --eval-text` measures on the way, and prints, and writes on the card, is what `eval` finds."""
    command = ["quantize", models["qwen2"], tmp_path / "out", "--calib", calibration_file, "--sequences", "4"]
    command += ["--length", "64", "--eval-text", evaluation_file, "--eval-windows", "6"]
    outcome = support.run_cli(*command, "--json")
    assert outcome.code == 0, outcome.err
    measured = outcome.json["measured"]["evaluation"]
    evaluated = {
        "loss_original": bitwright.evaluate(models["qwen2"], read_text([evaluation_file]), window=64, limit=6),
        "loss_quantized": bitwright.evaluate(tmp_path / "out", read_text([evaluation_file]), window=64, limit=6),
    }
    for key, result in evaluated.items():
        # Sums in another order move an activation from one code to the next here and there.
        assert measured[key] == pytest.approx(result.loss, rel=1e-5 if key == "loss_original" else 1e-4)
    assert measured["excess"] == measured["loss_quantized"] - measured["loss_original"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| evaluation.txt (not calibrated on) | 6 x 64 tokens | {math.exp(measured['loss_original']):.4f}" in card
    assert f"{outcome.json['linear_bits']:.4f} a weight" in card
    words = support.run_cli(*command)
    assert "already complete" in words.err
    assert f"excess {measured['excess']:.4f} (6 windows of 64)" in words.out
