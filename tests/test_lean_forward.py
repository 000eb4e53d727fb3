"""The lean path of a packed model gives what transformers' forward gives, and steps aside where it does not serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitwright
import simulation
from bitwright import native
from bitwright.integrations.transformers import quantized_cache, recipe_of
from bitwright.runtime import linear, native_blocks, quantized_linears
from conftest import MODELS
from lean import block_by_block, counted, steps, without_lean_path

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

BALANCES = ("none", "support")  # the byte kernel and the boolean product


@pytest.fixture(
    params=[
        *((name, "none") for name in (*MODELS, "qwen3")),
        ("llama", "support"),
        ("mistral", "symmetric"),
        ("llama", "4 x 8 bits"),
    ]
)
def model(request: pytest.FixtureRequest, artifact: Callable[..., Path]) -> Any:
    name, balance = request.param
    if balance == "symmetric":
        return bitwright.load(artifact(name, "atom", {"weights.bits": 2}))
    if balance == "4 x 8 bits":
        widths = {"weights.bits": 4, "activations.bits": 8, "activations.balance": "none"}
        return bitwright.load(artifact(name, "rtn", widths))
    return bitwright.load(artifact(name, "bwa", {"activations.balance": balance}))


def test_it_computes_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    sizes = [40, 1, 1, 7, 1, 10]
    with counted(model, monkeypatch) as calls:
        found = steps(model, ids, sizes)
    assert calls == sizes
    with without_lean_path(model), counted(model, monkeypatch) as calls:
        expected = steps(model, ids, sizes)
    assert calls == []
    for got, want in zip(found, expected, strict=True):
        # Attention sums in another order; a rounding difference may tip a 4-bit code, which then counts.
        assert (got - want).norm() / want.norm() < 0.05
    assert (found[0] - expected[0]).norm() / expected[0].norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_blocks_are_the_calls_one_by_one(model: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    ids = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    sizes = [native_blocks.FEW_TOKENS + 14, 1, native_blocks.FEW_TOKENS, 1, 12]
    for _ in range(2):
        whole = steps(model, ids, sizes)
        with block_by_block(model):
            single = steps(model, ids, sizes)
        assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))
        with torch.no_grad():  # what a copy in fp32 was made of changes
            model.model.layers[1].post_attention_layernorm.weight.mul_(1.5)
            model.model.norm.weight.mul_(0.5)
        assert not torch.equal(steps(model, ids, sizes)[0], whole[0])


def test_a_transform_is_done_once_a_site(artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bitwright.load(artifact("qwen3", "bwa", {"transform.hadamard": "group", "weights.group": 32}))
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    turned: list[int] = []
    original = linear.site_hadamard_eager

    def counting(x: Tensor, *rest: Any) -> Tensor:
        turned.append(x.shape[-1])
        return original(x, *rest)

    monkeypatch.setattr(linear, "site_hadamard_eager", counting)
    with block_by_block(model):
        (found,) = steps(model, ids, [20])
    width, heads, inner = 64, 4 * 24, 136
    assert turned == [width, heads, width, inner] * model.config.num_hidden_layers
    assert torch.equal(steps(model, ids, [20])[0], found)
    with without_lean_path(model):
        (expected,) = steps(model, ids, [20])
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_generate_says_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    ask = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with counted(model, monkeypatch) as calls:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **ask)
    assert calls == [12] + [1] * 11
    with without_lean_path(model):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **ask)
    same = (found == expected).float().mean()
    assert same > 0.6, "greedy text parts only where two tokens are as good as equal"


def test_it_steps_aside(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 13).view(1, -1)
    recipe = recipe_of(model)
    assert recipe is not None
    padded = torch.ones(1, 10, dtype=torch.long)
    padded[0, :2] = 0
    with counted(model, monkeypatch) as calls:
        with torch.inference_mode():
            model(ids)  # transformers' own cache
            model(ids, use_cache=False)
            model(ids.repeat(2, 1), past_key_values=quantized_cache(model, recipe))
            model(ids, attention_mask=padded, past_key_values=quantized_cache(model, recipe))
            model(ids, position_ids=torch.arange(5, 15).view(1, -1), past_key_values=quantized_cache(model, recipe))
            hidden = model(ids, output_hidden_states=True, past_key_values=quantized_cache(model, recipe)).hidden_states
            assert len(hidden) == model.config.num_hidden_layers + 1
        model(ids, past_key_values=quantized_cache(model, recipe))  # gradients on
    assert calls == []
    with counted(model, monkeypatch) as calls, torch.inference_mode():
        model(ids, attention_mask=torch.ones(1, 10), past_key_values=quantized_cache(model, recipe))
    assert calls == [10]


def test_copies_and_changed_weights_are_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 13).view(1, -1)
    recipe = recipe_of(model)

    def logits(which: Any) -> Tensor:
        with torch.inference_mode():
            result: Tensor = which(ids, past_key_values=quantized_cache(which, recipe)).logits
        return result

    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2.0)
        twin.model.layers[0].input_layernorm.weight.mul_(3.0)
    assert torch.equal(logits(model), before), "a copy's change reaches the original"
    changed = logits(twin)
    assert (changed - before).norm() / before.norm() > 0.5
    with without_lean_path(twin):
        assert (changed - logits(twin)).norm() / changed.norm() < 2e-2
    # New packed weights: the sites that the lean path holds are those of before, so it must not be used.
    state = model.state_dict()
    name = next(key for key in state if key.endswith("v_proj.scales"))
    state[name] = state[name] * 0.25
    model.load_state_dict(state)
    with counted(model, monkeypatch) as calls:
        after = logits(model)
    assert calls == []
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("bwa", {}),
        ("quarot", {"weights.group": 32}),
        ("gbs", {"weights.group": 32, "search.iterations": 1}),
        ("rtn", {"weights.group": 32}),
    ],
)
def test_tiles_are_held_once(preset: str, options: dict[str, Any], artifact: Callable[..., Path]) -> None:
    """Linears of a site without an order to share are packed one by one; the lean path wants them side by side."""
    directory = artifact("llama", preset, options)
    model = bitwright.load(directory)
    decoder = model.model._bitwright_lean.current()
    for block, layer in zip(decoder.blocks, model.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for site, members in (
            (block.attn_in, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.attn_out, (attention.o_proj,)),
            (block.mlp_in, (mlp.gate_proj, mlp.up_proj)),
            (block.mlp_out, (mlp.down_proj,)),
        ):
            at = site.packed.data_ptr()
            for member in members:
                assert member.packed.data_ptr() == at
                at += member.packed.numel()
            assert at == site.packed.data_ptr() + site.packed.numel()
    stored = simulation.stored_matrices(directory)
    for name, member in quantized_linears(model):
        parts = member.matrix().tensors()
        assert all(torch.equal(parts[part], tensor) for part, tensor in stored[name].tensors().items()), name
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    (found,) = steps(model, ids, [20])
    with without_lean_path(model):
        (expected,) = steps(model, ids, [20])
    assert (found - expected).norm() / expected.norm() < 2e-2
