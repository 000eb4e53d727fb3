"""Bad input of many kinds: one line that names the thing, exit code 1, no traceback, and nothing that looks whole.

Every case goes through the command line. Where a command writes, the output directory must not exist afterwards.
"""

from __future__ import annotations

import json
import lzma
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, T5Config, T5ForConditionalGeneration

import bitwright
import support
from bitwright import codebook

Arguments = list[str | Path]


@dataclass
class Ground:
    """What the cases build on: whole things to copy, and a folder to damage them in."""

    tmp: Path
    models: dict[str, Path]
    artifact: Callable[..., Path]
    calib: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def model(self, name: str = "llama") -> Path:
        return Path(shutil.copytree(self.models[name], self.tmp / "model"))

    def quantized(self) -> Path:
        return Path(shutil.copytree(self.artifact(), self.tmp / "artifact"))

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.tmp / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def quantize(self, model: Path | str | None = None, *extra: str | Path, calib: Path | None = None) -> Arguments:
        small = ["--sequences", "2", "--length", "32"]
        return ["quantize", model or self.models["llama"], self.out, "--calib", calib or self.calib, *small, *extra]

    def generate(self, directory: Path, prompt: str = "Ba ren.", *extra: str | Path) -> Arguments:
        return ["generate", directory, prompt, "--max-new-tokens", "2", *extra]


Prepare = Callable[[Ground], Arguments]


class Case(NamedTuple):
    name: str
    prepare: Prepare
    words: tuple[str, ...]


CASES: list[Case] = []


def case(name: str, *words: str) -> Callable[[Prepare], Prepare]:
    """Register a case: `words` must all stand in the message."""

    def register(prepare: Prepare) -> Prepare:
        CASES.append(Case(name, prepare, words))
        return prepare

    return register


# --- weight files -----------------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


def damaged_weights(name: str, damage: Callable[[bytes], bytes | None], *words: str, command: str = "quantize") -> None:
    """A case: the weight file of the model after `damage`; None removes it."""

    def prepare(ground: Ground) -> Arguments:
        model = ground.model()
        after = damage((model / WEIGHTS).read_bytes())
        (model / WEIGHTS).unlink()
        if after is not None:
            (model / WEIGHTS).write_bytes(after)
        if command == "eval":
            return ["eval", model, "--text", ground.calib, "--windows", "1"]
        return ground.quantize(model)

    case(name, *words)(prepare)


def with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return damage


damaged_weights("weights_missing", lambda _: None, "neither model.safetensors nor model.safetensors.index.json")
damaged_weights("weights_truncated", lambda data: data[:-100], "model.safetensors is truncated or damaged")
damaged_weights("weights_truncated_eval", lambda data: data[:-100], "model.safetensors is truncated", command="eval")
damaged_weights("weights_grown", lambda data: data + b"more", "model.safetensors is truncated or damaged")
damaged_weights("weights_cut_in_header", lambda data: data[:300], "model.safetensors is truncated or no safetensors")
damaged_weights("weights_empty", lambda _: b"", "model.safetensors is truncated or no safetensors file: 0 bytes")
damaged_weights("weights_are_text", lambda _: b"once upon a time\n" * 99, "model.safetensors", "no safetensors file")
damaged_weights(
    "weights_header_not_json", lambda data: data[:8] + b"?" + data[9:], "model.safetensors", "header is not JSON"
)
damaged_weights(
    "weights_header_without_dtype",
    with_header(lambda header: header[Q].pop("dtype")),
    "model.safetensors is damaged",
    "dtype, shape and offsets",
)
damaged_weights(
    "weights_header_with_negative_shape",
    with_header(lambda header: header[Q].update(shape=[-72, -72])),
    "model.safetensors is damaged",
    "dtype, shape and offsets",
)
damaged_weights(
    "weights_wrong_dtype_in_header",
    with_header(lambda header: header[Q].update(dtype="F8_E4M3")),
    f"tensor {Q}",
    "dtype F8_E4M3",
)


