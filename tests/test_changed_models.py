"""A loaded model that is changed afterwards: the lean path sees it, and answers as transformers' own forward does."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright import native
from bitwright.runtime import QuantizedKVCache, pack_sites, quantized_linears
from lean import counted, steps, without_lean_path

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

IDS = torch.arange(3, 13).view(1, -1)


@pytest.fixture
def model(artifact: Callable[..., Path]) -> Any:
    return bitwright.load(artifact("llama", "bwa"))


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, bool], Tensor]:
    """answer(model, lean) -> its logits for IDS, and whether the lean path gave them is `lean`."""

    def ask(model: Any, lean: bool) -> Tensor:
        with counted(model, monkeypatch) as calls:
            (found,) = steps(model, IDS, [IDS.shape[1]])
        assert bool(calls) == lean
        return found

    return ask


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() / theirs.norm() < 2e-2)


def test_a_dequantized_model_is_none_of_ours(model: Any, answer: Callable[..., Tensor]) -> None:
    before = answer(model, True)
    cache = QuantizedKVCache(model.config.num_hidden_layers, bitwright.preset("bwa").kv)
    plain = model.dequantize()
    for module in (plain.model, plain.lm_head):
        assert "forward" not in vars(module)
    assert not any("bitwright" in name for name in vars(plain.model)), "nothing holds the tiles"
    with torch.inference_mode():
        full = plain(IDS, past_key_values=cache).logits
        for linear in (module for module in plain.model.layers.modules() if type(module) is nn.Linear):
            linear.weight.zero_()
        empty = plain(IDS, past_key_values=QuantizedKVCache(len(plain.model.layers), bitwright.preset("bwa").kv)).logits
    assert not torch.equal(full, before)
    assert (empty - full).norm() / full.norm() > 0.1


def new_linear(model: Any) -> None:
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def new_norm(model: Any) -> None:
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.data.mul_(torch.linspace(-2, 2, model.config.hidden_size))


def fewer_blocks(model: Any) -> None:
    del model.model.layers[1]


def no_blocks(model: Any) -> None:
    model.model.layers = nn.ModuleList()


def other_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = torch.zeros_like


def block_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 0.0)


def linear_hook(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * -3,))


def norm_hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.flip(-1))


@pytest.mark.parametrize(
    "change",
    [new_linear, new_norm, fewer_blocks, no_blocks, other_forward, block_hook, linear_hook, norm_hook],
    ids=lambda change: change.__name__,
)
def test_other_modules_and_hooks(model: Any, answer: Callable[..., Tensor], change: Callable[[Any], None]) -> None:
    before = answer(model, True)
    with torch.no_grad():
        change(model)
    if hasattr(model.model.layers, "__len__"):
        model.config.num_hidden_layers = max(len(model.model.layers), 1)
    after = answer(model, False)
    assert (after - before).norm() / before.norm() > 0.05
    with without_lean_path(model):
        assert torch.equal(answer(model, False), after)


def test_what_is_undone_is_served_again(model: Any, answer: Callable[..., Tensor]) -> None:
    before = answer(model, True)
    calls: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert close(answer(model, False), before)
    assert calls == [1]
    hook.remove()
    assert torch.equal(answer(model, True), before)
    mlp = model.model.layers[0].mlp
    kept, mlp.act_fn = mlp.act_fn, nn.Identity()
    answer(model, False)
    mlp.act_fn = kept
    assert torch.equal(answer(model, True), before)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        answer(model, False)
    assert torch.equal(answer(model, True), before)


def test_hidden_states_leave_the_lean_path_as_it_was(model: Any, answer: Callable[..., Tensor]) -> None:
    """transformers puts hooks on the blocks when it is first asked for hidden states, and leaves them there."""
    before = answer(model, True)
    with torch.inference_mode():
        assert len(model(IDS, output_hidden_states=True, output_attentions=True).hidden_states) == 3
    assert torch.equal(answer(model, True), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_norms_and_embedding(model: Any, answer: Callable[..., Tensor], dtype: torch.dtype) -> None:
    model = model.to(dtype)
    before = answer(model, True)
    scale = torch.linspace(-1, 2, model.config.hidden_size).to(dtype)

    def is_seen() -> None:
        nonlocal before
        after = answer(model, True)
        assert (after - before).norm() / before.norm() > 0.05
        assert torch.equal(answer(copy.deepcopy(model), True), after), "a copy's lean path is made anew"
        with without_lean_path(model):
            assert dtype != torch.float32 or close(answer(model, False), after)
        before = after

    norms = model.model.norm, model.model.layers[1].input_layernorm
    for norm in norms:
        norm.weight.data.mul_(scale)  # no version counter tells of it
        is_seen()
        norm.weight.data = norm.weight.data * scale.flip(0)
        is_seen()
        norm.weight = nn.Parameter(norm.weight.detach() + scale, requires_grad=False)
        is_seen()
    embedding = nn.Embedding(*model.model.embed_tokens.weight.shape).to(dtype)
    model.model.embed_tokens = embedding
    is_seen()
    embedding.register_forward_hook(lambda module, inputs, output: output * scale)
    is_seen()


@pytest.mark.parametrize("name", ["qwen2", "llama_biases"])
def test_a_cast_keeps_the_lean_path(artifact: Callable[..., Path], answer: Callable[..., Tensor], name: str) -> None:
    """It gives linears other tensors for their biases, and norms other memory."""
    model = bitwright.load(artifact(name, "bwa"))
    before = answer(model, True)
    cast = answer(model.to(torch.bfloat16), True)
    assert 0 < (cast - before).norm() / before.norm() < 0.2
    with torch.no_grad():
        bias = next(m.bias for m in model.model.layers.modules() if getattr(m, "bias", None) is not None)
        assert bias.dtype == torch.bfloat16


def test_weights_that_were_turned_back_are_told_of_once(model: Any, answer: Callable[..., Tensor]) -> None:
    before = answer(model, True)
    site = weakref.ref(model.model._bitwright_lean.current().blocks[0].attn_in)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            loose = answer(model, False)
    assert [str(one.message) for one in told if "pack_sites" in str(one.message)] == [str(told[0].message)]
    assert (loose - before).norm() / before.norm() < 0.2, "sums in another order tip a code now and then"
    gc.collect()
    assert site() is None, "the tiles of before are let go"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_sites(model)
        assert torch.equal(answer(model, True), before)


def test_a_linear_that_was_moved_tells_of_it(model: Any) -> None:
    _, linear = next(quantized_linears(model))
    x = torch.randn(2, linear.in_features)
    expected, state = linear(x), linear.state_dict()
    linear.to("meta").to_empty(device="cpu").load_state_dict(state)
    with pytest.warns(UserWarning, match="pack_sites"):
        assert close(linear(x), expected)
    linear.pack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(linear(x), expected)
