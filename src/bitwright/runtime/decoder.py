"""A lean forward pass for packed models of the Llama family: few calls a block, and none that grows with the context
beyond what attention reads.

A block through transformers' own code is some sixty torch calls, and its cache hands attention the dequantized whole
of what was said so far. Here a block is eight calls: one product for q, k and v; a step of attention that rotates them,
appends to the quantized cache and reads its records where they lie; the output product; residual and norm; one product
for gate and up; their activation; the last product; residual and norm. The residual stream is fp32 whatever the model's
dtype. No call goes through torch's dispatcher to the ops: this path is never traced, and at one token that would be a
third of what a call costs. What stands between the products is cold in the caches when its turn comes, after megabytes
of weights: every Python call costs several times what it does alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import eq
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.runtime.attention_ops import attention_step_eager, kv_append_eager, kv_attention_eager
from bitwright.runtime.block_ops import add_rms_norm_eager, gated_eager, rms_norm_eager, rope_eager
from bitwright.runtime.kv_cache import QuantizedKVCache, QuantizedKVLayer
from bitwright.runtime.linear import Kernel, QuantizedLinear, quantized_linears
from bitwright.runtime.native_blocks import NativeBlocks
from bitwright.runtime.snapshot import Holds
from bitwright.runtime.tiles import TILE_ROWS

# Models whose blocks are RMSNorm, rotary attention without clipping, RMSNorm, SwiGLU, in this order.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass
class Site:
    """The linears of a site, multiplied in one call."""

    packed: Tensor
    kernel: Kernel
    rows: int
    columns: int
    parts: list[slice]  # of each linear in the outputs

    @classmethod
    def of(cls, *linears: QuantizedLinear) -> Site:
        """Of linears that stand one behind the other in one tensor, as `pack_sites` leaves those that share an order;
        others are put there, so that nothing is held twice."""
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
        packed = _joined(tensors)
        if packed.data_ptr() != tensors[0].data_ptr():
            for linear, tiles in zip(linears, packed.split([tensor.numel() for tensor in tensors]), strict=True):
                linear.packed = tiles
        return cls(packed, replace(kernel, op=kernel.eager, bias=whole), row, linears[0].in_features, parts)

    def __call__(self, x: Tensor) -> Tensor:
        """All outputs fp32 [tokens, rows], the linears' at `parts`."""
        return self.kernel(x, self.packed, self.rows)


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


