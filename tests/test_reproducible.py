"""The same inputs give the same directory, byte for byte, with any number of threads; another seed another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitwright
import support
from bitwright.calibration import Text, read_text

TARGETS = {"weights.refine": 2, "calibration.reforward": True, "calibration.asymmetry": 1.0, "weights.levels": "dp"}


@pytest.mark.parametrize(
    ("model", "preset", "options"),
    [
        ("llama_biases", "bwa", {}),
        ("mistral", "bwa", {}),
        ("mistral", "bwa", TARGETS),
        ("mistral", "billm", {"kv": {}}),
    ],
)
def test_threads_and_repetition(
    model: str,
    preset: str,
    options: dict[str, object],
    models: dict[str, Path],
    calibration: Text,
    evaluation_file: Path,
    tmp_path: Path,
) -> None:
    recipe = bitwright.preset(preset).with_options({**support.SMALL, **options})
    made = {}
    for name, threads in (("one", 1), ("two", 2), ("three", 3), ("again", 2)):
        (tmp_path / name).mkdir()
        bitwright.quantize(
            models[model],
            tmp_path / name / "out",
            recipe,
            calibration,
            evaluation=read_text([evaluation_file]),
            evaluation_windows=5,
            threads=threads,
        )
        made[name] = support.tree(tmp_path / name / "out")
    assert made["one"] == made["two"] == made["three"] == made["again"]
    assert len(made["one"]) >= 9


def test_many_rows_and_tokens(calibration: Text, tmp_path: Path) -> None:
    """More rows than one unit of solving and more tokens than one wave of statistics: still no trace of the threads."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=80,
        intermediate_size=600,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    import torch

    model = support.save_model(tmp_path / "model", config, torch.float32, 8)
    recipe = bitwright.preset("bwa").with_options({"calibration.sequences": 20, "calibration.length": 512})
    support.assert_threads_do_not_show(model, recipe, calibration, tmp_path)


def test_another_seed_differs(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    shards = {}
    for seed in (0, 1):
        recipe = bitwright.preset("bwa").with_options(support.SMALL | {"calibration.seed": seed})
        bitwright.quantize(models["llama"], tmp_path / str(seed), recipe, calibration)
        shards[seed] = support.tree(tmp_path / str(seed))
    name = "model-00002-of-00003.safetensors"
    assert shards[0][name] != shards[1][name]
    # What is kept does not depend on the text.
    assert shards[0]["model-00001-of-00003.safetensors"] == shards[1]["model-00001-of-00003.safetensors"]


def test_nothing_of_time_or_place_is_written(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    recipe = bitwright.preset("rtn").with_options(support.SMALL)
    bitwright.quantize(models["llama"], tmp_path / "out", recipe, calibration)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    manifest = json.loads((tmp_path / "out" / "bitwright_manifest.json").read_text())
    assert not any("seconds" in layer for layer in manifest["layers"])


def test_recipe_from_file_and_from_options_are_one(
    models: dict[str, Path], calibration_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            {"weights": {"levels": "dp", "outliers": 8}, "kv": None, "calibration": {"sequences": 2, "length": 32}}
        )
    )
    common = ["--calib", calibration_file]
    one = support.run_cli("quantize", models["llama"], tmp_path / "1", *common, "--recipe", tmp_path / "recipe.json")
    two = support.run_cli(
        *["quantize", models["llama"], tmp_path / "2", *common, "--preset", "bwa", "--set", "weights.levels=dp"],
        *["--set", "kv=none", "--outliers", "8", "--sequences", "2", "--length", "32", "--log", tmp_path / "two.jsonl"],
    )
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert support.tree(tmp_path / "1") == support.tree(tmp_path / "2")
    assert (tmp_path / "two.jsonl").exists()
    assert not (tmp_path / "2.log.jsonl").exists()


def test_calibration_files_may_follow_each_other(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path
) -> None:
    """`--calib A B` and `--calib A --calib B` are one thing."""
    files = [calibration_file, evaluation_file]
    sizes = ["--sequences", "3", "--length", "32"]
    forms = {"follow": ["--calib", *files], "repeat": ["--calib", files[0], "--calib", files[1]]}
    for name, form in forms.items():
        outcome = support.run_cli("quantize", models["llama"], tmp_path / name, *form, *sizes)
        assert outcome.code == 0, outcome.stderr
    assert support.tree(tmp_path / "follow") == support.tree(tmp_path / "repeat")
    said = f"{calibration_file.name}+{evaluation_file.name}"
    assert said in (tmp_path / "follow" / "README.md").read_text(encoding="utf-8")
