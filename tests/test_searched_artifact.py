"""Clip ratios that were searched, and sizes that were expanded: whole runs, through the command and the API."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitwright
import simulation
import support
from bitwright.calibration import Text, load_tokenizer, text_of, tokenize
from bitwright.errors import ArtifactError, BitwrightError
from bitwright.integrations.transformers import quantized_cache, recipe_of
from bitwright.pipeline.run import Silent
from bitwright.runtime import quantized_linears

Artifact = Callable[..., Path]
FAST: dict[str, Any] = {"weights.group": 32, "weights.range": "minmax", "search.iterations": 2, "search.share": 0.02}
OUTPUT = FAST | {"search.method": "golden", "search.objective": "output", "search.iterations": 4}
AMBIGUOUS = FAST | {"search.method": "ambiguous"}
BY_OUTPUT = {"search.method": "grid", "search.objective": "output"}
SITES = ("attn_in", "cache", "attn_out", "mlp_in", "mlp_out")


def config_of(artifact: Path) -> Any:
    return json.loads((artifact / "config.json").read_text())["quantization_config"]


def found_in(artifact: Path) -> list[dict[str, Any]]:
    return json.loads((artifact / "bitwright_manifest.json").read_text())["search"]


def site_of(linear: str) -> str:
    """The target that a linear's inputs are."""
    prefix, _, name = linear.rpartition(".")
    site = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "attn_out", "d": "mlp_out"}.get(name[0], "mlp_in")
    return f"{'.'.join(prefix.split('.')[:3])}.{site}"