def changed_tensor(
    name: str, tensor: str, change: Callable[[Any], Any], *words: str, model: str = "llama", command: str = "quantize"
) -> None:
    """A case: one tensor as (dtype, shape, bytes) replaced by `change` of it; None removes it."""

    def prepare(ground: Ground) -> Arguments:
        copy = ground.model(model)

        def edit(entries: dict[str, Any]) -> None:
            entry = change(entries.pop(tensor))
            if entry is not None:
                entries[tensor] = entry

        support.rewrite_safetensors(copy / WEIGHTS, edit)
        if command == "eval":
            return ["eval", copy, "--text", ground.calib, "--windows", "1"]
        return ground.quantize(copy)

    case(name, *words)(prepare)


def with_value(value: float, at: int = 5) -> Callable[[Any], Any]:
    """fp32 bytes with one value replaced."""

    def change(entry: Any) -> Any:
        dtype, shape, raw = entry
        return dtype, shape, raw[: 4 * at] + struct.pack("<f", value) + raw[4 * at + 4 :]

    return change


NORM, EMBEDDING = "model.layers.0.post_attention_layernorm.weight", "model.embed_tokens.weight"
changed_tensor("nan_in_linear", Q, with_value(float("nan")), f"tensor {Q}", "1 NaN or infinite value")
changed_tensor("inf_in_norm", NORM, with_value(float("inf")), f"tensor {NORM}", "1 NaN or infinite value")
changed_tensor("nan_in_embedding", EMBEDDING, with_value(float("nan")), f"tensor {EMBEDDING}", "NaN or infinite")
changed_tensor("nan_in_eval", Q, with_value(float("nan")), f"tensor {Q}", "NaN or infinite values", command="eval")
changed_tensor("int8_weights", Q, lambda e: ("I8", e[1], e[2][: 72 * 72]), f"tensor {Q}", "dtype I8")
changed_tensor(
    "wrong_shape_of_linear", Q, lambda e: (e[0], (36, 144), e[2]), f"tensor {Q}", "[36, 144]", "config.json asks for"
)
changed_tensor("wrong_shape_of_norm", NORM, lambda e: (e[0], (71,), e[2][:-4]), f"tensor {NORM}", "[71]", "[72]")
changed_tensor(
    "wrong_shape_in_eval", Q, lambda e: (e[0], (36, 144), e[2]), f"tensor {Q}", "[36, 144]", "[72, 72]", command="eval"
)
changed_tensor("tensor_missing", NORM, lambda _: None, "lacks 1 of the 21 tensors", f"first {NORM}")
changed_tensor("tensor_missing_in_eval", NORM, lambda _: None, "lacks 1 of", f"first {NORM}", command="eval")