class Norm:
    """A norm and its weight in fp32: the model's own memory, or where that has another dtype a copy (`Copies`)."""

    def __init__(self, module: Any) -> None:
        self.module, self.eps = module, module.variance_epsilon
        self.source: Tensor = module.weight
        self.weight = module.weight.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm_eager(x, self.weight, self.eps)

    def after(self, x: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
        """x + add, and its norm."""
        return add_rms_norm_eager(x, add, self.weight, self.eps)


class Copies:
    """The weights in fp32 of norms that have another dtype, side by side: they are made anew before every use, since
    nothing tells of a write through `.data`."""

    def __init__(self, norms: list[Norm]) -> None:
        self.sources = [norm.source for norm in norms if norm.source.dtype != torch.float32]
        self.values = torch.empty(sum(source.numel() for source in self.sources))
        views = self.values.split([source.numel() for source in self.sources]) if self.sources else ()
        for norm, view in zip((n for n in norms if n.source.dtype != torch.float32), views, strict=True):
            norm.weight = view

    def renew(self) -> None:
        if self.sources:
            torch.cat(self.sources, out=self.values)


def _window(attention: Any, config: Any) -> int:
    """Tokens that a block's attention sees, 0 for all, from where its class has them: Mistral's from the config, Qwen's
    by block; Llama's has no window, whatever its config carries."""
    mistral = type(attention).__name__ == "MistralAttention"
    return int(getattr(config if mistral else attention, "sliding_window", None) or 0)


class Block:
    def __init__(self, layer: Any, config: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.head_norms = (Norm(attention.q_norm), Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self.attn_in = Site.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attn_out = Site.of(attention.o_proj)
        self.mlp_in = Site.of(mlp.gate_proj, mlp.up_proj)
        self.mlp_out = Site.of(mlp.down_proj)
        self.head_dim, self.scale = attention.head_dim, float(attention.scaling)
        query, key, _ = self.attn_in.parts
        self.query_heads, self.key_heads = ((part.stop - part.start) // self.head_dim for part in (query, key))
        self.window = _window(attention, config)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.input_norm, self.mlp_norm, *(self.head_norms or ()))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: QuantizedKVLayer) -> Tensor:
        """x fp32 [tokens, hidden] behind its norm -> the output projection's; keys and values go to `cache`."""
        made, tokens = self.attn_in(x), x.shape[0]
        keys, values, position = cache.reserve(self.key_heads, tokens, self.head_dim)
        if self.head_norms is None and not cache.hadamard:
            _, key, value = self.attn_in.parts
            places = (self.query_heads, key.start, value.start)
            mixed = attention_step_eager(
                made, cos, sin, keys, values, position, *places, self.scale, self.window, cache.bits, cache.clip
            )
            return self.attn_out(mixed.view(tokens, -1))
        q, k, v = (made[:, part].unflatten(1, (-1, self.head_dim)) for part in self.attn_in.parts)
        if self.head_norms is not None:
            q, k = (norm(states) for norm, states in zip(self.head_norms, (q, k), strict=True))
        q, k = cache.turned(rope_eager(q, cos, sin)), cache.turned(rope_eager(k, cos, sin))
        kv_append_eager(keys, k.transpose(0, 1), position, cache.bits, cache.clip)
        kv_append_eager(values, v.transpose(0, 1), position, cache.bits, cache.clip)
        length = position + tokens
        mixed = kv_attention_eager(q.transpose(0, 1), keys, values, length, self.scale, self.window, cache.bits)
        return self.attn_out(mixed.flatten(1))

    def mlp(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, hidden] behind its norm -> the last product's."""
        gate, up = self.mlp_in.parts
        return self.mlp_out(gated_eager(self.mlp_in(x), up.start, gate.stop))


class Decoder:
    """The blocks of one packed model (a LlamaModel or alike, without its head); shares its tensors."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.blocks = [Block(layer, base.config, index) for index, layer in enumerate(base.layers)]
        self.norm = Norm(base.norm)
        norms = [*(norm for block in self.blocks for norm in block.norms), self.norm]
        self.copies = Copies(norms)
        self.served = NativeBlocks.serves(self.blocks)
        self._whole: NativeBlocks | None = None
        # The tensors that sites and norms were made of: a module that has others now has other weights.
        linears = [linear for _, linear in quantized_linears(base.layers)]
        made_of = [
            (linear, "_buffers", name, linear._buffers[name]) for linear in linears for name in ("packed", "bias")
        ]
        self._made_of = Holds([*made_of, *((norm.module, "_parameters", "weight", norm.source) for norm in norms)])
        # `.data` and casts put other memory under the same parameter.
        self._shared = [norm.source for norm in norms if norm.source.dtype == torch.float32]
        self._addresses = [source.data_ptr() for source in self._shared]

    def valid(self) -> bool:
        """Whether the model's blocks and last norm still hold the tensors that this was made of."""
        return self._made_of() and all(map(eq, map(Tensor.data_ptr, self._shared), self._addresses))

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
        self.copies.renew()
        x = self.base.embed_tokens(ids).float()
        positions = torch.arange(start, start + ids.shape[0]).unsqueeze(0)
        cos, sin = (part[0].float() for part in self.base.rotary_emb(x.unsqueeze(0), position_ids=positions))
        if self.served and not any(getattr(layer, "hadamard", False) for layer in cache.layers):
            if self._whole is None:
                self._whole = NativeBlocks(self.blocks, self.norm)
            return self._whole(x, cos, sin, cache)
        return self.block_by_block(x, cos, sin, cache)

    def block_by_block(self, x: Tensor, cos: Tensor, sin: Tensor, cache: QuantizedKVCache) -> Tensor:
        """The blocks and the last norm, call by call: for all that the native code does not know as a whole."""
        normed = self.blocks[0].input_norm(x)
        for block, following in zip(self.blocks, [*(b.input_norm for b in self.blocks[1:]), self.norm], strict=True):
            layer = cache.layers[block.index]
            assert isinstance(layer, QuantizedKVLayer)
            x, normed = block.mlp_norm.after(x, block.attention(normed, cos, sin, layer))
            x, normed = following.after(x, block.mlp(normed))
        return normed
