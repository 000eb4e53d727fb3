"""Damaged artifacts, impossible outputs: one line naming the thing, code 1, no traceback, nothing that looks whole.

Every case goes through the command line. Where a command writes, the output directory must not exist afterwards.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
import support
from bitwright import codebook
from bitwright.errors import BitwrightError
from bitwright.evaluation import load
from refusals import INDEX, WEIGHTS, Arguments, Case, Cases, Ground, check_case, check_refusal

case = Cases()


# --- damaged artifacts ------------------------------------------------------------------------------------------------


def artifact_case(name: str, change: Callable[[dict[str, Any]], Any], *words: str) -> None:
    """A case: `change` of quantization_config in the artifact's config.json."""

    def prepare(ground: Ground) -> Arguments:
        directory = ground.quantized()
        support.edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))
        return ground.generate(directory)

    case(name, *words)(prepare)


LAYER = "model.layers.0.self_attn.q_proj"


def layer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["layers"][LAYER].update(changes)


artifact_case("format_too_new", lambda c: c.update(format_version=2), "format version 2", "upgrade bitwright")
artifact_case("format_no_number", lambda c: c.update(format_version="one"), "format_version 'one'")
artifact_case("feature_unknown", lambda c: c.update(requires=["lattice"]), "format feature 'lattice'", "upgrade")
artifact_case("layers_empty", lambda c: c.update(layers={}), "names no layers")
artifact_case("layers_a_list", lambda c: c.update(layers=[LAYER]), "names no layers")
artifact_case("layer_without_a_key", lambda c: c["layers"][LAYER].pop("group"), f"layer {LAYER} without group")
artifact_case("layer_is_null", lambda c: c["layers"].update({LAYER: None}), f"layer {LAYER} by None")
artifact_case("layer_with_words_for_numbers", layer(rows="72"), LAYER, "rows = '72'")
artifact_case("layer_with_group_0", layer(group=0), LAYER, "group = 0")
artifact_case("layer_with_group_12", layer(group=12), LAYER, "group = 12", "multiple of 8")
artifact_case("layer_with_a_group_wider_than_all", layer(group=1 << 40), LAYER, "group = 1099511627776", "4096")
artifact_case("layer_of_9_bits", layer(bits=9), LAYER, "bits = 9", "from 1 to 8")
artifact_case("layer_with_outliers_below_0", layer(outliers=-4), LAYER, "outliers = -4")
artifact_case("layer_with_a_wide_transform", layer(hadamard=1 << 40, stride=2), LAYER, "hadamard = 1099511627776")
artifact_case(
    "layer_with_another_group_than_its_site",
    lambda c: c["layers"]["model.layers.0.self_attn.k_proj"].update(group=120),
    "model.layers.0.self_attn.k_proj",
    f"the permutation of {LAYER} and not its group: 120 and 128",
)
artifact_case(
    "layer_with_the_order_of_another_site", layer(permutation="model.layers.0.mlp.down_proj"), LAYER, "not its columns"
)
artifact_case(
    "layer_with_the_order_of_a_follower",
    layer(permutation="model.layers.0.self_attn.k_proj"),
    "model.layers.0.self_attn.k_proj, which has none of its own",
)
artifact_case("layer_of_other_shape", layer(rows=80), f"{LAYER}.codes", "[2, 72, 7]", "[2, 80, 7]")
artifact_case("layer_of_all_outliers", layer(outliers=72), LAYER, "outliers = 72 of 72")
artifact_case(
    "feature_of_another_kind", lambda c: c.update(requires=["salient", "trellis"]), "format feature 'trellis'"
)
artifact_case("layer_of_unknown_kind", layer(kind="trellis"), LAYER, "kind 'trellis'", ", ".join(codebook.KINDS))
artifact_case("layer_with_a_lost_permutation", layer(permutation="elsewhere"), LAYER, "permutation of elsewhere")
artifact_case(  # its order would be ignored, and the weights be those of other channels
    "layer_without_the_order_that_is_stored",
    lambda c: c["layers"]["model.layers.0.self_attn.o_proj"].update(permutation=None),
    "tensor model.layers.0.self_attn.o_proj.permutation",
    "config.json does not describe",
)
artifact_case("layer_without_the_outliers_that_are_stored", layer(outliers=0), LAYER)
artifact_case("layer_removed", lambda c: c["layers"].pop("model.layers.1.mlp.up_proj"), "model.layers.1.mlp.up_proj")
artifact_case(
    "layer_that_the_model_has_not",
    lambda c: c["layers"].update({"model.layers.9.mlp.up_proj": c["layers"]["model.layers.0.mlp.up_proj"]}),
    "model.layers.9.mlp.up_proj",
)
artifact_case("recipe_inside_damaged", lambda c: c["recipe"].update(grup=3), "quantization_config.recipe", "'grup'")