def index_case(name: str, change: Callable[[Path], None], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        copy = ground.model("llama_sharded")
        change(copy)
        return ground.quantize(copy)

    case(name, *words)(prepare)


INDEX = "model.safetensors.index.json"
index_case(
    "shard_missing", lambda d: sorted(d.glob("model-*.safetensors"))[1].unlink(), "model-00002-of-", "is missing"
)
index_case(
    "index_names_a_tensor_that_is_not_there",
    lambda d: support.edit_json(d / INDEX, lambda i: i["weight_map"].update({"model.extra": i["weight_map"][Q]})),
    "tensor model.extra is named in",
    INDEX,
)
index_case("index_without_map", lambda d: (d / INDEX).write_text("{}"), INDEX, "has no weight_map")
index_case("index_not_json", lambda d: (d / INDEX).write_text("{'a': 1}"), INDEX, "is not valid JSON")
index_case(
    "index_with_numbers_for_files",
    lambda d: support.edit_json(d / INDEX, lambda i: i["weight_map"].update({Q: 3})),
    INDEX,
    "weight_map must give the name of a file",
)


@case("pytorch_bin_only", "found pytorch_model.bin: convert it to safetensors")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    return ground.quantize(model)


# --- config and architecture ------------------------------------------------------------------------------------------


def config_case(name: str, change: Callable[[dict[str, Any]], Any], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        model = ground.model()
        support.edit_json(model / "config.json", change)
        return ["plan", model]

    case(name, *words)(prepare)


@case("config_missing", "config.json is missing")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    (model / "config.json").unlink()
    return ground.quantize(model)


@case("config_not_json", "config.json is not valid JSON")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    (model / "config.json").write_text('{"model_type": "llama",')
    return ground.quantize(model)


@case("config_is_a_list", "config.json holds a JSON list")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    (model / "config.json").write_text("[]")
    return ground.quantize(model)


config_case("model_type_unknown", lambda c: c.update(model_type="megallama"), "model_type 'megallama'")
config_case("model_type_missing", lambda c: c.pop("model_type"), "model_type 'missing'")
config_case("config_value_of_wrong_type", lambda c: c.update(hidden_size="big"), "'hidden_size'", "'big'")
config_case("config_of_more_layers", lambda c: c.update(num_hidden_layers=3), "lacks 9 of", "first model.layers.2.")
config_case("config_of_no_layers", lambda c: c.update(num_hidden_layers=0), "no linear layers in decoder blocks")
config_case("other_quantization", lambda c: c.update(quantization_config={"quant_method": "gptq"}), "already", "gptq")


def architecture(name: str, build: Callable[[], Any], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        torch.manual_seed(0)
        build().save_pretrained(ground.tmp / name)
        support.save_tokenizer(ground.tmp / name, support.words(300, 0))
        return ground.quantize(ground.tmp / name)

    case(name, *words)(prepare)


SMALL_T5 = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
SMALL_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
SMALL_MIXTRAL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
architecture("encoder_decoder", lambda: T5ForConditionalGeneration(T5Config(**SMALL_T5)), "t5 is an encoder-decoder")
architecture(
    "conv1d_instead_of_linear",
    lambda: AutoModelForCausalLM.from_config(GPT2Config(**SMALL_GPT2)),
    "GPT2LMHeadModel",
    "is not supported",
    "attn.c_attn.weight",
)
architecture(
    "mixture_of_experts",
    lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SMALL_MIXTRAL)),
    "MixtralForCausalLM",
    "is not supported",
    "mlp.gate.weight",
)


# --- tokenizer ------------------------------------------------------------------------------------------------------


@case("tokenizer_missing", "has no tokenizer that transformers can load")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    for path in model.glob("tokenizer*"):
        path.unlink()
    return ground.quantize(model)


@case("tokenizer_damaged", "has no tokenizer that transformers can load")
def _(ground: Ground) -> Arguments:
    model = ground.model()
    (model / "tokenizer.json").write_text("{}")
    return ground.quantize(model)


def larger_tokenizer(command: str) -> None:
    @case(f"tokenizer_of_another_model_{command}", "the tokenizer makes token", "vocabulary has 300")
    def _(ground: Ground) -> Arguments:
        model = ground.model()
        support.save_tokenizer(model, ground.calib.read_text(), size=400)
        text = ground.calib.read_text()[:200]
        return {
            "quantize": ground.quantize(model),
            "eval": ["eval", model, "--text", ground.calib, "--windows", "1"],
            "generate": ground.generate(model, text),
        }[command]


for _command in ("quantize", "eval", "generate"):
    larger_tokenizer(_command)


# --- paths that are something else ------------------------------------------------------------------------------------


@case("model_path_missing", "there is no model directory", "nowhere")
def _(ground: Ground) -> Arguments:
    return ground.quantize(ground.tmp / "nowhere")


@case("model_path_is_a_file", "model.safetensors is a file", "give the model directory")
def _(ground: Ground) -> Arguments:
    return ground.quantize(ground.models["llama"] / WEIGHTS)


@case("model_is_a_hub_name", "there is no model directory someone/some-model", "hf download")
def _(ground: Ground) -> Arguments:
    return ground.quantize("someone/some-model")


@case("generate_from_nowhere", "there is no model directory", "nowhere")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.tmp / "nowhere")


