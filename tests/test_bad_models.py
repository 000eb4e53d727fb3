"""Bad model directories: one line naming the thing, code 1, no traceback, nothing that looks whole.

Every case goes through the command line. Where a command writes, the output directory must not exist afterwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, T5Config, T5ForConditionalGeneration

import support
from refusals import INDEX, WEIGHTS, Arguments, Case, Cases, Ground, check_case

case = Cases()


# --- weight files -----------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("bad", case, ids=case.names)
def test_bad_input(bad: Case, ground: Ground) -> None:
    check_case(bad, ground)
