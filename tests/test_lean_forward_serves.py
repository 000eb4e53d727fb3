"""Which calls the lean path takes: those that it answers as transformers does, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

import bitwright
import support
from bitwright import native
from bitwright.integrations.transformers import quantized_cache, recipe_of
from lean import Logits, counted, without_lean_path

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

IDS = torch.arange(3, 13).view(1, -1)


@pytest.fixture
def model(artifact: Callable[..., Path]) -> Any:
    return bitwright.load(artifact("llama", "bwa"))


def call(model: Any, **more: Any) -> Any:
    cache = quantized_cache(model, recipe_of(model))
    with torch.inference_mode():
        return model(IDS, past_key_values=cache, use_cache=True, **more)


@pytest.mark.parametrize("odd", [[0] * 9 + [9], [0, *range(2, 9), 1, 9], [*range(1, 11)], [0] * 10])
def test_positions_that_do_not_follow_each_other(model: Any, odd: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = call(model).logits
    with counted(model, monkeypatch) as calls:
        found = call(model, position_ids=torch.tensor([odd])).logits
        assert calls == []
        for dtype in (torch.int64, torch.int32):
            assert torch.equal(call(model, position_ids=torch.arange(10, dtype=dtype).view(1, -1)).logits, usual)
    assert calls == [10, 10]
    assert not torch.equal(found, usual)
    with without_lean_path(model):
        assert torch.equal(call(model, position_ids=torch.tensor([odd])).logits, found)


@pytest.mark.parametrize(
    ("name", "edit", "slides"),
    [
        ("llama", {"sliding_window": 3}, False),
        ("llama", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}, False),
        ("mistral", {"sliding_window": 3}, True),
        ("mistral", {"sliding_window": None}, False),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": False}, False),
        ("qwen3", {"sliding_window": 3, "use_sliding_window": True}, False),  # layer_types are all full_attention
        (
            "qwen2",
            {
                "sliding_window": 3,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            True,
        ),
    ],
)
def test_a_window_is_where_transformers_has_it(
    name: str,
    edit: dict[str, Any],
    slides: bool,
    artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = Path(copytree(artifact(name, "bwa"), tmp_path / "edited"))
    support.edit_json(directory / "config.json", lambda data: data.update({"sliding_window": None} | edit))
    model, usual = bitwright.load(directory), bitwright.load(artifact(name, "bwa"))
    with counted(model, monkeypatch) as calls:
        found = call(model).logits
    assert calls == [10]
    with without_lean_path(model):
        expected = call(model).logits
    assert (found - expected).norm() / expected.norm() < 2e-2
    # Windows of the models as they are hold more than these tokens.
    assert torch.equal(found, call(usual).logits) == (not slides)


@pytest.mark.parametrize("key", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("place", ["call", "config"])
def test_hidden_states_and_attentions_are_given(
    model: Any, key: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = model.config.num_hidden_layers
    model.set_attn_implementation("eager")
    if place == "config":
        setattr(model.config, key, True)
    with counted(model, monkeypatch) as calls:
        found = call(model, **({key: True} if place == "call" else {}))
        assert calls == []
        if key == "output_hidden_states":
            assert len(found.hidden_states) == layers + 1
        else:
            assert [part.shape for part in found.attentions] == [(1, 6, 10, 10)] * layers
        call(model, **{key: False})  # a call's word goes before the config's
    assert calls == [10]


@pytest.mark.parametrize("place", ["call", "config"])
def test_tuples_are_given_to_who_asks_for_them(model: Any, place: str) -> None:
    ids, cache = IDS, quantized_cache(model, recipe_of(model))
    model.config.return_dict = place != "config"
    more = {"return_dict": False} if place == "call" else {}
    with torch.inference_mode():
        found = model.model(ids, past_key_values=cache, use_cache=True, **more)
    assert isinstance(found, tuple)
    assert found[0].shape == (1, 10, model.config.hidden_size)


@pytest.fixture
def half(artifact: Callable[..., Path]) -> Any:
    return bitwright.load(artifact("mistral", "bwa")).to(torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_logits_have_one_dtype(half: Any, tokens: int) -> None:
    """The native kernel for few tokens rounds to it what torch's product would."""
    ids = IDS.repeat(1, 2)[:, :tokens]
    hidden = torch.randn(1, tokens, half.config.hidden_size).bfloat16()
    exact = torch.nn.functional.linear(hidden.float(), half.lm_head.weight.float())
    with torch.inference_mode():
        for cache in (None, quantized_cache(half, recipe_of(half))):
            logits = half(ids, past_key_values=cache, use_cache=cache is not None).logits
            assert logits.dtype == torch.bfloat16
            assert logits.shape == (1, tokens, half.config.vocab_size)
        found = half.lm_head(hidden)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= 2.0**-8 * exact.abs().max()


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_bfloat16_model_compiles_and_exports(half: Any, tokens: int) -> None:
    ids = IDS[:, :tokens]
    with torch.no_grad():
        expected = Logits(half)(ids)
        compiled = torch.compile(Logits(half), fullgraph=True, backend="aot_eager")(ids)
        exported = torch.export.export(Logits(half), (ids,)).module()(ids)
    for found in (compiled, exported):
        assert found.dtype == expected.dtype == torch.bfloat16
        assert (found.float() - expected.float()).norm() / expected.float().norm() < 2e-2


def test_a_bfloat16_head_exports_for_any_number_of_tokens(half: Any) -> None:
    x, tokens = torch.randn(1, 4, half.config.hidden_size).bfloat16(), torch.export.Dim("tokens", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(half.lm_head, (x,), dynamic_shapes=({1: tokens},)).module()
        for count in (1, 4, 30):
            x = torch.randn(1, count, half.config.hidden_size).bfloat16()
            expected = half.lm_head(x).float()
            assert (exported(x).float() - expected).norm() / expected.norm() < 1e-2
