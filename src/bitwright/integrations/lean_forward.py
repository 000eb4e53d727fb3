"""transformers' forward of a packed model, replaced where the lean path gives the same: one sequence, our cache.

`generate`, evaluation and anything else that calls the model then run at the speed of the kernels. Whatever the lean
path does not serve (batches, padding, gradients, hidden states, another cache) goes through transformers' own code.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from bitwright.native import native
from bitwright.runtime import ops
from bitwright.runtime.decoder import Decoder
from bitwright.runtime.kv_cache import QuantizedKVCache


def use_lean_forward(model: Any) -> bool:
    """Put the lean path in front of the forward of a packed model; False where the model cannot take it."""
    if native() is None or Decoder.why_not(model) is not None:
        return False
    base, head = model.model, model.get_output_embeddings()
    base._bitwright_decoder = Decoder(model)
    # Methods, not closures: a copy of the model gets a forward of its own.
    base.forward = MethodType(_forward, base)
    if type(head) is nn.Linear and head.bias is None:
        head.forward = MethodType(_head_forward, head)
    return True


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    decoder: Decoder = self._bitwright_decoder
    plain = inputs_embeds is None and not any(kwargs.get(key) for key in ("output_attentions", "output_hidden_states"))
    served = plain and serves(input_ids, attention_mask, position_ids, past_key_values)
    if served and not self.training and decoder.valid():
        assert input_ids is not None
        hidden: Any = decoder(input_ids[0], past_key_values).to(self.embed_tokens.weight.dtype).unsqueeze(0)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
    return type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def _head_forward(self: nn.Linear, x: Tensor) -> Tensor:
    """A bfloat16 output head on the native kernel for the few tokens of a decode step."""
    few = 0 < x.numel() <= 8 * x.shape[-1]
    weight = self.weight
    if few and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not torch.is_grad_enabled():
        return ops.dense_linear_eager(x.float(), weight)
    return nn.Linear.forward(self, x)


def serves(ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any) -> bool:
    """Whether a call is one unpadded sequence, behind what our cache holds, without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if ids is None or ids.shape[0] != 1 or not ids.shape[1] or ids.device.type != "cpu":
        return False
    if not isinstance(cache, QuantizedKVCache):
        return False
    start, tokens = cache.get_seq_length(), ids.shape[1]
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != start + tokens or not bool(mask.all())):
        return False
    if positions is None:
        return True
    ends = positions[0, [0, -1]].tolist() if positions.shape == (1, tokens) else None
    return ends == [start, start + tokens - 1]
