"""A plan is exact: every byte that it announces is the byte that `quantize` writes, and it reads no weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import bitwright
import support
from bitwright.artifact.shards import DTYPE_NAMES
from bitwright.errors import RecipeError
from conftest import MODELS

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    *[(model, preset, {}) for model in MODELS for preset in ("bwa", "rtn")],
    *[(model, "bwa", {"weights.outliers": 0}) for model in MODELS],
    ("llama", "bwa", {"weights.bits": 1}),
    ("mistral", "bwa", {"weights.bits": 3, "weights.group": 32}),
    ("qwen2", "bwa", {"weights.order": "none"}),
    ("qwen2", "bwa", {"weights.order": "none", "weights.outliers": 0}),
    ("llama", "bwa", {"weights.outliers": 0, "weights.order": "none", "weights.group": 64}),
    ("mistral", "bwa", {"weights.group": 64}),
    ("mistral", "bwa", {"outer.embedding": 4, "outer.head": 8, "outer.group": 40}),
    ("llama", "bwa", {"outer.embedding": 8, "outer.head": 8}),
    ("llama_sharded", "rtn", {"outer.head": 4}),
    ("mistral", "rtn", {"weights.group": 64, "weights.outliers": 5}),
    ("llama", "gptq", {"weights.symmetric": True, "weights.group": 0}),
    ("qwen2", "gptq", {"weights.bits": 8, "weights.order": "descending"}),
    ("llama_biases", "rtn", {"weights.bits": 4, "weights.outliers": 0, "weights.order": "descending"}),
    ("mistral", "rtn", {"transform.hadamard": "group", "weights.group": 24, "weights.outliers": 0}),
    ("llama", "billm", {}),
    ("qwen2", "billm", {"weights.group": 24, "weights.outliers": "auto", "activations": {}, "kv": {}}),
    ("mistral", "atom", {}),
    ("llama_biases", "atom", {"weights.bits": 2, "weights.group": 32}),
]


def bits_by_hand(artifact: Path) -> tuple[float, float]:
    """(bits a weight of the linears, bits a parameter of the whole model) from the files of an artifact alone.

    Counted for a linear: all its tensors but the bias and the empty `weight`. A parameter of the whole model: a weight
    of a linear, of an embedding or head, an element of a bias, and an element of every tensor that is kept as it is.
    """
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    layers, outer = config["layers"], config.get("outer", {})
    linear_bytes = linear_weights = 0
    kept = sum(spec["rows"] * spec["columns"] for spec in outer.values())
    for name, entry in support.read_tensors(artifact).items():
        layer, _, part = name.rpartition(".")
        if layer in outer:
            assert part in ("codes", "scales", "weight")
        elif layer not in layers or part == "bias":
            kept += len(entry.raw) // {"F32": 4, "F16": 2, "BF16": 2}[entry.dtype]
        elif part == "weight":
            assert entry.raw == b""
        else:
            linear_bytes += len(entry.raw)
    linear_weights = sum(spec["rows"] * spec["columns"] for spec in layers.values())
    files = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    return linear_bytes * 8 / linear_weights, files * 8 / (linear_weights + kept)


@pytest.mark.parametrize(("model", "preset", "options"), OPTIONS)
def test_plan_is_exact_to_the_byte(
    model: str, preset: str, options: dict[str, Any], models: dict[str, Path], artifact: Callable[..., Path]
) -> None:
    made = artifact(model, preset, options)
    recipe = bitwright.preset(preset).with_options(support.SMALL | options)
    plan = bitwright.plan(models[model], recipe)

    # The files.
    assert {path.name: path.stat().st_size for path in made.glob("*.safetensors")} == dict(
        zip(plan.shard_names(), plan.shard_bytes, strict=True)
    )
    assert plan.total_bytes == sum(path.stat().st_size for path in made.glob("*.safetensors"))

    # Every tensor: its shard, dtype, shape and bytes.
    for shard, shapes in zip(plan.shard_names(), plan.shards, strict=True):
        entries = support.read_safetensors(made / shard)
        assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
            name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in shapes.items()
        }
    stored = support.read_tensors(made)
    assert plan.tensor_bytes == sum(len(entry.raw) for entry in stored.values())
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    assert index["weight_map"] == {name: entry.file for name, entry in stored.items()}

    # Every linear of the original is in the plan, with its shape, and none of its weights is in the artifact.
    original = support.read_tensors(models[model])
    linears = {name.removesuffix(".weight") for name in original if "proj.weight" in name}
    assert {layer.name for layer in plan.layers} == linears
    for layer in plan.layers:
        assert (layer.spec.rows, layer.spec.columns) == original[f"{layer.name}.weight"].shape
        own = {
            name: len(entry.raw)
            for name, entry in stored.items()
            if name.startswith(f"{layer.name}.") and not name.endswith((".bias", ".weight"))
        }
        assert layer.bytes == sum(own.values())
        assert layer.bits_per_weight == layer.bytes * 8 / (layer.spec.rows * layer.spec.columns)

    # What is kept is byte for byte what the checkpoint held: embeddings, norms, heads, biases.
    for name, entry in stored.items():
        if name in original and entry.shape != (0,):
            assert (entry.dtype, entry.shape, entry.raw) == (
                original[name].dtype,
                original[name].shape,
                original[name].raw,
            )
    assert set(plan.kept) <= set(original)

    # Honest bits, from the files.
    assert (plan.linear_bits, plan.model_bits) == pytest.approx(bits_by_hand(made), rel=1e-12)
    assert plan.original_bytes == sum(path.stat().st_size for path in models[model].glob("*.safetensors"))


def test_options_change_what_they_should(models: dict[str, Path]) -> None:
    def bits(**options: Any) -> float:
        changes = {f"weights.{key}": value for key, value in options.items()}
        return bitwright.plan(models["mistral"], bitwright.preset("bwa").with_options(changes)).linear_bits

    assert bits(bits=1) < bits(bits=2) < bits(bits=3)
    assert bits(outliers=0) < bits(outliers=16) < bits(outliers=32)
    assert bits(group=128) < bits(group=64)
    assert bits(outliers=0, order="none") < bits(outliers=0)
    # A site has one permutation, whatever the number of its linears.
    plan = bitwright.plan(models["mistral"], bitwright.preset("bwa"))
    owners = [name for name in plan.shards[1] if name.endswith(".permutation")]
    assert len(owners) == 4


def test_json_is_one_object_with_the_same_numbers(models: dict[str, Path]) -> None:
    outcome = support.run_cli("plan", models["mistral"], "--preset", "rtn", "--outliers", "8", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    recipe = bitwright.preset("rtn").with_options({"weights.outliers": 8})
    plan = bitwright.plan(models["mistral"], recipe)
    said = outcome.json
    assert said == json.loads(json.dumps(plan.to_dict()))
    assert said["shards"] == dict(zip(plan.shard_names(), plan.shard_bytes, strict=True))
    assert said["linear_bits"] == plan.linear_bits
    assert len(said["layers"]) == 14
    assert all(layer["outliers"] == 8 for layer in said["layers"])


def test_little_calibration_is_said(models: dict[str, Path]) -> None:
    """140 inputs are the most here: 8 tokens for each are 1,120, and 17 segments of 64 are 1,088."""
    notes = {
        (preset, count): bitwright.plan(
            models["llama"],
            bitwright.preset(preset).with_options({"calibration.sequences": count, "calibration.length": 64}),
        ).notes
        for preset, count in [("bitwright", 17), ("bitwright", 18), ("rtn", 1)]
    }
    *others, note = notes["bitwright", 17]
    for part in ("1,088 tokens", "140 inputs", "calibration.sequences = 18"):
        assert part in note
    assert notes["bitwright", 18] == tuple(others)
    assert not any("calibration" in other for other in others)
    assert notes["rtn", 1] == ()


def test_a_group_without_a_matrix_is_refused(models: dict[str, Path]) -> None:
    recipe = bitwright.preset("bwa").with_options({"transform.hadamard": "group", "weights.group": 184})
    with pytest.raises(RecipeError, match=r"no matrix for group = 184; write 8 or 192"):
        bitwright.plan(models["llama"], recipe)


def test_wgm_says_what_its_authors_count(models: dict[str, Path]) -> None:
    """Signs and 32 means of 16 bits a matrix, beside signs, groups and the stored table."""
    plan = bitwright.plan(models["llama"], bitwright.preset("wgm"))
    weights = plan.linear_weights
    assert plan.claimed_bits == pytest.approx((weights + 16 * 32 * len(plan.layers)) / weights)
    assert plan.linear_bits > plan.claimed_bits + 5
    assert bitwright.plan(models["llama"], bitwright.preset("bwa")).claimed_bits is None
    outcome = support.run_cli("plan", models["llama"], "--preset", "wgm")
    assert f"{plan.claimed_bits:.4f} by the method's own formula" in outcome.out


def test_billm_says_what_its_authors_count(models: dict[str, Path], artifact: Callable[..., Path]) -> None:
    """One sign a weight and two in salient columns, known once they are found: on the card, beside the bytes."""
    made = artifact("llama", "billm")
    plan = bitwright.plan(models["llama"], bitwright.preset("billm"))
    layers = json.loads((made / "bitwright_manifest.json").read_text())["layers"]
    entries = support.read_tensors(made)
    for layer in layers:
        bitmap = entries[f"{layer['linear']}.salient"].raw
        assert layer["salient"] == sum(byte.bit_count() for byte in bitmap) > 0
    salient = sum(layer["shape"][0] * layer["salient"] for layer in layers)
    claimed = plan.claimed_after(layers)
    assert claimed == pytest.approx(1 + salient / plan.linear_weights)
    assert plan.claimed_bits is None
    card = (made / "README.md").read_text()
    assert f"| {claimed:.4f} a weight" in card
    assert f"| {plan.linear_bits:.4f} a weight | {plan.linear_bytes:,} |" in card
    assert plan.linear_bits == pytest.approx(bits_by_hand(made)[0], rel=1e-12)
    assert plan.linear_bits > 2.7


def test_table_names_every_linear(models: dict[str, Path]) -> None:
    outcome = support.run_cli("plan", models["llama_biases"], "--set", "weights.outliers=4", "--threads", "1")
    assert outcome.code == 0
    plan = bitwright.plan(models["llama_biases"], bitwright.preset("bwa").with_options({"weights.outliers": 4}))
    for layer in plan.layers:
        assert layer.name in outcome.out
    assert f"{plan.linear_bits:.4f} bits a weight" in outcome.out
    assert f"{plan.total_bytes:,} bytes" in outcome.out


@pytest.mark.parametrize("model", ["llama", "llama_sharded"])
def test_plan_reads_no_weights(model: str, models: dict[str, Path], model_copy: Callable[[str], Path]) -> None:
    """With every weight overwritten by zeros and then by NaN, the plan is the same."""
    copy = model_copy(model)
    expected = bitwright.plan(models[model], bitwright.preset("bwa")).to_dict() | {"model": copy.name}
    for fill in (b"\x00", b"\xff"):
        for path in copy.glob("*.safetensors"):
            data = path.read_bytes()
            start = 8 + struct.unpack("<Q", data[:8])[0]
            path.write_bytes(data[:start] + fill * (len(data) - start))
        assert bitwright.plan(copy, bitwright.preset("bwa")).to_dict() == expected


def test_tensors_that_the_model_does_not_have_are_named(
    models: dict[str, Path], model_copy: Callable[[], Path]
) -> None:
    """Left out, counted nowhere, and said so: never silent."""
    copy = model_copy()
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(entries: dict[str, Any]) -> None:
        entries[rotary] = ("F32", (6,), b"\x00" * 24)

    support.rewrite_safetensors(copy / "model.safetensors", add)
    plan = bitwright.plan(copy, bitwright.preset("bwa"))
    assert plan.ignored == (rotary,)
    assert plan.total_bytes == bitwright.plan(models["llama"], bitwright.preset("bwa")).total_bytes
    outcome = support.run_cli("plan", copy)
    assert outcome.code == 0
    assert "1 tensors of the files are left out" in outcome.out
    assert rotary in outcome.out


def test_memory_of_merging_from_single_entries_is_planned(tmp_path: Path) -> None:
    """Greedy WGM takes some hundred bytes a weight of the matrices that are solved at the same time."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    model = support.save_model(tmp_path / "model", config, torch.bfloat16, 1)

    def peak(levels: str, threads: int) -> int:
        recipe = bitwright.preset("wgm").with_options({"weights.levels": levels, "calibration.length": 8})
        return bitwright.plan(model, recipe, threads=threads).peak_memory

    for threads in (1, 2):
        assert peak("greedy", threads) - peak("windowed", threads) > threads * 100 * 256 * 512