@case("artifact_where_a_model_is_wanted", "is already quantized (quant_method bitwright)")
def _(ground: Ground) -> Arguments:
    return ground.quantize(ground.artifact())


@case("artifact_planned", "is already quantized (quant_method bitwright)")
def _(ground: Ground) -> Arguments:
    return ["plan", ground.artifact()]


@case("model_where_an_artifact_is_wanted", "bitwright_manifest.json", "no bitwright artifact")
def _(ground: Ground) -> Arguments:
    return ["verify", ground.models["llama"]]


@case("verify_nowhere", "there is no artifact directory", "nowhere")
def _(ground: Ground) -> Arguments:
    return ["verify", ground.tmp / "nowhere"]


# --- texts ------------------------------------------------------------------------------------------------------------


def text_case(name: str, file: str, content: bytes | None, *words: str, command: str = "quantize") -> None:
    """A case: that content as the text; None leaves the file out."""

    def prepare(ground: Ground) -> Arguments:
        path = ground.tmp / file if content is None else ground.file(file, content)
        if command == "eval":
            return ["eval", ground.models["llama"], "--text", path]
        return ground.quantize(calib=path)

    case(name, *words)(prepare)


text_case("text_missing", "t.txt", None, "t.txt does not exist")
text_case("text_empty", "t.txt", b"", "t.txt is empty")
text_case("text_blank", "t.txt", b" \n\n\t\n", "t.txt is empty")
text_case("text_binary", "t.txt", b"abc\xff\xfe\x00", "t.txt is not UTF-8 text (byte 3)")
text_case("text_xz_garbage", "t.txt.xz", b"no archive at all", "t.txt.xz is not a whole .xz file")
text_case("text_xz_cut", "t.txt.xz", lzma.compress(b"ba ren " * 999)[:-9], "t.txt.xz is not a whole .xz file")
text_case("jsonl_without_text", "t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "t.jsonl line 2", "field 'text'")
text_case("jsonl_broken", "t.jsonl", b'{"text": "a"}\n\n{"text": ', "t.jsonl line 3", "field 'text'")
text_case("jsonl_with_a_number", "t.jsonl", b'{"text": 5}\n', "t.jsonl line 1", "field 'text'")
text_case("jsonl_empty", "t.jsonl", b"\n\n", "t.jsonl is empty")
text_case("text_shorter_than_a_window", "t.txt", b"Ba ren.", "t.txt has", "one window needs 32", "calibration.length")
text_case("text_missing_eval", "t.txt", None, "t.txt does not exist", command="eval")
text_case("text_empty_eval", "t.txt", b"", "t.txt is empty", command="eval")
text_case("text_shorter_than_a_window_eval", "t.txt", b"Ba ren.", "one window needs 128", "--window", command="eval")


@case("text_is_a_directory", "is a directory; give a text file")
def _(ground: Ground) -> Arguments:
    return ground.quantize(calib=ground.tmp)


@case("text_below_a_file", "cannot read text file", "calibration.txt")
def _(ground: Ground) -> Arguments:
    return ground.quantize(calib=ground.calib / "part.txt")


@case("evaluation_text_too_short", "short.txt has", "one window needs 32")
def _(ground: Ground) -> Arguments:
    return ground.quantize(None, "--eval-text", ground.file("short.txt", "Ba."))


# --- recipes ----------------------------------------------------------------------------------------------------------


def option_case(name: str, options: list[str], *words: str) -> None:
    case(name, *words)(lambda ground: ground.quantize(None, *options))


@case("length_too_short", "length = 4 is too short")
def _(ground: Ground) -> Arguments:
    return ["plan", ground.models["llama"], "--set", "calibration.length=4"]


def recipe_case(name: str, content: str | None, *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        path = ground.tmp / "r.json" if content is None else ground.file("r.json", content)
        return ground.quantize(None, "--recipe", path)

    case(name, *words)(prepare)


option_case(
    "preset_unknown", ["--preset", "bwaa"], "no preset 'bwaa'", "atom, billm, bitwright, bwa, gptq, quarot, rtn, wgm"
)
option_case(
    "billm_by_column", ["--preset", "billm", "--set", "weights.feedback=column"], "method 'billm'", "'block-tri'"
)
option_case("billm_of_other_widths", ["--preset", "billm", "--set", "weights.bits=3"], "bits = 3", "bits = 2")
option_case("billm_refined", ["--preset", "billm", "--set", "weights.refine=1"], "refine needs free levels")
option_case(
    "symmetric_and_balanced",
    ["--preset", "bwa", "--set", "activations.symmetric=true"],
    "balance = 'none' with symmetric = true",
)
option_case("clip_of_free_levels", ["--set", "weights.clip=0.85"], "clip is for levels = 'uniform' alone")
option_case("clip_and_search", ["--preset", "atom", "--set", "weights.range=mse"], "clip = 0.85", "write clip = 1")
option_case("key_unknown", ["--set", "weights.outlier=0"], "no key 'weights.outlier'", "did you mean 'outliers'?")
option_case("part_unknown", ["--set", "weigths.outliers=0"], "no key 'weigths.outliers'", "did you mean 'weights'?")
option_case("key_of_a_part_that_is_off", ["--set", "kv=none", "--set", "kv.bits=8"], "kv.bits", "kv is off")
option_case("set_without_value", ["--set", "weights.outliers"], "'weights.outliers'", "key=value")
option_case("set_without_key", ["--set", "=3"], "'=3'", "key=value")
option_case("value_of_wrong_type", ["--set", "weights.group=big"], "weights.group = 'big'")
option_case("value_out_of_range", ["--set", "weights.bits=9"], "weights.bits = 9")
option_case("value_not_among_the_words", ["--set", "weights.levels=kmeans"], "weights.levels = 'kmeans'", "'dp'")
option_case("group_not_of_bytes", ["--set", "weights.group=100"], "group = 100 is not a multiple of 8")
option_case("outliers_negative", ["--outliers", "-4"], "outliers = -4 is negative")
option_case("outliers_in_words", ["--outliers", "many"], "weights.outliers", "'many'")
option_case("outliers_too_many", ["--outliers", "72"], "weights.outliers = 72", "model.layers.0.self_attn.q_proj")
option_case("length_over_the_context", ["--length", "129"], "calibration.length = 129", "context of 128")
option_case("method_and_levels_do_not_match", ["--set", "weights.method=rtn"], "method 'rtn'", "levels = 'uniform'")
option_case(
    "balance_without_planes", ["--preset", "bwa", "--set", "activations.bits=8"], "balance is defined for 4 planes only"
)
recipe_case("recipe_missing", None, "cannot read recipe", "r.json")
recipe_case("recipe_not_json", "weights: 2", "r.json is not valid JSON")
recipe_case("recipe_is_a_list", "[1]", "r.json holds a list")
recipe_case("recipe_key_unknown", '{"weights": {"grup": 64}}', "r.json", "'weights.grup'", "did you mean 'group'?")
recipe_case("recipe_part_unknown", '{"activation": null}', "r.json", "'activation'", "did you mean 'activations'?")
recipe_case("recipe_wrong_type", '{"calibration": {"sequences": "all"}}', "r.json", "calibration.sequences = 'all'")


# --- eval and generate ------------------------------------------------------------------------------------------------


def eval_case(name: str, options: list[str], *words: str) -> None:
    case(name, *words)(lambda ground: ["eval", ground.artifact(), "--text", ground.calib, *options])


eval_case("window_over_the_context", ["--window", "129"], "a window of 129 tokens", "context of 128")
eval_case("join_unknown", ["--join", "comma"], "--join 'comma'", "none, space, blank-line")
eval_case("dtype_unknown", ["--dtype", "int4"], "dtype 'int4'", "float32, bfloat16, float16")


@case("generate_dtype_unknown", "dtype 'half'", "float32, bfloat16, float16")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact(), "Ba ren.", "--dtype", "half")


@case("prompt_empty", "the prompt is empty")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact("mistral"), "")


