"""Dimension expansion: the expanded model is an ordinary one of its architecture and computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

import support
from bitwright.errors import ModelError
from bitwright.models import Checkpoint, Skeleton
from bitwright.models import expanded as module
from bitwright.models.expanded import expanded
from bitwright.pipeline.source import Source
from bitwright.recipe import preset
from bitwright.transforms.expansion import Expansion, Role, expand, expanded_shape
from bitwright.transforms.hadamard import constructible

from .twins import gaussian

# 92 and 184 have no Hadamard matrix, 96 and 192 have. An eps that is felt: 1e-6 would hide a wrong one.
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 92,
    "intermediate_size": 184,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.3,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    "mistral": MistralConfig(**SMALL | {"head_dim": 20, "sliding_window": 9}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL | {"head_dim": 24, "attention_bias": True}),
}
Saved = Callable[[str], tuple[Any, Skeleton]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """saved(name) -> the model, and the skeleton of its files."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> tuple[Any, Skeleton]:
        directory = root / name.replace(", ", "-")
        if not directory.exists():
            support.save_model(directory, CONFIGS[name], torch.float32, 5)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return model.requires_grad_(False), Skeleton(Checkpoint(directory))

    return make


def built(skeleton: Skeleton, state: dict[str, Tensor]) -> Any:
    """An ordinary model of transformers with a skeleton's config; nothing of the state is left over or missing."""
    config = type(skeleton.config).from_dict(skeleton.config.to_dict())
    config.tie_word_embeddings = "lm_head.weight" not in state
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def difference(model: Any, other: Any) -> float:
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = model(ids).logits, other(ids).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["hadamard", "power"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_stay_what_they_are(name: str, kind: str, saved: Saved) -> None:
    model, skeleton = saved(name)
    wide = expanded(skeleton, kind)
    config = wide.config
    expected = (96, 192) if kind == "hadamard" else (128, 256)
    assert (config.hidden_size, config.intermediate_size) == expected
    assert config.head_dim == model.model.layers[0].self_attn.head_dim
    assert wide.width == expected[0]
    state = wide.checkpoint.load(sorted(wide.checkpoint.tensors))
    assert difference(model, built(wide, state)) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_they_stay_as_well(name: str, saved: Saved) -> None:
    """As the pipeline makes it, block by block; what is done online at a site is undone in the weights."""
    model, skeleton = saved(name)
    wide = expanded(skeleton, "hadamard")
    source = Source(wide, preset("gbs"))
    state = source.outer()
    for index in range(2):
        block = source.block(index)
        state |= {f"{wide.block_name(index)}.{key}": value for key, value in block.state_dict().items()}
    turned = built(wide, state)
    assert difference(model, turned) < 1e-4
    norms = [p for key, p in turned.named_parameters() if "layernorm" in key or key == "model.norm.weight"]
    assert len(norms) == 5
    assert all(torch.equal(p, torch.ones(96)) for p in norms)
    # The rotation fills the new channels: without it they are zero.
    weight = turned.model.embed_tokens.weight.detach()
    assert float(weight[:, 92:].std()) > 0.3 * float(weight.std())
    assert any("92 to 96" in note and "184 to 192" in note for note in source.notes())


def test_what_happens_to_each_tensor(saved: Saved) -> None:
    """Written out by hand for one block of Qwen3, whose heads have norms of their own."""
    model, skeleton = saved("qwen3")
    wide = expanded(skeleton, "hadamard")
    found = wide.checkpoint.load(sorted(wide.checkpoint.tensors))
    gain = math.sqrt(92 / 96)
    block = "model.layers.0"
    for name, before in model.state_dict().items():
        expected = before.clone()
        if "layernorm" in name or name == "model.norm.weight":
            expected = torch.cat([before * gain, torch.zeros(4)])
        if name.startswith(f"{block}.self_attn.q_proj") or name.startswith(f"{block}.self_attn.k_proj"):
            expected = before * gain
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) or name in (
            "model.embed_tokens.weight",
            "lm_head.weight",
        ):
            expected = torch.cat([expected, torch.zeros(len(before), 4)], dim=1)
        if name.endswith("o_proj.weight"):
            expected = torch.cat([before, torch.zeros(4, before.shape[1])])
        if name.endswith("o_proj.bias"):
            expected = torch.cat([before, torch.zeros(4)])
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            expected = torch.nn.functional.pad(before, (0, 4, 0, 8))
        if name.endswith("down_proj.weight"):
            expected = torch.nn.functional.pad(before, (0, 8, 0, 4))
        if name.startswith(block) or "layers" not in name:
            assert torch.equal(found[name], expected), name
    assert wide.config.rms_norm_eps == pytest.approx(0.3 * 92 / 96)
    assert wide.checkpoint.config["rms_norm_eps"] == wide.config.rms_norm_eps


def test_no_larger_size_is_tried_than_the_one_taken(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a matrix costs seconds at the widths of large models: up to four times as wide it was minutes."""
    tried = []
    monkeypatch.setattr(module, "constructible", lambda size: tried.append(size) or constructible(size))
    expanded(saved("qwen2")[1], "hadamard")
    assert max(tried) == 192


def test_sizes_that_transformers_does_not_take_are_passed_over(tmp_path: Path) -> None:
    """Llama's width has to be a multiple of its heads: 100 is none of 23, 184 has no matrix, 276 = 92 x 3 is next."""
    config = LlamaConfig(**SMALL | {"num_attention_heads": 23, "vocab_size": 300})
    skeleton = Skeleton(Checkpoint(support.save_model(tmp_path / "m", config, torch.float32, 1)))
    assert expanded(skeleton, "hadamard").width == 276
    with pytest.raises(ModelError, match=r"no LlamaForCausalLM of 23 heads .* write transform\.expansion = 'hadamard'"):
        expanded(skeleton, "power")


def test_models_that_need_nothing_are_left_alone(tmp_path: Path) -> None:
    config = Qwen2Config(**SMALL | {"hidden_size": 96, "intermediate_size": 192, "vocab_size": 300})
    skeleton = Skeleton(Checkpoint(support.save_model(tmp_path / "m", config, torch.float32, 1)))
    assert expanded(skeleton, "hadamard") is skeleton
    wider = expanded(skeleton, "power")
    assert expanded(wider, "power") is wider
    assert expanded(wider, "hadamard") is wider


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2)
    skeleton = Skeleton(Checkpoint(support.save_model(tmp_path / "m", config, torch.float32, 1)))
    with pytest.raises(ModelError, match="and not OPTForCausalLM"):
        expanded(skeleton, "hadamard")


def test_a_tensor_of_another_size_is_refused() -> None:
    by = Expansion(6, 8, 5, 7)
    assert expanded_shape((6, 5), Role(stream=0, inner=1), by) == (8, 7)
    with pytest.raises(ValueError, match=r"axis 1 of \[6, 4\] should have 5 channels"):
        expanded_shape((6, 4), Role(stream=0, inner=1), by)
    x = gaussian(6, 5)
    found = expand(x, Role(stream=0, inner=1, gain=True), by)
    assert torch.equal(found[:6, :5], x * math.sqrt(6 / 8))
    assert int(found.count_nonzero()) == int(x.count_nonzero())
    assert expand(x, Role(), by) is x
