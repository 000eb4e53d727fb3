"""Checkpoints whose files name tensors otherwise than the model does, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import bitwright
import support
from bitwright.calibration import Text
from bitwright.errors import ModelError
from bitwright.models import Checkpoint, Skeleton


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention and MLP side by side, LayerNorms with biases, one linear for q k v, a head named `embed_out`."""
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=support.CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    return support.save_model(tmp_path_factory.mktemp("names") / "pythia", config, torch.float32, 8)


def test_a_head_by_another_name(pythia: Path, calibration: Text, tmp_path: Path) -> None:
    stored = load_file(pythia / "model.safetensors")
    assert "embed_out.weight" in stored
    assert "lm_head.weight" not in stored
    recipe = bitwright.preset("bitwright").with_options(support.SMALL | {"weights.group": 32})
    done = bitwright.quantize(pythia, tmp_path / "out", recipe, calibration)
    assert done.plan.ignored == ()
    assert bitwright.verify(tmp_path / "out") == []
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pythia, tmp_path / "out")
    )
    head = quantized.get_output_embeddings().weight
    assert torch.equal(head, stored["embed_out.weight"])
    ids = torch.arange(40).reshape(1, -1) + 20
    with torch.inference_mode():
        exact, rough = (model(ids, use_cache=False).logits for model in (original, quantized))
    assert 0 < (rough - exact).square().mean() < 0.5 * exact.square().mean()


def test_a_bare_decoder(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    """Without the prefix `model.`: the same artifact but for the digest of the original's file."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in models["llama"].iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    stored = load_file(models["llama"] / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in stored.items()}
    save_file(renamed, bare / "model.safetensors", {"format": "pt"})
    recipe = bitwright.preset("bwa").with_options(support.SMALL)
    trees = []
    for model, out in ((models["llama"], tmp_path / "whole"), (bare, tmp_path / "out")):
        bitwright.quantize(model, out, recipe, calibration)
        trees.append({name: digest for name, digest in support.tree(out).items() if name.endswith(".safetensors")})
    assert trees[0] == trees[1] != {}


def test_what_is_missing_is_still_missing(pythia: Path, tmp_path: Path) -> None:
    stored = load_file(pythia / "model.safetensors")
    stored["embed_outer.weight"] = stored.pop("embed_out.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((pythia / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"lacks 1 of the \d+ tensors of GPTNeoXForCausalLM, first lm_head.weight"):
        Skeleton(Checkpoint(tmp_path))


def test_a_comparison_leaves_out_what_does_not_fit(
    pythia: Path, calibration_file: Path, evaluation_file: Path, tmp_path: Path
) -> None:
    argv = [
        "compare",
        pythia,
        "--methods",
        "original,quarot,rtn",
        "--calib",
        calibration_file,
        "--out",
        tmp_path / "out",
    ]
    argv += ["--text", evaluation_file, "--sequences", 2, "--length", 48, "--window", 48, "--windows", 2]
    refused = support.run_cli(*argv)
    assert refused.code == 1
    assert "method 'quarot': " in refused.message
    assert "GPTNeoXForCausalLM; write transform.rotation = 'none'; --skip-unknown goes on without" in refused.message
    assert not (tmp_path / "out").exists()
    done = support.run_cli(*argv, "--skip-unknown", "--json")
    assert done.code == 0, done.err
    assert [row["label"] for row in done.json["methods"]] == ["original", "rtn"]
    assert done.json["skipped"] == ["quarot"]
