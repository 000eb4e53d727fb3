"""What the steps of one block share: its plan, its linears, and the way between the model's channels and a site's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.artifact.layout import LayerSpec
from bitwright.models import LinearInfo, SiteInfo
from bitwright.pipeline.layers import LayerPlan
from bitwright.recipe import Recipe
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, to_site
from bitwright.workers import Workers

# Rough shares of a block's time, for the progress bar.
SHARES = {"energy": 15.0, "hessian": 30.0, "solve": 35.0, "propagate": 20.0}

Advance = Callable[[str, float], None]


@dataclass
class BlockJob:
    """Everything that the four steps share for one block."""

    index: int
    depth: int
    name: str
    block: nn.Module
    sites: tuple[SiteInfo, ...]
    writers: dict[str, str]
    layers: dict[str, LayerPlan]
    recipe: Recipe
    calls: dict[str, Any]
    sequences: int
    workers: Workers
    advance: Advance
    orders: dict[str, Tensor] = field(default_factory=dict)

    def outliers(self, site: SiteInfo) -> int:
        return self.layer(site.leader).spec.outliers

    def into(self, site: SiteInfo, x: Tensor) -> Tensor:
        """fp32 inputs [tokens, columns] as the model has them -> site order, transformed."""
        return to_site(x, self.orders[site.name], self.layer(site.leader).spec.transform)

    def back(self, site: SiteInfo, x: Tensor) -> Tensor:
        """Undoes `into`."""
        transform = self.layer(site.leader).spec.transform
        restored = torch.empty_like(x)
        restored[:, self.orders[site.name]] = x if transform is None else transform.apply(x)
        return restored

    def weights(self, site: SiteInfo, linear: LinearInfo, row: int, count: int) -> Tensor:
        """`count` rows of a linear's weights from `row` on, for inputs that went through `into`."""
        weights = self.linear(linear).weight[row : row + count]
        return in_site_order(weights, self.orders[site.name], self.layer(linear).spec)

    def linear(self, linear: LinearInfo) -> nn.Linear:
        module = self.block.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        return module

    def layer(self, linear: LinearInfo) -> LayerPlan:
        return self.layers[f"{self.name}.{linear.name}"]

    def arguments(self, cached: bool) -> dict[str, Any]:
        """Keyword arguments of one call of the block; with a fresh quantized cache where the recipe asks for one."""
        arguments = dict(self.calls)
        if cached and self.recipe.kv is not None:
            arguments["past_key_values"] = QuantizedKVCache(self.depth, self.recipe.kv)
            arguments["use_cache"] = True
        return arguments


def in_site_order(weights: Tensor, order: Tensor | None, spec: LayerSpec) -> Tensor:
    """Rows of a linear's weights, fp32 [rows, columns], for inputs in site order (None: as they are), transformed."""
    weights = weights if order is None else weights[:, order]
    return weights if spec.transform is None else spec.transform.apply(weights)


def view_of(block: nn.Module) -> nn.Module:
    """A second tree of the same parameters, for hooks of one thread's own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*block.parameters(), *block.buffers()]}
    # Configs are shared too: copying them for every sequence is slow, and nothing changes them.
    for module in block.modules():
        config = module.__dict__.get("config")
        if config is not None:
            memo[id(config)] = config
        if isinstance(module, QuantizedLinear) and module._dense is not None:
            memo[id(module._dense)] = module._dense
    return copy.deepcopy(block, memo)
