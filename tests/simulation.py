"""What an artifact computes, by torch alone from the bytes of its files: an independent simulation of the run time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.activations import quantize_site
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe, Recipe
from bitwright.runtime import QuantizedKVCache
from bitwright.runtime.hadamard_ops import _hadamard_reference as hadamard_reference
from kernel_twin import kernel_linear
from support import Entry, read_tensors

TORCH = {
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "U16": torch.uint16,
    "F32": torch.float32,
}


def as_tensor(entry: Entry) -> Tensor:
    return torch.frombuffer(bytearray(entry.raw), dtype=TORCH[entry.dtype]).reshape(entry.shape)


def stored_matrices(artifact: Path) -> dict[str, CodebookMatrix]:
    """Layer name -> its matrix, from the bytes of the weight files and the `layers` of config.json alone."""
    layers = json.loads((artifact / "config.json").read_text())["quantization_config"]["layers"]
    tensors = read_tensors(artifact)
    matrices = {}
    for name, spec in layers.items():

        def part(leaf: str, name: str = name) -> Tensor | None:
            entry = tensors.get(f"{name}.{leaf}")
            return None if entry is None else as_tensor(entry)

        order = None
        if spec["permutation"] is not None:
            order = as_tensor(tensors[f"{spec['permutation']}.permutation"]).to(torch.int64)
        planes = part("codes")
        assert planes is not None
        matrices[name] = CodebookMatrix(
            rows=spec["rows"],
            columns=spec["columns"],
            bits=spec["bits"],
            group=spec["group"],
            kind=spec["kind"],
            planes=planes,
            scales=part("scales"),
            levels=part("levels"),
            zeros=part("zeros"),
            table=part("table"),
            salient=part("salient"),
            salient_levels=part("salient_levels"),
            salient_scales=part("salient_scales"),
            outliers=part("outliers"),
            outlier_scales=part("outlier_scales"),
            permutation=order,
        )
    return matrices


def stored_outer(artifact: Path) -> dict[str, Tensor]:
    """Embedding and head in integers, fp32 by module name, from the bytes as docs/format.md has them."""
    tensors, found = read_tensors(artifact), {}
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    for name, spec in config.get("outer", {}).items():
        codes = as_tensor(tensors[f"{name}.codes"]).int()
        if spec["bits"] == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : spec["columns"]]
            codes = torch.where(codes > 7, codes - 16, codes)
        groups = torch.arange(spec["columns"]) // spec["group"]
        found[name] = codes.float() * as_tensor(tensors[f"{name}.scales"]).float()[:, groups]
    return found


def site_inputs(x: Tensor, spec: dict[str, Any], order: Tensor | None) -> Tensor:
    """x fp32 [tokens, columns] ordered and transformed, as docs/format.md says: scaled, butterflies by hand, fp32."""
    x = x if order is None else x[:, order]
    size, stride = spec.get("hadamard", 0), spec.get("stride", 1)
    normal, done = spec["columns"] - spec["outliers"], 0
    while size > 1:
        while done + size * stride <= normal:
            for lane in range(done, done + stride):
                channels = torch.arange(lane, lane + size * stride, stride)
                x = x.clone()
                x[:, channels] = hadamard(x[:, channels], size)
            done += size * stride
        size = 0 if stride > 1 else 2 ** (int(math.log2(size)) - (size & (size - 1) == 0))
    return x


def hadamard(x: Tensor, size: int) -> Tensor:
    """fp32 [tokens, size] times H / sqrt(size): the kernels' own float operations for powers of two."""
    if size & (size - 1):
        return hadamard_reference(x, size)
    x = x * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    distance = 1
    while distance < size:
        low = torch.tensor([i for i in range(size) if not i & distance])
        a, b = x[:, low], x[:, low + distance]
        x = x.clone()
        x[:, low], x[:, low + distance] = a + b, a - b
        distance *= 2
    return x


def _as_kernels(matrix: CodebookMatrix, spec: dict[str, Any], inputs: Any, bias: Tensor | None, x: Tensor) -> Tensor:
    flat = x.reshape(-1, matrix.columns)
    if spec.get("hadamard"):
        flat, matrix = site_inputs(flat, spec, matrix.permutation), replace(matrix, permutation=None)
    return kernel_linear(flat, matrix, inputs, bias).reshape(*x.shape[:-1], matrix.rows)


def block_by_block(model: Any) -> Any:
    """A loaded artifact without the lean path: transformers' own forward calls every linear."""
    model.model.__dict__.pop("forward", None)
    return model


