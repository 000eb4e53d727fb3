"""A block that can be differentiated: its linears and its cache quantize as in use, and gradients go straight through.

Rounding has no gradient; the identity stands for it (straight-through). Values are exactly those of the packed block.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.recipe import ActivationRecipe, KVRecipe
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, to_site
from bitwright.runtime.kv_cache import QuantizedKVLayer
from bitwright.transforms import SiteHadamard


class _SiteInput(torch.autograd.Function):
    """What a site's linears multiply: the input in site order, transformed and quantized."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor | None,
        hadamard: SiteHadamard | None,
        outliers: int,
        group: int,
        recipe: ActivationRecipe | None,
    ) -> Tensor:
        ctx.order, ctx.hadamard = order, hadamard
        return quantize_site(to_site(x, order, hadamard), outliers, group, recipe)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        gradient = to_site(gradient, None, ctx.hadamard)  # symmetric and orthogonal
        if ctx.order is not None:
            restored = torch.empty_like(gradient)
            restored[:, ctx.order] = gradient
            gradient = restored
        return gradient, None, None, None, None, None


class _Straight(torch.autograd.Function):
    """`rounded` as the value, the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class Site:
    """The quantized input of a site, made once for all of its linears; each thread has its own."""

    def __init__(self, leader: QuantizedLinear) -> None:
        spec = leader.spec
        order = leader.order
        self.rest = (None if order is None else order.clone(), spec.transform, spec.outliers, spec.group)
        self.activations = leader.activations
        self.last = threading.local()

    def __call__(self, x: Tensor) -> Tensor:
        if getattr(self.last, "x", None) is not x:
            flat = x.reshape(-1, x.shape[-1]).float()
            self.last.x, self.last.quantized = x, _SiteInput.apply(flat, *self.rest, self.activations)
        quantized: Tensor = self.last.quantized
        return quantized

    def forget(self) -> None:
        self.last.x = self.last.quantized = None


class StraightLinear(nn.Module):
    """Stands for a QuantizedLinear, with dense weights fp32 [rows, columns] in site order as its parameter."""

    def __init__(self, linear: QuantizedLinear, site: Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.out_features, linear.in_features))
        self.bias = nn.Parameter(torch.empty(linear.out_features)) if linear.spec.bias else None
        self._site = site

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self._site(x), self.weight, self.bias)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)


class _StraightKVLayer(QuantizedKVLayer):
    """A layer of the cache through which gradients pass; for one call on an empty cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.detach(), value_states.detach())
        return _Straight.apply(key_states, keys), _Straight.apply(value_states, values)


class StraightKVCache(QuantizedKVCache):
    """A QuantizedKVCache for one call of one block."""

    def __init__(self, layers: int, kv: KVRecipe) -> None:
        super().__init__(layers, kv)
        self.layers = [_StraightKVLayer(kv.bits, kv.hadamard, kv.clip) for _ in range(layers)]
