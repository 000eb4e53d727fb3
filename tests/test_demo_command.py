"""The demo: its text is split cleanly, and its command shows that the method is worth its bits."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright.calibration import text_of

corpus = pytest.importorskip("bitwright.demo.corpus")
MODEL = Path(corpus.__file__).parent / "model"

LONG = 60


def paragraphs(text: str) -> set[str]:
    """Paragraphs as a reader sees them: split at blank lines, runs of whitespace as one space."""
    return {" ".join(part.split()) for part in re.split(r"\n\s*\n", text)}


def test_nothing_evaluated_is_trained_or_calibrated_on() -> None:
    evaluation = {part for part in paragraphs(corpus.evaluation_text()) if len(part) > LONG}
    assert len(evaluation) > 100
    for other in (corpus.training_text(), corpus.calibration_text()):
        assert not evaluation & paragraphs(other)


def test_calibration_is_part_of_training() -> None:
    assert {part for part in paragraphs(corpus.calibration_text()) if len(part) > LONG} <= paragraphs(
        corpus.training_text()
    )
    assert not corpus.EVALUATION_TOPICS & corpus.CALIBRATION_TOPICS


def test_no_long_run_of_words_is_shared() -> None:
    """Below paragraphs, too: next to no 30 words in a row of the evaluation text stand in the calibration text."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 30]) for i in range(len(words) - 29)}

    evaluation = runs(corpus.evaluation_text())
    shared = evaluation & runs(corpus.calibration_text())
    assert len(shared) <= 0.005 * len(evaluation)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run of the demo leaves its artifact."""
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def bwa(kept: Path) -> dict[str, Any]:
    """`bitwright demo`, once, with less calibration than it has by default."""
    if not (MODEL / "model.safetensors").exists():
        pytest.skip("the demo model is not in this checkout")
    outcome = support.run_cli("demo", "--json", "--set", "calibration.sequences=6", "--out", kept)
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_demo_says_everything(bwa: dict[str, Any]) -> None:
    assert set(bwa) >= {
        "recipe",
        "original",
        "quantized",
        "excess",
        "linear_bits",
        "model_bits",
        "original_bits",
        "original_bytes",
        "total_bytes",
        "samples",
        "seconds",
        "kept",
    }
    before, after = bwa["original"], bwa["quantized"]
    assert before["text_sha256"] == after["text_sha256"]
    assert before["tokens"] == after["tokens"]
    assert "nothing quantized" in before["protocol"]
    assert "weights 2-bit bwa, activations 4-bit, KV cache 4-bit" in after["protocol"]
    assert bwa["excess"] == pytest.approx(math.log(after["perplexity"] / before["perplexity"]), rel=1e-6)
    assert 2 < bwa["linear_bits"] < 4
    assert bwa["linear_bits"] < bwa["model_bits"] < bwa["original_bits"]
    assert (
        bwa["total_bytes"] < bwa["original_bytes"] == sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    )
    assert bwa["original_bytes"] <= 6_000_000
    assert set(bwa["samples"]) == {"original", "quantized"}
    prompt = "The following methods are supported by"
    assert all(sample.startswith(prompt) and len(sample) > len(prompt) for sample in bwa["samples"].values())


def test_out_keeps_a_whole_artifact(bwa: dict[str, Any], kept: Path) -> None:
    assert bwa["kept"] == str(kept)
    assert bitwright.verify(kept) == []
    assert sum(path.stat().st_size for path in kept.glob("*.safetensors")) == bwa["total_bytes"]


def test_in_words(bwa: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints for people holds the same figures and both samples."""
    from bitwright.cli.demo import show

    show(bwa)
    said = capsys.readouterr().out
    before, after = bwa["original"]["perplexity"], bwa["quantized"]["perplexity"]
    assert f"excess: ln({after:.3f} / {before:.3f}) = {bwa['excess']:.4f}" in said
    for words in (bwa["quantized"]["protocol"], bwa["quantized"]["text_sha256"], f"{bwa['total_bytes']:,} bytes"):
        assert words in said
    for name in ("original", "quantized"):
        assert bwa["samples"][name] in said


def test_bwa_beats_round_to_nearest(bwa: dict[str, Any], kept: Path, tmp_path: Path) -> None:
    """At most half of the excess of the same recipe with plain 2-bit weights, on the first windows of the text."""
    recipe = bitwright.preset("rtn").with_options({"calibration.sequences": 2})
    bitwright.quantize(MODEL, tmp_path / "rtn", recipe, text_of("calibration topics", corpus.calibration_text()))
    text = text_of("evaluation topics", corpus.evaluation_text())
    paths = {"original": MODEL, "bwa": kept, "rtn": tmp_path / "rtn"}
    loss = {name: bitwright.evaluate(path, text, limit=12).loss for name, path in paths.items()}
    ours, plain = loss["bwa"] - loss["original"], loss["rtn"] - loss["original"]
    print(f"\nexcess on 12 windows: bwa {ours:.4f}, rtn {plain:.4f}; bwa on all {bwa['excess']:.4f}")
    assert 0 < ours <= plain / 2
