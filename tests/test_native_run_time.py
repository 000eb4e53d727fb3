"""A loaded artifact on the native kernels: what they compute, and that nothing of the format is lost by repacking."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
import simulation
from bitwright import native
from bitwright.runtime import dense_weights, pack_sites, quantized_linears
from lean import Logits

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

BALANCES = ("none", "support")  # the byte kernel and the boolean product


@pytest.fixture(params=[(name, balance) for name in ("llama", "qwen2", "mistral") for balance in BALANCES])
def directory(request: pytest.FixtureRequest, artifact: Callable[..., Path]) -> Path:
    name, balance = request.param
    return artifact(name, "bwa", {"activations.balance": balance})


def test_every_linear_is_packed_and_computes_what_is_stored(directory: Path) -> None:
    model = bitwright.load(directory)
    stored = simulation.stored_matrices(directory)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, linear in quantized_linears(model):
        assert linear.packed is not None, name
        assert linear.codes is None, "the stored tensors are let go"

        def remember(_: Any, args: Any, out: torch.Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], out

        linear.register_forward_hook(remember)
    with torch.inference_mode():
        model(torch.arange(40).view(1, -1), use_cache=False)
    assert outputs.keys() == stored.keys()
    for name, linear in quantized_linears(model):
        x = inputs[name]
        with dense_weights(linear):
            expected = linear.forward(x)
        error = (outputs[name] - expected).norm() / expected.norm()
        assert error < 2e-6, name


def test_saving_a_packed_model_gives_the_stored_tensors(directory: Path, tmp_path: Path) -> None:
    model = bitwright.load(directory)
    model.save_pretrained(tmp_path / "again")
    again = bitwright.load(tmp_path / "again")
    before = simulation.stored_matrices(directory)
    after = simulation.stored_matrices(tmp_path / "again")
    assert after.keys() == before.keys()
    for name, matrix in before.items():
        for part, tensor in matrix.tensors().items():
            assert torch.equal(after[name].tensors()[part], tensor), (name, part)
    ids = torch.arange(30).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_copies_casts_and_state_dicts(directory: Path) -> None:
    model = bitwright.load(directory)
    ids = torch.arange(30).view(1, -1)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(copy.deepcopy(model)(ids, use_cache=False).logits, expected)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        assert all(linear.packed is None for _, linear in quantized_linears(model)), "loading undoes the packing"
        loose = model(ids, use_cache=False).logits
        pack_sites(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert (loose - expected).norm() / expected.norm() < 0.2, "sums in another order tip a code now and then"
        half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        assert half(ids, use_cache=False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "balance"), [("llama", "none"), ("qwen2", "support")])
def test_a_model_compiles_and_exports_whole(artifact: Callable[..., Path], name: str, balance: str) -> None:
    model = bitwright.load(artifact(name, "bwa", {"activations.balance": balance}))
    linears = len(list(quantized_linears(model)))

    ids = torch.arange(3, 33).view(1, -1)
    with torch.no_grad():
        expected = Logits(model)(ids)
        compiled = torch.compile(Logits(model), fullgraph=True, backend="aot_eager")(ids)
        exported = torch.export.export(Logits(model), (ids,))
        assert torch.equal(compiled, expected)
        assert torch.equal(exported.module()(ids), expected)
    calls = [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("bitwright.site_")]
    assert len(calls) == linears


def test_a_meta_device_move_unpacks(directory: Path) -> None:
    model = bitwright.load(directory)
    _, linear = next(iter(quantized_linears(model)))
    codes = linear.stored()["codes"].shape
    linear.to("meta")
    assert linear.packed is None
    assert linear.codes.shape == codes
    assert linear.codes.device.type == "meta"


def test_the_variable_turns_the_kernels_off(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, native.REFERENCE)
    native.native.cache_clear()
    try:
        model = bitwright.load(directory)
        assert all(linear.packed is None for _, linear in quantized_linears(model))
        with torch.inference_mode():
            assert bool(model(torch.arange(9).view(1, -1)).logits.isfinite().all())
    finally:
        native.native.cache_clear()