def test_the_command(models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--set={key}={value}" for key, value in FAST.items()]
    made = support.run_cli(
        "quantize", models["llama"], out, "--calib", calibration_file, "--preset", "gbs",
        "--sequences", "6", "--length", "64", *options,
    )  # fmt: skip
    assert made.code == 0, made.err
    lines = [line for line in made.err.splitlines() if line.startswith("clip ratio ")]
    assert len(lines) == 10
    assert lines[0].startswith("clip ratio 1/10  model.layers.0.attn_in ")
    config = config_of(out)
    assert config["requires"] == ["hadamard", "clip"]
    found = found_in(out)
    assert [entry["target"] for entry in found] == [f"model.layers.{i}.{site}" for i in (0, 1) for site in SITES]
    ratios = {entry["target"]: entry["ratio"] for entry in found}
    assert config["cache"]["clips"] == [ratios["model.layers.0.cache"], ratios["model.layers.1.cache"]]
    for entry in found:
        assert [ratio for ratio, _ in entry["tried"]][:2] == [0.5, 0.25]
        assert len(entry["tried"]) == 3
        assert [entry["ratio"], entry["value"]] in entry["tried"]
    for name, spec in config["layers"].items():
        assert spec["clip"] == ratios[site_of(name)]
    card = (out / "README.md").read_text()
    assert "## Clip ratios" in card
    assert f"| model.layers.1.mlp_out | {ratios['model.layers.1.mlp_out']:.5g} |" in card
    assert support.run_cli("verify", out).code == 0
    # What the run measured of itself is what the loaded artifact measures.
    measured = support.run_cli("eval", out, "--text", evaluation_file, "--windows", "2", "--json")
    assert measured.code == 0
    assert "KV cache 3-bit" in measured.json["protocol"]
    again = support.run_cli(
        "quantize", models["llama"], out, "--calib", calibration_file, "--preset", "gbs",
        "--sequences", "6", "--length", "64", *options,
    )  # fmt: skip
    assert "already complete" in again.err


def windows_of(model: Path, calibration: Text, share: float) -> Tensor:
    tokens = tokenize(load_tokenizer(model), calibration)
    return tokens[: int(len(tokens) * share) // 64 * 64].view(-1, 64)


def loss(model: Any, windows: Tensor, clips: list[float] | None) -> float:
    """Mean loss of a packed model, its cache quantized in all layers or in none; a plain loop over transformers."""
    recipe = recipe_of(model)
    assert recipe is not None
    recipe = recipe if clips is not None else recipe.with_options({"kv": None})
    scores = simulation.logits_of(model, windows, recipe, clips)
    return sum(
        float(torch.nn.functional.cross_entropy(row[:-1], ids[1:])) for row, ids in zip(scores, windows, strict=True)
    ) / len(windows)


def test_values_are_those_of_the_loaded_artifact(
    models: dict[str, Path], calibration: Text, artifact: Artifact
) -> None:
    """The first target with nothing else quantized, and the last with everything else as it was found."""
    made = artifact("qwen2", "gbs", FAST)
    found, windows = found_in(made), windows_of(models["qwen2"], calibration, FAST["search.share"])
    clips = config_of(made)["cache"]["clips"]
    first, last = found[0], found[-1]
    model = bitwright.load(made)
    linears = dict(quantized_linears(model))
    inputs = {name: linear.activations for name, linear in linears.items()}
    for linear in linears.values():
        linear.unpack()  # what is packed keeps the ratio that it was packed with
    for ratio, value in last["tried"]:
        down = linears["model.layers.1.mlp.down_proj"]
        down.activations = inputs["model.layers.1.mlp.down_proj"].model_copy(update={"clip": ratio})
        assert loss(model, windows, clips) == pytest.approx(value, abs=2e-3)
    for ratio, value in first["tried"]:
        for name, linear in linears.items():
            mine = name.startswith("model.layers.0.self_attn") and "o_proj" not in name
            linear.activations = inputs[name].model_copy(update={"clip": ratio}) if mine else None
        assert loss(model, windows, None) == pytest.approx(value, abs=2e-3)
    # Two ratios of one target are told apart by more than that.
    values = [value for _, value in first["tried"] + last["tried"]]
    assert max(values) - min(values) > 1e-2


def test_an_ambiguous_search(models: dict[str, Path], calibration: Text, artifact: Artifact) -> None:
    """Errors of the output decide where one ratio alone is near the least; else losses do, of those in the running."""
    made = artifact("qwen2", "gbs", AMBIGUOUS)
    found, first = found_in(made), found_in(artifact("qwen2", "gbs", AMBIGUOUS | BY_OUTPUT))
    assert [entry["target"] for entry in found] == [entry["target"] for entry in first]
    assert {entry["ambiguous"] for entry in found} == {True, False}
    for entry in found:
        errors = dict(entry["errors"] if entry["ambiguous"] else entry["tried"])
        assert list(errors) == [round(1 - 0.05 * i, 2) for i in range(11)]
        running = [ratio for ratio, error in errors.items() if error <= 1.05 * min(errors.values())]
        assert entry["ambiguous"] == (len(running) > 1)
        assert [entry["ratio"], entry["value"]] in entry["tried"]
        assert entry["value"] == min(value for _, value in entry["tried"])
        if entry["ambiguous"]:
            assert [ratio for ratio, _ in entry["tried"]] == sorted({1.0, *running}, reverse=True)
    # The errors are those that a search by the output finds: the first target's of the same model.
    errors = dict(found[0]["errors"] if found[0]["ambiguous"] else found[0]["tried"])
    assert errors.items() <= dict(first[0]["tried"]).items()
    # The losses are those of the model: the last one that was ambiguous, with all that comes after it in 16 bits.
    model, clips = bitwright.load(made), config_of(made)["cache"]["clips"]
    last = next(entry for entry in reversed(found) if entry["ambiguous"])
    at = [entry["target"] for entry in found].index(last["target"])
    ratios = {entry["target"]: entry["ratio"] for entry in found[:at]}
    windows = windows_of(models["qwen2"], calibration, AMBIGUOUS["search.share"])
    linears = dict(quantized_linears(model))
    inputs = {name: linear.activations for name, linear in linears.items()}
    for linear in linears.values():
        linear.unpack()
    for ratio, value in last["tried"]:
        now = ratios | {last["target"]: ratio}
        for name, linear in linears.items():
            clip = now.get(site_of(name))
            linear.activations = None if clip is None else inputs[name].model_copy(update={"clip": clip})
        caches = [now.get(f"model.layers.{index}.cache") for index in (0, 1)]
        assert caches == clips, "this test knows a cache that is quantized in all layers"
        assert loss(model, windows, clips) == pytest.approx(value, abs=2e-3)
    card = (made / "README.md").read_text()
    words = {True: "loss", False: "error"}
    for entry in found:
        assert (
            f"| {entry['target']} | {entry['ratio']:.5g} | {words[entry['ambiguous']]} {entry['value']:.6g} |" in card
        )


def test_an_ambiguous_search_measures_on_sixteen_windows(
    models: dict[str, Path], calibration_file: Path, artifact: Artifact
) -> None:
    """However long the text is, and the plan says how much is asked at most."""
    short = AMBIGUOUS | {"calibration.length": 16, "kv": None}
    long, longer = (artifact("llama", "gbs", short | {"search.share": share}) for share in (0.1, 0.2))
    assert found_in(long) == found_in(longer)
    assert found_in(long) != found_in(artifact("llama", "gbs", short | {"search.share": 0.01}))
    options = [f"--set={key}={value}" for key, value in AMBIGUOUS.items()]
    planned = support.run_cli("plan", models["llama"], "--preset", "gbs", *options)
    assert planned.code == 0, planned.err
    said = " ".join(planned.out.split())
    assert "10 searches of 11 evaluations of the output's error and up to 11 of the perplexity on at most 16" in said


def test_the_run_measures_what_evaluation_measures(
    models: dict[str, Path], calibration: Text, evaluation_file: Path, tmp_path: Path
) -> None:
    recipe = bitwright.preset("gbs").with_options(support.SMALL | OUTPUT)
    text = text_of("evaluation", evaluation_file.read_text())
    result = bitwright.quantize(
        models["mistral"], tmp_path / "out", recipe, calibration, evaluation=text, evaluation_windows=3
    )
    ours = bitwright.evaluate(tmp_path / "out", text, window=64, limit=3).loss
    # bfloat16 embeddings, and activations of 3 bits, whose codes flip at the last digit.
    assert ours == pytest.approx(result.measured["evaluation"]["loss_quantized"], abs=2e-2)


@pytest.mark.parametrize(
    ("model", "preset", "options"),
    [
        ("llama", "gbs", FAST),
        ("qwen3", "gbs", OUTPUT),
        # 2-bit inputs and cache: so coarse that any ratio below 1 is better here, whatever the last digits.
        ("qwen3", "gbs", FAST | {"search.method": "global", "activations.bits": 2, "kv.bits": 2}),
        ("mistral", "gbs", OUTPUT | {"transform.expansion": "power"}),
        ("qwen2", "gbs", OUTPUT | {"transform.expansion": "power", "search.method": "grid"}),
        # With outliers and an order, on the kernels; one of the two quantizers alone.
        ("llama", "bwa", {key: value for key, value in OUTPUT.items() if key.startswith("search")}),
        ("qwen2", "bwa", OUTPUT | {"activations": None, "kv.bits": 2}),
        ("mistral", "rtn", OUTPUT | {"kv": None, "activations.balance": "none", "activations.bits": 3}),
    ],
)
def test_packed_and_simulated_agree(
    model: str, preset: str, options: dict[str, Any], models: dict[str, Path], calibration: Text, artifact: Artifact
) -> None:
    made = artifact(model, preset, options)
    packed = simulation.block_by_block(bitwright.load(made))
    native = any(linear.packed is not None for _, linear in quantized_linears(packed))
    simulated, recipe = simulation.simulate(models[model], made, "kernels" if native else "site")
    clips = config_of(made).get("cache", {}).get("clips")
    ids = windows_of(models[model], calibration, 0.02)[:2]
    ours, theirs = (simulation.logits_of(one, ids, recipe, clips) for one in (packed, simulated))
    assert simulation.relative_difference(ours, theirs) <= 1e-3
    # The ratios are part of it: without them the same model is far off.
    assert {spec.get("clip", 1.0) for spec in config_of(made)["layers"].values()} | set(clips or ()) != {1.0}
    if clips and any(ratio != 1.0 for ratio in clips):
        assert simulation.relative_difference(simulation.logits_of(simulated, ids, recipe), ours) > 1e-2


@pytest.mark.parametrize(
    ("model_name", "preset", "options"),
    [
        ("qwen3", "gbs", OUTPUT | {"weights.bits": 2, "activations.bits": 4}),
        # All blocks of a step in one native call.
        ("llama", "bwa", {key: OUTPUT[key] for key in OUTPUT if key.startswith("search")} | {"kv.bits": 3}),
    ],
)
def test_lean_and_transformers_forward_agree(
    model_name: str, preset: str, options: dict[str, Any], artifact: Artifact
) -> None:
    """On the kernels: four-bit inputs of two-bit weights, each site with a ratio of its own, caches of three bits."""
    made = artifact(model_name, preset, options)
    assert set(config_of(made)["cache"]["clips"]) != {1.0}
    model = bitwright.load(made)
    if any(linear.packed is None for _, linear in quantized_linears(model)):
        pytest.skip("built without native kernels")
    ids = torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    recipe = recipe_of(model)
    assert recipe is not None
    assert "forward" in model.model.__dict__

    def logits() -> Tensor:
        with torch.inference_mode():
            return model(ids, past_key_values=quantized_cache(model, recipe), use_cache=True).logits

    lean = logits()
    assert simulation.relative_difference(simulation.block_by_block(model) and logits(), lean) < 2e-2


class BreakAt(Silent):
    """Raises when so many targets are found."""

    def __init__(self, at: int) -> None:
        self.at, self.found = at, list[str]()

    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        if found:
            self.found.append(found["target"])
            if done == self.at:
                raise KeyboardInterrupt
        elif done > self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [FAST, OUTPUT, AMBIGUOUS])
def test_broken_off_it_goes_on_to_the_same_bytes(
    options: dict[str, Any], models: dict[str, Path], calibration: Text, artifact: Artifact, tmp_path: Path
) -> None:
    recipe = bitwright.preset("gbs").with_options(support.SMALL | options)

    def run(reporter: Silent, threads: int) -> None:
        bitwright.quantize(models["qwen2"], tmp_path / "out", recipe, calibration, threads=threads, reporter=reporter)

    done: list[str] = []
    for at in (1, 4, 6.5, 10):
        breaking = BreakAt(at)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run(breaking, 1)
        done += breaking.found
    run(last := BreakAt(99), 3)
    done += last.found
    assert done == [entry["target"] for entry in found_in(tmp_path / "out")], "nothing is searched twice"
    assert support.tree(tmp_path / "out") == support.tree(artifact("qwen2", "gbs", options))
    assert not (tmp_path / "out.run").exists()


# --- expansion --------------------------------------------------------------------------------------------------------


def test_an_expanded_artifact(models: dict[str, Path], calibration: Text, tmp_path: Path) -> None:
    odd = models["odd"]
    recipe = bitwright.preset("quarot").with_options(
        support.SMALL | {"transform.expansion": "hadamard", "weights.group": 32}
    )
    out = tmp_path / "out"
    result = bitwright.quantize(odd, out, recipe, calibration, threads=2)
    config = json.loads((out / "config.json").read_text())
    original = json.loads((odd / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (96, 192, 24)
    assert config["rms_norm_eps"] == pytest.approx(original["rms_norm_eps"] * 92 / 96)
    layers = config["quantization_config"]["layers"]
    assert (layers["model.layers.0.mlp.down_proj"]["rows"], layers["model.layers.0.mlp.down_proj"]["hadamard"]) == (
        96,
        192,
    )
    assert any("92 to 96" in note and "weights more" in note for note in result.plan.notes)

    # Honest bits: every byte of the expanded matrices, over the weights that the model has.
    stored, before = support.read_tensors(out), support.read_tensors(odd)
    own = ("codes", "scales", "zeros")
    size = sum(len(entry.raw) for name, entry in stored.items() if name.rpartition(".")[2] in own)
    weights = sum(math.prod(before[f"{name}.weight"].shape) for name in layers)
    assert result.plan.linear_bits == size * 8 / weights
    assert weights < sum(spec["rows"] * spec["columns"] for spec in layers.values())
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result.plan.model_bits == files * 8 / sum(math.prod(entry.shape) for entry in before.values())
    plan = bitwright.plan(odd, recipe)
    assert plan.to_dict() == result.plan.to_dict() | {"model": plan.model}
    assert plan.total_bytes == files

    # It loads, saves and loads again as any other.
    assert bitwright.verify(out) == []
    ids = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = simulation.logits_of(model := bitwright.load(out), ids, recipe)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(simulation.logits_of(bitwright.load(tmp_path / "again"), ids, recipe), expected)
    assert result.measured["calibration"]["loss_original"] == pytest.approx(
        bitwright.quantize(
            odd, tmp_path / "plain", recipe.with_options({"transform.expansion": "none"}), calibration, threads=2
        ).measured["calibration"]["loss_original"],
        abs=5e-3,
    )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("gbs", {"activations": None, "kv": None}, "has nothing to look for with activations and kv off"),
        ("gbs", {"search.method": "global", "search.objective": "output"}, "write objective = 'perplexity'"),
        ("gbs", {"search.method": "ambiguous", "search.objective": "output"}, "or method = 'grid' to go by the output"),
        ("bwa", {"transform.expansion": "power"}, "write rotation = 'quarot' or expansion = 'none'"),
        ("gbs", {"activations.balance": "support"}, "write balance = 'none' with bits = 3"),
    ],
)
def test_what_does_not_go_together_is_refused(preset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        bitwright.preset(preset).with_options(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["cache"].update(clips=[0.5]), "expected `clips` with a number for each of the 2 decoder blocks"),
        (
            lambda c: c["cache"].update(clips=[0.5, 1.5]),
            "cache of decoder block 1 clip = 1.5; expected a number above 0",
        ),
        (lambda c: c.update(cache=3), "quantization_config.cache is 3"),
        (
            lambda c: c["layers"]["model.layers.0.mlp.up_proj"].update(clip=0),
            "layer model.layers.0.mlp.up_proj clip = 0; expected",
        ),
    ],
)
def test_a_damaged_ratio_is_told_of(change: Any, message: str, artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(artifact("llama", "gbs", FAST), tmp_path / "copy"))
    support.edit_json(copy / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(ArtifactError, match=message):
        bitwright.load(copy)


def test_artifacts_without_a_search_say_nothing_of_it(artifact: Artifact) -> None:
    """What older readers know is what they find."""
    config = config_of(artifact("llama"))
    assert "cache" not in config
    assert config["requires"] == []
    assert "search" not in config["recipe"]
    assert "clip" not in config["recipe"]["kv"]
    assert "expansion" not in config["recipe"]["transform"]
    assert all("clip" not in spec for spec in config["layers"].values())
    assert "search" not in json.loads((artifact("llama") / "bitwright_manifest.json").read_text())