@case("prompt_over_the_context", "the prompt has", "context is 128")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact(), "Ba ren tol mi sha kur. " * 40)


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
artifact_case("layer_of_other_shape", layer(rows=80), f"{LAYER}.codes", "[2, 72, 7]", "[2, 80, 7]")
artifact_case("layer_of_all_outliers", layer(outliers=72), LAYER, "outliers = 72 of 72")
artifact_case(
    "feature_of_another_kind", lambda c: c.update(requires=["salient", "trellis"]), "format feature 'trellis'"
)
artifact_case("layer_of_unknown_kind", layer(kind="trellis"), LAYER, "kind 'trellis'", ", ".join(codebook.KINDS))
artifact_case("layer_with_a_lost_permutation", layer(permutation="elsewhere"), LAYER, "permutation of elsewhere")
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
shard_case(
    "artifact_with_another_dtype",
    lambda d: support.rewrite_safetensors(d / SHARD, other_dtype),
    f"{LAYER}.scales",
    "BF16",
    "F16",
)


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


def nan_scale(entries: dict[str, Any]) -> None:
    dtype, shape, raw = entries[f"{LAYER}.scales"]
    entries[f"{LAYER}.scales"] = (dtype, shape, b"\xff\xff" + raw[2:])


shard_case(
    "artifact_with_a_scale_that_is_nan",
    lambda d: support.rewrite_safetensors(d / SHARD, nan_scale),
    f"tensor {LAYER}.scales",
    "NaN or infinite values",
)


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


