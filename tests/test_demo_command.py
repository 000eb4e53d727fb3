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
def demo(kept: Path) -> dict[str, Any]:
    """`bitwright demo`, once, with less calibration than it has by default."""
    if not (MODEL / "model.safetensors").exists():
        pytest.skip("the demo model is not in this checkout")
    outcome = support.run_cli("demo", "--json", "--set", "calibration.sequences=6", "--out", kept)
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_demo_says_everything(demo: dict[str, Any]) -> None:
    assert set(demo) >= {
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
    before, after = demo["original"], demo["quantized"]
    assert before["text_sha256"] == after["text_sha256"]
    assert before["tokens"] == after["tokens"]
    assert "nothing quantized" in before["protocol"]
    assert "weights 2 to 3-bit bitwright, activations 4-bit, KV cache 4-bit" in after["protocol"]
    assert demo["excess"] == pytest.approx(math.log(after["perplexity"] / before["perplexity"]), rel=1e-6)
    assert 2 < demo["linear_bits"] < 4
    assert demo["linear_bits"] < demo["model_bits"] < demo["original_bits"]
    assert (
        demo["total_bytes"] < demo["original_bytes"] == sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    )
    assert demo["original_bytes"] <= 6_000_000
    assert set(demo["samples"]) == {"original", "quantized"}
    prompt = "The following methods are supported by"
    assert all(sample.startswith(prompt) and len(sample) > len(prompt) for sample in demo["samples"].values())


def test_out_keeps_a_whole_artifact(demo: dict[str, Any], kept: Path) -> None:
    assert demo["kept"] == str(kept)
    assert bitwright.verify(kept) == []
    assert sum(path.stat().st_size for path in kept.glob("*.safetensors")) == demo["total_bytes"]


def test_in_words(demo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints for people holds the same figures and both samples."""
    from bitwright.cli.demo import show

    show(demo)
    said = capsys.readouterr().out
    before, after = demo["original"]["perplexity"], demo["quantized"]["perplexity"]
    assert f"excess: ln({after:.3f} / {before:.3f}) = {demo['excess']:.4f}" in said
    for words in (demo["quantized"]["protocol"], demo["quantized"]["text_sha256"], f"{demo['total_bytes']:,} bytes"):
        assert words in said
    for name in ("original", "quantized"):
        assert demo["samples"][name] in said


def test_order_of_recipes(demo: dict[str, Any], kept: Path, tmp_path: Path) -> None:
    """On the first windows of the text: the paper loses at most half of what plain 2-bit weights lose, all else equal,
    and the default less than the paper."""
    paths = {"original": MODEL, "bitwright": kept}
    for name in ("bwa", "rtn"):
        recipe = bitwright.preset(name).with_options({"calibration.sequences": 6})
        paths[name] = tmp_path / name
        bitwright.quantize(MODEL, paths[name], recipe, text_of("calibration topics", corpus.calibration_text()))
    text = text_of("evaluation topics", corpus.evaluation_text())
    loss = {name: bitwright.evaluate(path, text, limit=12).loss for name, path in paths.items()}
    excess = {name: loss[name] - loss["original"] for name in ("bitwright", "bwa", "rtn")}
    print(f"\nexcess on 12 windows: {excess}; the default on all {demo['excess']:.4f}")
    assert 0 < excess["bwa"] <= excess["rtn"] / 2
    assert 0 < excess["bitwright"] <= 0.8 * excess["bwa"]
