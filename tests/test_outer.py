"""Embedding and head in 8 and 4 bits, from the command line to the logits: untied, tied, kept, refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
import simulation
import support
from bitwright.errors import ArtifactError
from bitwright.evaluation import load
from bitwright.outer import quantize_outer
from bitwright.runtime import QuantizedEmbedding, QuantizedHead

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
OPTIONS = [
    ("mistral", 8, 8),
    ("mistral", 4, 8),
    ("llama_sharded", 16, 4),
    ("llama_sharded", 4, 16),
    ("llama", 8, 8),
    ("qwen2", 4, 4),
]
IDS = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def options(embedding: int, head: int, group: int = 32) -> dict[str, Any]:
    return {"outer.embedding": embedding, "outer.head": head, "outer.group": group}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize(("name", "embedding", "head"), OPTIONS)
def test_stored_and_loaded(
    name: str, embedding: int, head: int, models: dict[str, Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """What is stored is the rounding of the original's matrices; what is loaded computes with it; saved again, the
    same bytes."""
    directory = artifact(name, "bwa", options(embedding, head))
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["requires"] == ["outer"]
    tied = name in ("llama", "qwen2")
    wanted = {EMBEDDING: embedding} | ({} if tied else {HEAD: head})
    wanted = {module: bits for module, bits in wanted.items() if bits < 16}
    assert {module: spec["bits"] for module, spec in config["outer"].items()} == wanted

    stored, original = support.read_tensors(directory), load(models[name], "float32").state_dict()
    model = bitwright.load(directory)
    for module, bits in wanted.items():
        expected = quantize_outer(original[f"{module}.weight"], bits, 32)
        for part, tensor in expected.tensors().items():
            assert torch.equal(simulation.as_tensor(stored[f"{module}.{part}"]), tensor)
        assert stored[f"{module}.weight"].shape == (0,)
        assert torch.equal(model.get_submodule(module).matrix().dequantize(), expected.dequantize())
    assert f"{HEAD}.weight" not in stored or not tied
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) == (embedding < 16)
    assert isinstance(model.lm_head, QuantizedHead) == (head < 16)

    model.save_pretrained(tmp_path / "again")
    after = support.read_tensors(tmp_path / "again")
    assert after.keys() == stored.keys()
    for module in wanted:
        for part in ("codes", "scales"):
            entry, before = after[f"{module}.{part}"], stored[f"{module}.{part}"]
            assert (entry.dtype, entry.shape, entry.raw) == (before.dtype, before.shape, before.raw)
    assert torch.equal(logits(bitwright.load(tmp_path / "again")), logits(model))

    plain = bitwright.load(directory).dequantize()
    assert type(plain.model.embed_tokens) is torch.nn.Embedding
    assert type(plain.lm_head) is torch.nn.Linear
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    for module in wanted:
        assert torch.equal(plain.get_submodule(module).weight, model.get_submodule(module).matrix().dequantize())


@pytest.mark.parametrize(("name", "embedding", "head"), [("mistral", 4, 8), ("qwen2", 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_keep_the_integers(
    name: str, embedding: int, head: int, dtype: torch.dtype, artifact: Callable[..., Path]
) -> None:
    directory = artifact(name, "bwa", options(embedding, head))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    cast = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(dtype)
    stored = support.read_tensors(directory)
    for model in (loaded, cast):
        outer = model.get_input_embeddings()
        assert outer.weight.dtype == dtype
        for part, tensor in outer.matrix().tensors().items():
            assert torch.equal(tensor, simulation.as_tensor(stored[f"{EMBEDDING}.{part}"]))
        assert model(IDS).logits.dtype == torch.float32
    # `to` casts the rotary tables as well, which the first position does not feel.
    assert torch.equal(logits(loaded)[:, 0], logits(cast)[:, 0])


def test_command_line(models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path) -> None:
    """plan, quantize, verify, generate, eval; a damaged code is found."""
    out = tmp_path / "out"
    asked = ["--preset", "bwa", "--set", "outer.embedding=4", "--set", "outer.head=8"]
    plan = support.run_cli("plan", models["mistral"], *asked, "--json").json
    assert {name: entry["bits"] for name, entry in plan["outer"].items()} == {EMBEDDING: 4, HEAD: 8}
    assert plan["outer"][HEAD]["bytes"] == 300 * (96 + 2)
    assert plan["outer"][HEAD]["bits_per_weight"] == pytest.approx(8 * 98 / 96)
    whole = support.run_cli("plan", models["mistral"], "--preset", "bwa", "--json").json
    assert plan["model_bits"] < whole["model_bits"]
    assert whole["total_bytes"] - plan["total_bytes"] == pytest.approx(300 * (2 * 192 - 98 - 50), abs=400)
    assert f"{8 * 98 / 96:.4f} bits a weight" in support.run_cli("plan", models["mistral"], *asked).out

    small = ["--sequences", "4", "--length", "64"]
    words = ["quantize", models["mistral"], out, "--calib", calibration_file, *small, *asked]
    made = support.run_cli(*words, "--eval-text", evaluation_file, "--eval-windows", "4", "--json")
    assert made.code == 0, made.err
    assert made.json["model_bits"] == plan["model_bits"]
    card = (out / "README.md").read_text()
    assert f"| of these `{HEAD}`: codes, scales | {8 * 98 / 96:.4f} a weight | {300 * 98:,} |" in card
    assert support.run_cli("verify", out).code == 0
    assert support.run_cli("generate", out, "Ba ren.", "--max-new-tokens", "4").code == 0
    said = support.run_cli("eval", out, "--text", evaluation_file, "--windows", "4", "--window", "64", "--json")
    assert said.code == 0, said.err

    support.flip_bit(out / "model-00001-of-00003.safetensors", -1)
    outcome = support.run_cli("verify", out)
    assert outcome.code == 1
    assert EMBEDDING in outcome.out + outcome.err or HEAD in outcome.out + outcome.err


def test_the_run_measures_what_it_stores(models: dict[str, Path], calibration: Any, tmp_path: Path) -> None:
    """`excess` of the run is that of quantized embedding and head too, and the original is the original."""
    found = {}
    for bits in (16, 4):
        recipe = bitwright.preset("bwa").with_options(support.SMALL | options(bits, bits))
        made = bitwright.quantize(models["qwen2"], tmp_path / str(bits), recipe, calibration, threads=1)
        found[bits] = made.measured["calibration"]
    assert found[4]["loss_original"] == pytest.approx(found[16]["loss_original"], rel=1e-6)
    assert found[4]["loss_quantized"] != pytest.approx(found[16]["loss_quantized"], rel=1e-4)


def test_defaults_change_nothing() -> None:
    """An artifact without quantized outer matrices says nothing of them: its bytes are those of earlier versions."""
    recipe = bitwright.preset("bwa")
    assert "outer" not in recipe.to_dict()
    asked = recipe.with_options({"outer.head": 8})
    assert asked.to_dict()["outer"] == {"embedding": 16, "head": 8, "group": 128}
    assert bitwright.Recipe.from_dict(asked.to_dict()) == asked


def test_resizing_is_refused(artifact: Callable[..., Path]) -> None:
    model = bitwright.load(artifact("mistral", "bwa", options(8, 8)))
    assert model.resize_token_embeddings(300) is model.get_input_embeddings()
    with pytest.raises(ArtifactError, match="keeps its 300 tokens; resize the original model"):
        model.resize_token_embeddings(301)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", ["outer.head=8"], ["tied to its embedding", "write outer.embedding=8 outer.head=8"]),
        ("llama", ["outer.head=4", "outer.embedding=8"], ["write outer.embedding=4 outer.head=4"]),
        ("mistral", ["outer.head=5"], ["outer.head = 5"]),
        ("mistral", ["outer.head=8", "outer.group=12"], ["outer: group = 12 is not a multiple of 8"]),
        ("mistral", ["outer.heads=8"], ["did you mean 'head'?"]),
    ],
)
def test_recipes_that_cannot_be(name: str, changes: list[str], words: list[str], models: dict[str, Path]) -> None:
    outcome = support.run_cli("plan", models[name], *[part for change in changes for part in ("--set", change)])
    assert outcome.code == 1
    for word in words:
        assert word in outcome.message


def test_weights_that_no_scale_reaches(model_copy: Callable[..., Path], calibration_file: Path, tmp_path: Path) -> None:
    copy = model_copy("llama")

    def spoil(entries: dict[str, Any]) -> None:
        dtype, shape, raw = entries[f"{EMBEDDING}.weight"]
        entries[f"{EMBEDDING}.weight"] = (dtype, shape, struct.pack("<f", 1e38) + raw[4:])

    support.rewrite_safetensors(copy / "model.safetensors", spoil)
    outcome = support.run_cli(
        *["quantize", copy, tmp_path / "out", "--calib", calibration_file, "--sequences", "2", "--length", "32"],
        *["--set", "outer.embedding=8", "--set", "outer.head=8"],
    )
    assert outcome.code == 1
    assert f"{EMBEDDING}.weight cannot be quantized to 8 bits: its weights reach 1e+38" in outcome.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_a_checkpoint_that_holds_the_tied_head_too(
    equal: bool, model_copy: Callable[..., Path], calibration: Any, tmp_path: Path
) -> None:
    copy = model_copy("llama")

    def add(entries: dict[str, Any]) -> None:
        dtype, shape, raw = entries[f"{EMBEDDING}.weight"]
        entries[f"{HEAD}.weight"] = (dtype, shape, raw if equal else raw[4:] + raw[:4])

    support.rewrite_safetensors(copy / "model.safetensors", add)
    recipe = bitwright.preset("bwa").with_options(support.SMALL | options(8, 8))
    if not equal:
        with pytest.raises(bitwright.BitwrightError, match=r"lm_head.weight holds other numbers"):
            bitwright.quantize(copy, tmp_path / "out", recipe, calibration)
        return
    bitwright.quantize(copy, tmp_path / "out", recipe, calibration, threads=1)
    assert f"{HEAD}.weight" not in support.read_tensors(tmp_path / "out")
    model = bitwright.load(tmp_path / "out")
    assert model.lm_head.matrix().codes is model.model.embed_tokens.codes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda outer: outer.update({"model.norm": outer[HEAD]}), "model.norm as embedding or head"),
        (lambda outer: outer[HEAD].update(bits=7), "bits = 7"),
        (lambda outer: outer[HEAD].update(rows=299), "lm_head"),
        (lambda outer: outer[HEAD].pop("group"), "without group"),
    ],
)
def test_damaged_descriptions(change: Any, words: str, artifact: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(artifact("mistral", "bwa", options(8, 8)), tmp_path / "copy"))
    support.edit_json(directory / "config.json", lambda config: change(config["quantization_config"]["outer"]))
    outcome = support.run_cli("generate", directory, "Ba.", "--max-new-tokens", "1")
    assert outcome.code == 1
    assert words in outcome.message


def test_the_lean_path_is_taken(artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model with a quantized embedding and head decodes on the lean path, to transformers' tokens."""
    from bitwright import native
    from bitwright.runtime.decoder import Decoder

    if native.find() is None:
        pytest.skip("built without native kernels")
    model = bitwright.load(artifact("mistral", "bwa", options(8, 8)))
    assert Decoder.why_not(model) is None
    ours = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    model.model.__dict__.pop("forward")
    assert torch.equal(model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False), ours)