SHARD = "model-00002-of-00003.safetensors"


def shard_case(name: str, change: Callable[[Path], None], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        directory = ground.quantized()
        change(directory)
        return ground.generate(directory)

    case(name, *words)(prepare)


def without_tensor(tensor: str) -> Callable[[Path], None]:
    """The weight file and the index agree that there is no such tensor."""

    def change(directory: Path) -> None:
        support.rewrite_safetensors(directory / SHARD, lambda entries: entries.pop(tensor))
        support.edit_json(directory / INDEX, lambda index: index["weight_map"].pop(tensor))

    return change


def other_dtype(entries: dict[str, Any]) -> None:
    dtype, shape, raw = entries[f"{LAYER}.scales"]
    assert dtype == "F16"
    entries[f"{LAYER}.scales"] = ("BF16", shape, raw)


shard_case("shard_of_artifact_missing", lambda d: (d / SHARD).unlink(), SHARD, "is missing")
shard_case("shard_of_artifact_cut", lambda d: os.truncate(d / SHARD, 9000), SHARD, "truncated")
for _part in ("codes", "levels", "scales", "permutation", "outliers", "outlier_scales", "weight"):
    shard_case(f"artifact_without_{_part}", without_tensor(f"{LAYER}.{_part}"), f"{LAYER}.{_part}", "is missing")
shard_case(
    "artifact_without_norm",
    without_tensor("model.layers.0.input_layernorm.weight"),
    "lacks 1 of",
    "model.layers.0.input_layernorm.weight",
)
shard_case(  # transformers would take it for the weights, whatever the index says
    "artifact_with_two_sets_of_weights",
    lambda d: shutil.copy(d / SHARD, d / WEIGHTS) and None,
    "has both model.safetensors and model.safetensors.index.json",
    "`bitwright verify`",
)
shard_case(
    "artifact_with_another_dtype",
    lambda d: support.rewrite_safetensors(d / SHARD, other_dtype),
    f"{LAYER}.scales",
    "BF16",
    "F16",
)


def grids(ground: Ground) -> Path:
    """An artifact with zero points, to damage."""
    made = ground.artifact("llama", "gptq", {"weights.bits": 2})
    return Path(shutil.copytree(made, ground.tmp / "artifact"))


@case("zero_point_that_is_no_code", f"tensor {LAYER}.zeros", "holds 200; zero points of 2-bit codes are 0 to 3")
def _(ground: Ground) -> Arguments:
    def change(entries: dict[str, Any]) -> None:
        dtype, shape, raw = entries[f"{LAYER}.zeros"]
        entries[f"{LAYER}.zeros"] = (dtype, shape, raw[:-1] + b"\xc8")

    directory = grids(ground)
    support.rewrite_safetensors(directory / SHARD, change)
    return ground.generate(directory)


def other_config(name: str, change: Callable[[dict[str, Any]], Any], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        directory = ground.quantized()
        support.edit_json(directory / "config.json", change)
        return ground.generate(directory)

    case(name, *words)(prepare)


other_config(
    "artifact_config_of_fewer_blocks", lambda c: c.update(num_hidden_layers=1), "model.layers.1.self_attn.q_proj"
)
other_config("artifact_config_of_other_width", lambda c: c.update(intermediate_size=150), "150 x 72", "140 x 72")
other_config("artifact_config_of_other_vocabulary", lambda c: c.update(vocab_size=200), "embed_tokens", "[200, 72]")
other_config(
    "artifact_without_method", lambda c: c["quantization_config"].pop("quant_method"), "cannot load", "quant_method"
)
other_config("artifact_without_quantization", lambda c: c.pop("quantization_config"), "down_proj.weight", "shape [0]")


def values_case(name: str, part: str, change: Callable[[bytes], bytes], *words: str) -> None:
    """A case: other bytes in a tensor of the packed linear LAYER, of the same shape and dtype."""

    def rewrite(entries: dict[str, Any]) -> None:
        dtype, shape, raw = entries[f"{LAYER}.{part}"]
        entries[f"{LAYER}.{part}"] = (dtype, shape, change(raw))

    def damage(directory: Path) -> None:
        support.rewrite_safetensors(directory / SHARD, rewrite)

    shard_case(name, damage, f"tensor {LAYER}.{part}", *words)


values_case("artifact_with_a_scale_that_is_nan", "scales", lambda b: b"\xff\xff" + b[2:], "NaN or infinite values")
# Native code takes an order for what it is: beyond the columns it would read what is not the model's.
NO_ORDER = ("is no order of the 72 columns", "`bitwright verify`")
values_case("permutation_beyond_the_columns", "permutation", lambda b: b"\xff" * len(b), *NO_ORDER)
values_case("permutation_one_beyond", "permutation", lambda b: b.replace(b"\x47\x00", b"\x48\x00"), *NO_ORDER)
values_case("permutation_of_one_channel", "permutation", lambda b: bytes(len(b)), *NO_ORDER)
values_case("permutation_with_a_double", "permutation", lambda b: b[:2] + b[:2] + b[4:], *NO_ORDER)


@case("manifest_damaged", "bitwright_manifest.json has changed since it was written")
def _(ground: Ground) -> Arguments:
    directory = ground.quantized()
    support.edit_json(directory / "bitwright_manifest.json", lambda manifest: manifest["files"].pop(SHARD))
    return ["verify", directory]


@case("manifest_not_json", "bitwright_manifest.json is not valid JSON")
def _(ground: Ground) -> Arguments:
    directory = ground.quantized()
    (directory / "bitwright_manifest.json").write_text("")
    return ["verify", directory]


NUMBERS = (-(1 << 63), -1, 0, 1, 2, 3, 7, 12, 63, 64, 71, 72, 73, 120, 1 << 31, 1 << 63, 1 << 80)
WORDS = (None, True, "72", 1.5, [2], {}, "free", "uniform", "symmetric", "shared", "salient", LAYER)


def _said_or_logits(directory: Path) -> tuple[str, torch.Tensor]:
    """What an artifact is refused with, or its logits for some tokens."""
    try:
        model = load(directory)
    except BitwrightError as problem:
        return str(problem), torch.zeros(0)
    with torch.no_grad():
        return "", model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("balance", ["none", "support"])
def test_no_number_of_a_header_reaches_native_code(balance: str, ground: Ground) -> None:
    """Whatever one key of one linear says, an artifact is refused by the name of a linear, or loads and runs."""
    directory = Path(
        shutil.copytree(ground.artifact("llama", "bwa", {"activations.balance": balance}), ground.tmp / "artifact")
    )
    written = (directory / "config.json").read_text()
    rng, refused = random.Random(1), 0
    for change in range(60):
        config = json.loads(written)
        layers = config["quantization_config"]["layers"]
        name = rng.choice(sorted(layers))
        key = rng.choice([*layers[name], "hadamard", "stride", "clip"])
        layers[name][key] = rng.choice(NUMBERS if change % 3 else WORDS)
        (directory / "config.json").write_text(json.dumps(config))
        message, logits = _said_or_logits(directory)
        refused += bool(message)
        assert "\n" not in message
        assert name.rpartition(".")[0] in message or not message, (name, layers[name], message)
        assert bool(torch.isfinite(logits).all()), (name, layers[name])
    assert refused > 30


# --- outputs ----------------------------------------------------------------------------------------------------------


@case("output_below_a_file", "cannot write to", "calibration.txt")
def _(ground: Ground) -> Arguments:
    return ["quantize", ground.models["llama"], ground.calib / "out", "--calib", ground.calib, "--length", "32"]


@case("output_where_nothing_can_be_written", "cannot write to /proc/")
def _(ground: Ground) -> Arguments:
    return ["quantize", ground.models["llama"], "/proc/bitwright-out", "--calib", ground.calib, "--length", "32"]


# The log stands outside of the output and is written after the first block.
@case("log_where_nothing_can_be_written", "log.jsonl")
def _(ground: Ground) -> Arguments:
    return ground.quantize(None, "--log", ground.tmp / "no" / "such" / "folder" / "log.jsonl")


@pytest.mark.parametrize("bad", case, ids=case.names)
def test_bad_input(bad: Case, ground: Ground) -> None:
    check_case(bad, ground)


# --- an output in the way: it stays as it is -----------------------------------------------------------------------


def test_foreign_directory_in_the_way(ground: Ground) -> None:
    ground.out.mkdir()
    (ground.out / "thesis.txt").write_text("years of work")
    check_refusal(support.run_cli(*ground.quantize()), str(ground.out), "is no finished artifact")
    check_refusal(support.run_cli(*ground.quantize(None, "--restart")), str(ground.out), "is no finished artifact")
    assert support.tree(ground.out).keys() == {"thesis.txt"}


def test_file_in_the_way(ground: Ground) -> None:
    ground.out.write_text("years of work")
    check_refusal(support.run_cli(*ground.quantize()), str(ground.out), "is no finished artifact")
    assert ground.out.read_text() == "years of work"


def test_demo_output_in_the_way(ground: Ground) -> None:
    if not (Path(bitwright.__file__).parent / "demo" / "model" / WEIGHTS).exists():
        pytest.skip("the demo model is not in this checkout")
    ground.out.mkdir()
    check_refusal(support.run_cli("demo", "--out", ground.out), str(ground.out), "is no finished artifact")


def test_locked_run_directory(ground: Ground) -> None:
    import fcntl

    run = ground.tmp / "out.run"
    run.mkdir()
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check_refusal(support.run_cli(*ground.quantize()), "another run is at work in", "out.run")
    assert support.run_cli(*ground.quantize()).code == 0


# --- a disk that is full -------------------------------------------------------------------------------------------


def test_too_little_disk_is_refused_before_it_starts(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(ground.tmp)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    check_refusal(support.run_cli(*ground.quantize()), "out.run has 0.00 GB free", "the run needs")
    assert not ground.out.exists()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes; the system's answer is an error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "file"),
    [
        (60_000, "model-00001-of-00003.safetensors"),  # embeddings of 86 kB
        (100_000, "stream-0.f32"),  # 6 x 64 x 72 values
        (150_000, None),
    ],
)
def test_disk_full(size: int, file: str | None, ground: Ground) -> None:
    """The file that could not be written is named, no output appears, and with more room the run goes on."""
    command = ground.quantize(None, "--preset", "bwa", "--sequences", "6", "--length", "64")
    with files_up_to(size):
        outcome = support.run_cli(*command)
    if file:
        check_refusal(outcome, file, "File too large")
        assert not ground.out.exists()
        assert not list(ground.tmp.rglob("*.tmp"))
    else:
        assert outcome.code == 0
    assert support.run_cli(*command).code == 0
    assert support.tree(ground.out) == support.tree(ground.artifact())


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_interrupted_from_the_keyboard(ground: Ground) -> None:
    """Ctrl-C: one line that says how to go on, and exit code 130."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        outcome = support.run_cli(*ground.quantize(None, "--sequences", "300", "--length", "128", "--threads", "1"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert outcome.code == 130
    assert outcome.message == "interrupted; the same command goes on where it stopped"
    assert not ground.out.exists()
