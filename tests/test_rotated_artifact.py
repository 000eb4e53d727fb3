"""Artifacts of rotated models: what they keep, what they say, and that rotating alone changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitwright
import simulation
import support
from bitwright.calibration import text_of
from bitwright.integrations.transformers import quantized_cache
from bitwright.runtime import QuantizedKVCache, quantized_linears
from bitwright.transforms.hadamard import RandomHadamard, largest_block, matrix

Artifact = Callable[..., Path]
# Little noise in the weights and none beside; the models are sensitive to it (unrotated, they move by 0.07 to 0.14).
FINE = {
    "weights.method": "wgm",
    "weights.levels": "dp",
    "weights.bits": 8,
    "weights.penalty": 0.0,
    "weights.feedback": "none",
    "weights.group": 32,
    "activations": None,
    "kv": None,
}


@pytest.mark.parametrize("model", ["llama", "llama_biases", "mistral", "qwen2", "qwen3"])
def test_rotated_and_finely_quantized_is_the_original(model: str, models: dict[str, Path], artifact: Artifact) -> None:
    ids = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    recipe = bitwright.preset("quarot").with_options(FINE)
    expected = simulation.logits_of(bitwright.load(models[model]), ids, recipe)
    found = simulation.logits_of(bitwright.load(artifact(model, "quarot", FINE)), ids, recipe)
    assert simulation.relative_difference(found, expected) < 0.35


@pytest.mark.parametrize("model", ["llama", "llama_biases", "qwen3"])
def test_the_full_precision_stream_is_the_original(model: str, artifact: Artifact) -> None:
    """fp32 models: what a run measures before quantization does not depend on the basis."""
    losses = [
        json.loads((made / "bitwright_manifest.json").read_text())["measured"]["calibration"]["loss_original"]
        for made in (artifact(model), artifact(model, "quarot", {"weights.group": 32}))
    ]
    assert math.isclose(*losses, rel_tol=1e-5)


def test_kept_tensors_against_dense_matrices(models: dict[str, Path], artifact: Artifact) -> None:
    """llama: tied embeddings, fp32. E Q and E diag(gamma) Q, with Q written as a matrix; ones for the norms."""
    made = artifact("llama", "quarot", {"weights.group": 32})
    before, after = support.read_tensors(models["llama"]), support.read_tensors(made)
    signs = RandomHadamard(72, 72, 0).signs(torch.ones(1, dtype=torch.float64))
    q = torch.diag(signs) @ matrix(72).double() / math.sqrt(72)
    embedding, gamma = (
        simulation.as_tensor(before[f"model.{name}.weight"]).double() for name in ("embed_tokens", "norm")
    )
    assert "lm_head.weight" not in before
    for name, expected in (("model.embed_tokens", embedding @ q), ("lm_head", (embedding * gamma) @ q)):
        torch.testing.assert_close(
            simulation.as_tensor(after[f"{name}.weight"]).double(), expected, rtol=1e-5, atol=1e-6
        )
    norms = [name for name in after if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(simulation.as_tensor(after[name]), torch.ones(72)) for name in norms)


def test_config_and_plan_say_what_was_done(models: dict[str, Path], artifact: Artifact) -> None:
    options = {"weights.group": 32}
    config = json.loads((artifact("llama", "quarot", options) / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["requires"] == ["hadamard"]
    layers = config["quantization_config"]["layers"]
    turned = {
        name.removeprefix("model.layers.0."): s for name, s in layers.items() if name.startswith("model.layers.0.")
    }
    heads, head_dim, inner = 6, 12, 140
    assert turned.pop("self_attn.o_proj")["stride"] == head_dim
    assert layers["model.layers.0.self_attn.o_proj"]["hadamard"] == largest_block(heads) == 2
    down = turned.pop("mlp.down_proj")
    assert (down["hadamard"], down["stride"]) == (inner, 1)
    assert all("hadamard" not in spec for spec in turned.values())
    plan = bitwright.plan(models["llama"], bitwright.preset("quarot").with_options(support.SMALL | options))
    assert any("untied" in note and f"{300 * 72 * 4:,} bytes" in note for note in plan.notes)
    assert any("size 6 (heads): blocks of 2" in note for note in plan.notes)
    said = support.run_cli("plan", models["llama"], "--preset", "quarot", "--set", "weights.group=32")
    assert "untied" in said.out
    untied = bitwright.plan(models["mistral"], bitwright.preset("quarot"))
    assert not any("untied" in note for note in untied.notes)


def test_the_stream_of_the_run_is_the_artifacts(models: dict[str, Path], artifact: Artifact) -> None:
    """mistral is bfloat16: rotated embeddings, norms and head are rounded before the run computes with them."""
    made = artifact("mistral", "quarot", {"weights.group": 32})
    assert bitwright.verify(made) == []
    kept = support.read_tensors(made)
    assert {kept[name].dtype for name in kept if "norm" in name or "embed" in name or "lm_head" in name} == {"BF16"}


def test_keys_are_cached_turned(artifact: Artifact) -> None:
    model = bitwright.load(artifact("llama", "quarot", {"weights.group": 32}))
    cache = quantized_cache(model, bitwright.preset("quarot"))
    assert isinstance(cache, QuantizedKVCache)
    keys, values = torch.randn(1, 2, 5, 12), torch.randn(1, 2, 5, 12)
    keys[..., 3] *= 30
    got, _ = cache.update(keys, values, 0)
    plain, _ = QuantizedKVCache(1, bitwright.preset("bwa").kv).update(keys, values, 0)  # type: ignore[arg-type]
    assert simulation.relative_difference(got, keys) < 0.2
    quiet = [channel for channel in range(12) if channel != 3]
    # The step of a head follows its largest channel: unturned, the others drown in it.
    assert (got - keys)[..., quiet].norm() < 0.7 * (plain - keys)[..., quiet].norm()


def test_lean_and_transformers_forward_agree(artifact: Artifact) -> None:
    model = bitwright.load(artifact("qwen3", "quarot", {"weights.bits": 2, "weights.group": 32}))
    linears = [linear for _, linear in quantized_linears(model)]
    if any(linear.packed is None for linear in linears):
        pytest.skip("built without native kernels")
    ids = torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    recipe = bitwright.preset("quarot")
    assert "forward" in model.model.__dict__
    lean = simulation.logits_of(model, ids, recipe)
    assert (
        simulation.relative_difference(simulation.logits_of(simulation.block_by_block(model), ids, recipe), lean) < 2e-2
    )


def test_any_number_of_threads_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = bitwright.preset("quarot").with_options(support.SMALL | {"weights.group": 32})
    text = text_of("words", support.words(3000, 7))
    support.assert_threads_do_not_show(models["qwen2"], recipe, text, tmp_path)


def test_what_does_not_go_together_is_refused() -> None:
    for options, message in (
        ({"weights.outliers": "auto"}, "write weights.outliers = 0 and weights.order = 'none'"),
        ({"weights.order": "ascending"}, "write weights.outliers = 0 and weights.order = 'none'"),
        ({"transform.hadamard": "group"}, "write hadamard = 'none' or rotation = 'none'"),
    ):
        with pytest.raises(bitwright.BitwrightError, match=message):
            bitwright.preset("quarot").with_options(options)
