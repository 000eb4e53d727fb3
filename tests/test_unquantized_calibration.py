"""`calibration.quantizers=false`: weights are solved as if nothing else were quantized, measured as they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright.calibration import Text, text_of

OFF = {"calibration.quantizers": False}
# The recipe of QuaRot's paper as options (docs/methods.md), with fewer bits, so that it shows whether inputs have them.
PAPER: dict[str, Any] = support.SMALL | {
    "weights.group": 0,
    "weights.symmetric": True,
    "weights.scale": "max",
    "weights.range": "mse",
    "activations.symmetric": True,
    "activations.bits": 3,
    "kv.clip": 0.95,
    "calibration.reforward": True,
}


def shards(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in support.tree(directory).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("model", "preset", "options"),
    [
        ("mistral", "quarot", PAPER),
        ("llama", "bwa", support.SMALL),
        ("qwen2", "bwa", support.SMALL | {"activations": None, "kv.bits": 2}),
    ],
)
def test_solved_without_and_measured_with_quantizers(
    model: str,
    preset: str,
    options: dict[str, Any],
    models: dict[str, Path],
    calibration: Text,
    evaluation_file: Path,
    tmp_path: Path,
) -> None:
    usual = bitwright.preset(preset).with_options(options)
    text = text_of("evaluation", evaluation_file.read_text())
    recipes = {
        "usual": usual,
        "deferred": usual.with_options(OFF),
        "plain": usual.with_options({"activations": None, "kv": None}),
    }
    made = {
        name: bitwright.quantize(
            models[model], tmp_path / name, recipe, calibration, evaluation=text, evaluation_windows=3
        )
        for name, recipe in recipes.items()
    }
    assert shards(tmp_path / "deferred") == shards(tmp_path / "plain")
    assert shards(tmp_path / "deferred") != shards(tmp_path / "usual")
    # What the run measures of itself is the artifact in use, its inputs and cache quantized.
    lost = {name: result.measured["evaluation"]["loss_quantized"] for name, result in made.items()}
    ours = bitwright.evaluate(tmp_path / "deferred", text, window=64, limit=3).loss
    difference = abs(lost["deferred"] - lost["plain"])
    assert difference > 1e-3
    assert ours == pytest.approx(lost["deferred"], abs=difference / 3)
    assert bitwright.verify(tmp_path / "deferred") == []
