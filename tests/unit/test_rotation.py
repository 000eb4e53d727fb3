"""Rotated models are the models that they were: whole models against the originals, tensors against dense matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

from bitwright.errors import ModelError
from bitwright.models.anatomy import LLAMA, anatomy
from bitwright.models.frame import Frame
from bitwright.transforms import SiteHadamard
from bitwright.transforms.hadamard import largest_block, matrix
from bitwright.transforms.norm_fusion import fuse_norm
from bitwright.transforms.rotation import Rotation
from support import give_structure

from .twins import gaussian

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 72,
    "intermediate_size": 140,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    # No Hadamard of order 6 or 14: blocks of 2.
    "llama, 6 heads of 14": LlamaConfig(**SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14}),
    "mistral": MistralConfig(**SMALL | {"hidden_size": 96, "intermediate_size": 200, "head_dim": 20}, sliding_window=9),
    "qwen2": Qwen2Config(**SMALL | {"hidden_size": 56, "intermediate_size": 300, "num_attention_heads": 4}),
    "qwen3": Qwen3Config(**SMALL | {"hidden_size": 64, "intermediate_size": 136, "head_dim": 24}),
}


def a_model(name: str) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    give_structure(model, 5)
    return model.requires_grad_(False)


def frame_of(model: Any) -> Frame:
    return Frame(model, model.config, "model.layers", list(model.model.layers))


def rotated(model: Any, seed: int = 3) -> Any:
    """A copy in the rotated basis, block by block; what is done online is left out."""
    twin = copy.deepcopy(model)
    known = anatomy(frame_of(model))
    rotation = Rotation(known.width, known.head_dim, seed)
    for block in twin.model.layers:
        block.load_state_dict(rotation.block(block.state_dict(), known.block))
    twin.lm_head.weight = nn.Parameter(rotation.head(model.lm_head.weight, model.model.norm.weight))
    twin.model.embed_tokens.weight = nn.Parameter(rotation.embedding(model.model.embed_tokens.weight))
    twin.model.norm.weight = nn.Parameter(torch.ones_like(model.model.norm.weight))
    return twin


def online(model: Any) -> None:
    """The transforms of o_proj's and down_proj's inputs, undone in their weights."""
    known = anatomy(frame_of(model))
    for block in model.model.layers:
        o, down = block.self_attn.o_proj, block.mlp.down_proj
        sites = [
            (o, SiteHadamard(largest_block(known.heads), known.head_dim, o.in_features)),
            (down, SiteHadamard(largest_block(down.in_features), 1, down.in_features)),
        ]
        for linear, site in sites:
            linear.weight.data = site.apply(linear.weight.data)
            linear.register_forward_pre_hook(lambda _, args, site=site: (site.apply(args[0]),))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_stay_what_they_are(name: str) -> None:
    model = a_model(name)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        turned = rotated(model)
        first = turned(ids).logits
        online(turned)
        second = turned(ids).logits
    scale = float(expected.abs().max())
    assert float((first - expected).abs().max()) < 1e-4 * scale
    assert float((second - expected).abs().max()) < 1e-4 * scale


def test_the_hidden_states_are_rotated() -> None:
    """Peaks of the stream, here one channel of the embedding forty times as large, are spread over all channels."""
    model = a_model("llama, biases")
    model.model.embed_tokens.weight[:, 7] *= 40
    ids = torch.arange(20).view(1, -1)
    turned = rotated(model)
    q = turned_matrix(72, 3)
    with torch.inference_mode():
        before = model(ids, output_hidden_states=True).hidden_states[:-1]
        after = turned(ids, output_hidden_states=True).hidden_states[:-1]
    for h, t in zip(before, after, strict=True):
        torch.testing.assert_close(t.double(), h.double() @ q, rtol=1e-3, atol=1e-4 * float(h.abs().max()))
    peak = [float((h[0].abs().amax(dim=-1) / h[0].square().mean(dim=-1).sqrt()).mean()) for h in (before[0], after[0])]
    assert peak[0] > 6
    assert peak[1] < 3.5


def turned_matrix(width: int, seed: int) -> Tensor:
    """Q, fp64: signs times the Hadamard matrix."""
    signs = Rotation(width, 2, seed).stream.signs(torch.ones(1, dtype=torch.float64))
    return torch.diag(signs) @ matrix(width).double() / math.sqrt(width)


def test_tensors_against_dense_matrices() -> None:
    """QuaRot, section 4, written with matrices; heads of 6 channels, so blocks of 2 in them."""
    block = a_model("llama, biases").model.layers[0]
    state = {name: tensor.double() for name, tensor in block.state_dict().items()}
    found = Rotation(72, 6, 3).block(state, LLAMA)
    q, one = turned_matrix(72, 3), matrix(2).double() / math.sqrt(2)
    values, mixed = torch.block_diag(*[one] * 12), torch.block_diag(*[one] * 36)
    gamma, second = (torch.diag(state[f"{n}.weight"]) for n in ("input_layernorm", "post_attention_layernorm"))
    expected = {
        "self_attn.q_proj.weight": state["self_attn.q_proj.weight"] @ gamma @ q,
        "self_attn.k_proj.weight": state["self_attn.k_proj.weight"] @ gamma @ q,
        "self_attn.v_proj.weight": values.T @ state["self_attn.v_proj.weight"] @ gamma @ q,
        "self_attn.v_proj.bias": state["self_attn.v_proj.bias"] @ values,
        "self_attn.o_proj.weight": q.T @ state["self_attn.o_proj.weight"] @ mixed,
        "self_attn.o_proj.bias": state["self_attn.o_proj.bias"] @ q,
        "mlp.gate_proj.weight": state["mlp.gate_proj.weight"] @ second @ q,
        "mlp.up_proj.weight": state["mlp.up_proj.weight"] @ second @ q,
        "mlp.down_proj.weight": q.T @ state["mlp.down_proj.weight"],
        "mlp.down_proj.bias": state["mlp.down_proj.bias"] @ q,
        "input_layernorm.weight": torch.ones(72).double(),
        "post_attention_layernorm.weight": torch.ones(72).double(),
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.get(name, state[name]), rtol=1e-9, atol=1e-9)
    assert {"self_attn.q_proj.bias", "mlp.gate_proj.bias"} == found.keys() - expected.keys() - {
        "self_attn.k_proj.bias",
        "mlp.up_proj.bias",
    }


def test_fusing_a_norm_leaves_its_state_alone() -> None:
    state = {
        "n.weight": gaussian(8),
        "a.weight": gaussian(3, 8),
        "b.weight": gaussian(2, 8),
        "c.weight": gaussian(2, 8),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = fuse_norm(state, "n", ["a", "b"])
    x = gaussian(5, 8)
    for name in ("a", "b"):
        torch.testing.assert_close(x @ found[f"{name}.weight"].T, (x * state["n.weight"]) @ state[f"{name}.weight"].T)
    assert torch.equal(found["n.weight"], torch.ones(8))
    assert found["c.weight"] is state["c.weight"]
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_another_architecture_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OPTConfig(num_hidden_layers=1))
    frame = Frame(model, model.config, "model.decoder.layers", list(model.model.decoder.layers))
    with pytest.raises(ModelError, match=r"knows LlamaForCausalLM, .* and not OPTForCausalLM"):
        anatomy(frame)
