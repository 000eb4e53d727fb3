"""A block under tuning computes what the packed block computes, and its gradients are those of a dense twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bitwright
import support
from bitwright.models import Checkpoint, Skeleton
from bitwright.models.passes import plain, run_block
from bitwright.pipeline.plan import plan_for
from bitwright.pipeline.tunable import TunableBlock
from bitwright.runtime import QuantizedKVCache

LENGTH = 20


def opened(model: Path, made: Path, preset: str, options: dict[str, Any], tune: dict[str, Any]) -> Any:
    """(block 1 of an artifact under tuning, its call, hidden states, that block of the model without weights)"""
    recipe = bitwright.preset(preset).with_options(support.SMALL | options | {"tune": tune})
    skeleton = Skeleton(Checkpoint(model))
    shard = load_file(sorted(made.glob("*.safetensors"))[2])
    block = TunableBlock(skeleton, plan_for(skeleton, recipe), 1, shard)
    hidden = torch.randn(1, LENGTH, skeleton.width, generator=torch.Generator().manual_seed(0))
    call = plain(skeleton.calls()[1][1])  # made for 4 tokens
    rotary = skeleton.model.model.rotary_emb
    position = torch.arange(LENGTH).unsqueeze(0)
    call.update(position_embeddings=rotary(hidden, position), attention_mask=None)
    return block, call, hidden, copy.deepcopy(skeleton.blocks[1]).eval()


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama_biases", "bwa", {"activations": None, "kv": None}),
    ("llama", "bwa", {"activations": None, "kv": None, "transform.hadamard": "group", "weights.group": 32}),
    ("qwen3", "gptq", {}),
    ("llama", "quarot", {"activations": None, "kv": None, "weights.group": 32}),
]


@pytest.mark.parametrize(("model", "preset", "options"), CASES)
def test_gradients_of_a_dense_twin(
    model: str, preset: str, options: dict[str, Any], models: dict[str, Path], artifact: Callable[..., Path]
) -> None:
    """Where inputs are not quantized the block is an ordinary one with other weights, which autograd knows."""
    block, call, hidden, twin = opened(models[model], artifact(model, preset, options), preset, options, {})
    above = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    before, found = block.gradients(hidden, call, above)

    for name, module in block.modules.items():
        linear = nn.Linear(module.in_features, module.out_features, module.spec.bias)
        linear.weight.data = module.dequantize()
        if module.spec.bias:
            linear.bias.data = module.bias.clone()
        twin.set_submodule(name, linear)
    for name in block.tuned:
        if name not in dict(twin.named_parameters()) or twin.get_parameter(name).is_meta:
            path, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(path), leaf, nn.Parameter(block.tensors[f"{block.prefix}.{name}"].float()))
    entry = hidden.clone().requires_grad_()
    output = run_block(twin, entry, call)
    torch.testing.assert_close(block(hidden, call).detach(), output.detach(), rtol=1e-4, atol=1e-4)
    output.backward(above)
    torch.testing.assert_close(before, entry.grad, rtol=1e-3, atol=1e-3)
    checked = 0
    for name, tuned in block.tuned.items():
        gradient = twin.get_parameter(name).grad
        module = block.modules.get(name.removesuffix(".weight"))
        if module is not None:  # to site order, where the weights are
            gradient = gradient if module.order is None else gradient[:, module.order]
            gradient = gradient if module.spec.transform is None else module.spec.transform.apply(gradient)
        for part, expected in tuned.pull(gradient).items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[f"{name}/{part}"], expected, rtol=1e-3, atol=1e-3 * scale)
            checked += 1
    assert checked == len(block.values) == len(found)


@pytest.mark.parametrize("options", [{}, {"activations.balance": "none", "kv.hadamard": True}])
def test_it_computes_what_is_stored(
    options: dict[str, Any], models: dict[str, Path], artifact: Callable[..., Path]
) -> None:
    """With everything quantized, and after a move: bit for bit what the modules of a loaded artifact compute."""
    made = artifact("llama_biases", "bwa", options)
    block, call, hidden, _ = opened(models["llama_biases"], made, "bwa", options, {})
    generator = torch.Generator().manual_seed(2)
    for value in block.values.values():
        value.mul_(1 + 0.05 * torch.randn(value.shape, generator=generator))
    block.settle()
    with torch.inference_mode():
        ours = block(hidden, call)
        shard = block.shard()
        packed = block.packed()
        cache = QuantizedKVCache(2, block.recipe.kv)
        theirs = run_block(packed, hidden, {**call, "past_key_values": cache, "use_cache": True})
    assert torch.equal(ours, theirs)
    for name, module in block.modules.items():
        for part, tensor in module.matrix().tensors().items():
            assert torch.equal(shard[f"{block.prefix}.{name}.{part}"], tensor)
    for name in ("input_layernorm.weight", "self_attn.q_proj.bias"):
        before = block.tensors[f"{block.prefix}.{name}"]
        after = shard[f"{block.prefix}.{name}"]
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert not torch.equal(after, before)
    assert {n: (t.dtype, t.shape) for n, t in shard.items()} == {
        n: (t.dtype, t.shape) for n, t in block.tensors.items()
    }


def test_gradients_pass_quantized_inputs_and_cache(models: dict[str, Path], artifact: Callable[..., Path]) -> None:
    """Straight-through: no value is cut off, and the direction is that of the block without quantized inputs."""
    model = models["llama"]
    made = artifact("llama", "bwa", {"activations": {"bits": 8, "balance": "none"}, "kv.bits": 8})
    gradients = []
    for options in ({"activations": {"bits": 8, "balance": "none"}, "kv.bits": 8}, {"activations": None, "kv": None}):
        block, call, hidden, _ = opened(model, made, "bwa", options, {})
        above = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        before, found = block.gradients(hidden, call, above)
        gradients.append({"hidden": before, **found})
    for key, quantized in gradients[0].items():
        exact = gradients[1][key]
        cosine = torch.nn.functional.cosine_similarity(quantized.flatten(), exact.flatten(), dim=0)
        assert float(cosine) > 0.98, key
