"""A lean forward pass for packed models of the Llama family: few calls a block, and none that grows with the context
beyond what attention reads.

A block through transformers' own code is some sixty torch calls, and its cache hands attention the dequantized whole
of what was said so far. Here a block is ten calls: norm, one product for q, k and v, rotation, two appends to the
quantized cache, attention that reads the records where they lie, the output product, norm, one product for gate and up,
their activation, the last product. The residual stream is fp32 whatever the model's dtype. No call goes through torch's
dispatcher to the ops: this path is never traced, and at one token that would be a third of what a call costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.runtime.attention_ops import kv_append_eager, kv_attention_eager
from bitwright.runtime.block_ops import rms_norm_eager, rope_eager
from bitwright.runtime.kv_cache import QuantizedKVCache, QuantizedKVLayer
from bitwright.runtime.linear import Kernel, QuantizedLinear, quantized_linears
from bitwright.runtime.tiles import TILE_ROWS

# Models whose blocks are RMSNorm, rotary attention without clipping, RMSNorm, SwiGLU, in this order.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass
class _Site:
    """The linears of a site, multiplied in one call."""

    packed: Tensor
    kernel: Kernel
    rows: int
    parts: list[slice]  # of each linear in the outputs

    @classmethod
    def of(cls, *linears: QuantizedLinear) -> _Site:
        """Of linears that stand one behind the other in one tensor, as `pack_sites` leaves them."""
        tensors, parts, biases, row = [], [], [], 0
        for linear in linears:
            assert linear.packed is not None
            tensors.append(linear.packed)
            parts.append(slice(row, row + linear.out_features))
            bias = linear.kernel().bias
            bias = torch.zeros(linear.out_features) if bias is None else bias
            # Each linear begins with a tile of its own: rows in between are computed and not looked at.
            padding = -linear.out_features % TILE_ROWS if len(linears) > 1 else 0
            biases.append(nn.functional.pad(bias, (0, padding)))
            row += linear.out_features + padding
        kernel = linears[0].kernel()
        whole = None if all(linear.bias is None for linear in linears) else torch.cat(biases)
        return cls(_joined(tensors), replace(kernel, op=kernel.eager, bias=whole), row, parts)

    def __call__(self, x: Tensor) -> list[Tensor]:
        y = self.kernel(x, self.packed, self.rows)
        return [y[:, part] for part in self.parts]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Neighbours in memory as one tensor without a copy; a copy where they are none."""
    first = tensors[0]
    at = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != at or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(tensors)
        at += tensor.numel()
    total = sum(tensor.numel() for tensor in tensors)
    return torch.as_strided(first, (total,), (1,), first.storage_offset())


class _Norm:
    def __init__(self, module: Any) -> None:
        self.module, self.eps = module, module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm_eager(x, self.module.weight.float(), self.eps)


class _Block:
    def __init__(self, layer: Any, config: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.input_norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.attn_in = _Site.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attn_out = _Site.of(attention.o_proj)
        self.mlp_in = _Site.of(mlp.gate_proj, mlp.up_proj)
        self.mlp_out = _Site.of(mlp.down_proj)
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        types = getattr(config, "layer_types", None)
        slides = types[index] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None
        self.window = int(config.sliding_window) if slides else 0

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: QuantizedKVLayer) -> Tensor:
        """x fp32 [tokens, hidden] -> the same; appends the tokens' keys and values to `cache`."""
        tokens = x.shape[0]
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in self.attn_in(self.input_norm(x)))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rope_eager(q, cos, sin), rope_eager(k, cos, sin)
        if cache.hadamard:
            q, k = cache.turned(q), cache.turned(k)
        keys, values, position = cache.reserve(k.shape[1], tokens, self.head_dim)
        kv_append_eager(keys, k.transpose(0, 1), position, cache.bits, cache.clip)
        kv_append_eager(values, v.transpose(0, 1), position, cache.bits, cache.clip)
        length = position + tokens
        mixed = kv_attention_eager(q.transpose(0, 1), keys, values, length, self.scale, self.window, cache.bits)
        (attended,) = self.attn_out(mixed.flatten(1))
        x = x + attended
        gate, up = self.mlp_in(self.mlp_norm(x))
        (made,) = self.mlp_out(nn.functional.silu(gate) * up)
        return x + made


class Decoder:
    """The blocks of one packed model; shares its tensors."""

    def __init__(self, model: Any) -> None:
        base = model.model
        self.embedding, self.rotary = base.embed_tokens, base.rotary_emb
        self.blocks = [_Block(layer, model.config, index) for index, layer in enumerate(base.layers)]
        self.norm = _Norm(base.norm)
        # The tensors that the sites above were made of: a linear that has others now has other weights.
        self.made_of = [(linear, linear.packed, linear.bias) for _, linear in quantized_linears(base.layers)]

    def valid(self) -> bool:
        """Whether the model still has the weights that this was made of."""
        return all(linear.packed is packed and linear.bias is bias for linear, packed, bias in self.made_of)

    @staticmethod
    def why_not(model: Any) -> str | None:
        """Why a model cannot take this path, None where it can."""
        if type(model).__name__ not in FAMILY:
            return f"{type(model).__name__} is none of {', '.join(FAMILY)}"
        if getattr(model.config, "hidden_act", "silu") != "silu":
            return f"its activation is {model.config.hidden_act}"
        for name, module in model.model.layers.named_modules():
            if isinstance(module, nn.Linear):
                return f"{name} is not quantized"
            if isinstance(module, QuantizedLinear) and module.packed is None:
                return f"{name} is not on the native kernels"
        return None

    def __call__(self, ids: Tensor, cache: QuantizedKVCache) -> Tensor:
        """Token ids int64 [tokens], behind what is cached -> fp32 [tokens, hidden] after the last norm."""
        start = cache.get_seq_length()
        x = self.embedding(ids).float()
        positions = torch.arange(start, start + ids.shape[0]).unsqueeze(0)
        cos, sin = (part[0].float() for part in self.rotary(x.unsqueeze(0), position_ids=positions))
        for block in self.blocks:
            layer = cache.layers[block.index]
            assert isinstance(layer, QuantizedKVLayer)
            x = block(x, cos, sin, layer)
        return self.norm(x)
