"""Honest bits of every method: what a run says times the weights is eight times the bytes on disk, to the byte.

Bytes are those of the tensors in the files, weights those of the original, each from the headers of the files as
`support` reads them. What the run says of itself, what the artifact says, and what the plan said before are held to
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright.calibration import Text

ALLOCATE = {"bits": [1, 2, 3, 4], "rows": 24, "tokens": 128}
SEARCH = {"weights.range": "minmax", "search.iterations": 2, "search.share": 0.02}
TUNE = {"steps": 4, "interval": 2, "batch": 3}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama_biases", "bitwright", {"allocate": None}),
    ("llama_sharded", "bitwright", {"allocate": ALLOCATE}),
    ("qwen3", "bitwright", {"allocate": ALLOCATE | {"target": 3.25, "groups": [32, 64]}}),
    ("mistral", "bitwright", {"allocate": None, "sites": {"*.down_proj": {"bits": 3}, "*.0.*": {"outliers": 0}}}),
    ("llama", "bwa", {}),
    ("qwen2", "bwa", {"tune": TUNE, "outer.embedding": 8, "outer.head": 8}),
    ("llama_biases", "rtn", {}),
    ("qwen2", "gptq", {}),
    ("llama_biases", "gptq", {"weights.group": 0, "weights.outliers": 8, "weights.order": "ascending"}),
    # Tied embeddings: the head becomes a matrix of its own.
    ("llama", "quarot", {}),
    ("mistral", "quarot", {"weights.group": 32, "weights.symmetric": True, "allocate": ALLOCATE}),
    # 140 channels: the last byte of their salience is not full.
    ("llama", "billm", {}),
    ("qwen2", "billm", {"weights.outliers": 4}),
    ("qwen3", "quarot", {"weights.group": 32, "tune": TUNE}),
    ("mistral", "atom", {}),
    ("qwen2", "atom", {"weights.rows_a_scale": 2}),
    ("mistral", "gbs", SEARCH),
    # 92 inputs become 96: zeros are stored, and are no weights of the model.
    ("odd", "gbs", SEARCH | {"weights.group": 32}),
    ("llama", "wgm", {}),
    ("odd", "wgm", {"weights.levels": "dp", "weights.bits": 2, "weights.outliers": 5}),
]


def test_every_preset_has_a_case() -> None:
    assert {preset for _, preset, _ in CASES} == set(bitwright.presets)


def elements(entries: Iterable[support.Entry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


@pytest.mark.parametrize(("model", "preset", "options"), CASES)
def test_bits_times_weights_are_the_bytes_on_disk(
    model: str, preset: str, options: dict[str, Any], models: dict[str, Path], calibration: Text, tmp_path: Path
) -> None:
    recipe = bitwright.preset(preset).with_options(support.SMALL | options)
    made = bitwright.quantize(models[model], tmp_path / "out", recipe, calibration, threads=1)
    manifest = json.loads((made.directory / "bitwright_manifest.json").read_text())
    stored = json.loads((made.directory / "config.json").read_text())["quantization_config"]

    # Counted from the files. Every matrix of the blocks is quantized; a linear has nothing on disk that is not counted
    # but its bias and the empty `weight`.
    before, after = support.read_tensors(models[model]), support.read_tensors(made.directory)
    weights = {
        name.removesuffix(".weight"): math.prod(entry.shape)
        for name, entry in before.items()
        if name.endswith("proj.weight")
    }
    sizes = dict.fromkeys(weights, 0)
    for name, entry in after.items():
        linear, _, part = name.rpartition(".")
        if linear in sizes and part != "bias":
            sizes[linear] += len(entry.raw)
    assert set(stored["layers"]) == set(weights)
    assert all(after[f"{linear}.weight"].raw == b"" for linear in weights)
    count, size = sum(weights.values()), sum(sizes.values())
    files = sum(path.stat().st_size for path in made.directory.glob("*.safetensors"))

    # What `plan` says: of the recipe as it was asked for, or where bits were chosen on the way, of what they came to.
    asked = bitwright.plan(models[model], recipe)
    settled = bitwright.Recipe.from_dict(stored["recipe"])
    plan = asked if recipe.allocate is None else bitwright.plan(models[model], settled)
    assert settled.allocate is None
    assert size <= asked.bound
    for said in (plan, made.plan):
        assert (said.linear_weights, said.linear_bytes, said.total_bytes) == (count, size, files)
        assert said.linear_bits * count == pytest.approx(8 * size, abs=1e-6)
        assert {layer.name: layer.bytes for layer in said.layers} == sizes
        assert said.parameters == elements(before.values())
        assert said.model_bits * said.parameters == pytest.approx(8 * files, abs=1e-6)

    # What the run and the artifact say.
    for layers in (made.log, manifest["layers"]):
        bits = {entry["linear"]: entry["bits"] * weights[entry["linear"]] / 8 for entry in layers if "linear" in entry}
        assert bits == pytest.approx(sizes, abs=1e-6)
    assert manifest["sizes"]["linears"] == {"parameters": count, "bytes": size}
    assert manifest["sizes"]["model"] == {"parameters": elements(before.values()), "bytes": files}
    card = (made.directory / "README.md").read_text()
    assert f"quantized linears ({count:,} weights)" in card
    assert f"| {8 * size / count:.4f} a weight | {size:,} |" in card
    assert f"| {8 * files / elements(before.values()):.4f} a parameter | {files:,} |" in card