def take_kept(model: Any, artifact: Path) -> None:
    """Give an original model everything but the linears' weights from the bytes of an artifact of a rotated model."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer tied
    tensors = read_tensors(artifact)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            entry = tensors[name]
            if entry.raw:
                parameter.copy_(as_tensor(entry))


def simulate(model: Path, artifact: Path, order: str = "site") -> tuple[nn.Module, Recipe]:
    """The original model in fp32 with the artifact's weights in its nn.Linear layers and fake-quantized inputs.

    `order` is the order in which the channels of a linear stand and are summed: `site` as they are stored, `model` with
    permutation undone in weights and inputs, `reversed` as `model` from the last channel to the first, `kernels` as the
    native kernels sum (kernel_twin.py).
    """
    recipe = Recipe.from_dict(json.loads((artifact / "config.json").read_text())["quantization_config"]["recipe"])
    if recipe.transform.expansion == "none":
        simulated = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    else:  # an ordinary model of another size, of which everything is in the artifact
        config = AutoConfig.from_pretrained(artifact)
        del config.quantization_config
        simulated = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weights in stored_outer(artifact).items():
        simulated.get_submodule(name).weight = nn.Parameter(weights, requires_grad=False)
        if simulated.config.tie_word_embeddings:
            simulated.lm_head.weight = simulated.model.embed_tokens.weight
    if recipe.transform.rotation != "none":
        take_kept(simulated, artifact)
    layers = json.loads((artifact / "config.json").read_text())["quantization_config"]["layers"]
    for name, matrix in stored_matrices(artifact).items():
        linear = simulated.get_submodule(name)
        assert type(linear) is nn.Linear
        spec = layers[name]
        inputs = recipe.activations
        if inputs is not None and "clip" in spec:
            inputs = inputs.model_copy(update={"clip": spec["clip"]})
        if order == "kernels":
            linear.forward = partial(_as_kernels, matrix, spec, inputs, linear.bias)
            continue
        weights = matrix.dequantize_site_order()
        # The whole transform as one matrix: site inputs are x @ turn, and it is orthogonal.
        turn = site_inputs(torch.eye(matrix.columns), spec, matrix.permutation)
        if order != "site":
            weights = weights @ turn.T
        linear.weight.data = weights.flip(1).contiguous() if order == "reversed" else weights

        def hook(
            _: nn.Module,
            args: tuple[Tensor, ...],
            matrix: CodebookMatrix = matrix,
            spec: dict[str, Any] = spec,
            turn: Tensor = turn,
            inputs: ActivationRecipe | None = inputs,
        ) -> tuple[Tensor, ...]:
            (x,) = args
            flat = site_inputs(x.reshape(-1, matrix.columns), spec, matrix.permutation)
            quantized = quantize_site(flat, matrix.outlier_columns, matrix.group, inputs)
            if order != "site":
                restored = quantized @ turn.T
                quantized = restored.flip(1).contiguous() if order == "reversed" else restored
            return (quantized.reshape(x.shape),)

        linear.register_forward_pre_hook(hook)
    return simulated, recipe


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor, recipe: Recipe, clips: list[float] | None = None) -> Tensor:
    """Logits [windows, length, vocabulary] of token windows, each through a fresh cache of the recipe; `clips` are the
    clip ratios of its layers, where they differ from the recipe's."""
    rows = []
    for window in ids:
        cache = None
        if recipe.kv is not None:
            cache = QuantizedKVCache(model.config.num_hidden_layers, recipe.kv, clips)
        rows.append(model(window.unsqueeze(0), past_key_values=cache, use_cache=cache is not None).logits[0].float())
    return torch.stack(rows)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of a - b over that of b."""
    return float((a - b).double().norm() / b.double().norm())


@torch.inference_mode()
def plain_perplexity(
    model: Any, tokens: Tensor, window: int, limit: int | None, recipe: Recipe | None = None
) -> tuple[float, int]:
    """(perplexity, tokens) by a plain loop over transformers: mean loss of each window, windows averaged."""
    count = len(tokens) // window if limit is None else min(limit, len(tokens) // window)
    losses = []
    for index in range(count):
        ids = tokens[index * window : (index + 1) * window].unsqueeze(0)
        cache = QuantizedKVCache(model.config.num_hidden_layers, recipe.kv) if recipe and recipe.kv else None
        losses.append(float(model(ids, labels=ids, past_key_values=cache, use_cache=cache is not None).loss))
    return math.exp(sum(losses) / len(losses)), count * window
