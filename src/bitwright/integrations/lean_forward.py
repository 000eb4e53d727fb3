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
from bitwright.runtime.linear import quantized_linears
from bitwright.runtime.snapshot import Snapshot


def use_lean_forward(model: Any) -> bool:
    """Put the lean path in front of the forward of a packed model; False where the model cannot take it."""
    if native() is None or Decoder.why_not(model) is not None:
        return False
    base, head = model.model, model.get_output_embeddings()
    base._bitwright_lean = _Lean(base)
    # Methods, not closures: a copy of the model gets a forward of its own.
    base.forward = MethodType(_forward, base)
    if type(head) is nn.Linear and head.bias is None:
        head.forward = MethodType(_head_forward, head)
    return True


def leave_lean_forward(model: Any) -> None:
    """Undo `use_lean_forward`, on a model that has it or not."""
    for module in (getattr(model, "model", None), model.get_output_embeddings()):
        if module is not None and getattr(vars(module).get("forward"), "__func__", None) in _OURS:
            del module.forward
    vars(getattr(model, "model", model)).pop("_bitwright_lean", None)


class _Lean:
    """The decoder of a model's blocks, for as long as they are what it was made of.

    Other tensors in the same modules, all of them packed, get a new decoder; other modules get none.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.modules = Snapshot(base, "layers", "norm")
        self.decoder: Decoder | None = self._made()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: their tensors are others."""
        return vars(self) | {"decoder": None}

    def _made(self) -> Decoder | None:
        if any(linear.packed is None for _, linear in quantized_linears(self.base.layers)):
            return None
        with torch.inference_mode(False), torch.no_grad():  # its own tensors are written to in any mode
            return Decoder(self.base)

    def current(self) -> Decoder | None:
        """The decoder where it computes what the model's blocks would; one of other tensors is let go."""
        if not self.modules.same():
            self.decoder = None
            return None
        if self.decoder is None or not self.decoder.valid():
            self.decoder = None
            self.decoder = self._made()
        return None if self.modules.touched() else self.decoder


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
    lean: _Lean | None = vars(self).get("_bitwright_lean")
    decoder = None if lean is None or torch.compiler.is_compiling() else lean.current()
    asked = any(
        kwargs.get(key, getattr(self.config, key, False)) for key in ("output_attentions", "output_hidden_states")
    )
    asked = asked or kwargs.get("return_dict", getattr(self.config, "return_dict", True)) is False
    served = (
        inputs_embeds is None
        and not asked
        and not self.training
        and serves(input_ids, attention_mask, position_ids, past_key_values)
    )
    if served and decoder is not None:
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
    """A bfloat16 output head on the native kernel for the few tokens of a decode step.

    Sums are fp32, logits bfloat16 as those of nn.Linear, whatever the number of tokens.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # first: what is traced must not ask for sizes
        return nn.Linear.forward(self, x)
    weight, few = self.weight, 0 < x.numel() <= 8 * x.shape[-1]
    if few and weight.dtype == x.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return ops.dense_linear_eager(x.float(), weight).to(x.dtype)
    return nn.Linear.forward(self, x)


_OURS = (_forward, _head_forward)


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
    return positions.shape == (1, tokens) and positions[0].tolist() == [*range(start, start + tokens)]