@pytest.fixture
def ground(tmp_path: Path, models: dict[str, Path], artifact: Callable[..., Path], calibration_file: Path) -> Ground:
    return Ground(tmp_path, models, artifact, calibration_file)


def check_refusal(outcome: support.Outcome, *words: str) -> str:
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.err
    message = outcome.message
    assert message == message.strip() != ""
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


def whole_looking(folder: Path) -> set[Path]:
    return {path.parent for path in folder.rglob("*.json") if path.name == "bitwright_manifest.json"}


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in CASES])
def test_bad_input(bad: Case, ground: Ground) -> None:
    arguments = bad.prepare(ground)
    before = whole_looking(ground.tmp)
    outcome = support.run_cli(*arguments)
    message = check_refusal(outcome, *bad.words)
    print(f"\n{bad.name}: {message}".replace(str(ground.tmp), "TMP"))
    assert not ground.out.exists()
    assert whole_looking(ground.tmp) == before


def test_there_are_enough_kinds() -> None:
    names = [bad.name for bad in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 40


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


# --- interrupted, and used wrongly -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "MODEL", "OUT"],
        ["quantize", "MODEL", "OUT", "--calib", "x", "--sequences", "0"],
        ["quantize", "MODEL", "OUT", "--calib", "x", "--length", "7"],
        ["eval", "MODEL"],
        ["eval", "MODEL", "--text", "x", "--windows", "none"],
        ["generate", "MODEL"],
        ["generate", "MODEL", "prompt", "--temperature", "-1"],
        ["plan", "MODEL", "--fast"],
        ["compress", "MODEL"],
    ],
)
def test_wrong_usage(arguments: list[str], ground: Ground) -> None:
    outcome = support.run_cli(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert not ground.out.exists()
