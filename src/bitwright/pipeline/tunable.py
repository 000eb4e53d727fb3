"""One solved block under tuning: built from its shard, differentiable, and turned back into what a shard holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.models import SiteInfo, Skeleton
from bitwright.models.passes import run_block
from bitwright.pipeline.job import in_site_order
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.straight import Site, StraightKVCache, StraightLinear
from bitwright.pipeline.tuned import Tuned, TunedMatrix, TunedVector, Values
from bitwright.runtime import QuantizedLinear


class TunableBlock:
    """Block `index` as its shard `tensors` has it; `values` as `self.values` gave them, else those of the shard.

    original  the block of the original model: where given, codes are tuned, too
    To be made and used outside of torch's inference mode.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        index: int,
        tensors: Mapping[str, Tensor],
        values: Values | None = None,
        original: nn.Module | None = None,
    ) -> None:
        self.recipe, self.prefix, self.tensors = plan.recipe, skeleton.block_name(index), tensors
        self.index, self.depth = index, len(skeleton.blocks)
        self.block = copy.deepcopy(skeleton.blocks[index]).eval()
        self.modules: dict[str, QuantizedLinear] = {}
        self.tuned: dict[str, Tuned] = {}
        self.sites: list[Site] = []
        specs = {layer.name: layer.spec for layer in plan.layers_of(index)}
        for info in skeleton.sites(index):
            for linear in info.linears:
                name = f"{self.prefix}.{linear.name}"
                module = QuantizedLinear(name, specs[name], plan.recipe.activations, torch.float32)
                for part in [part for part, _ in module.named_buffers() if f"{name}.{part}" in tensors]:
                    tensor = tensors[f"{name}.{part}"]
                    setattr(module, part, tensor.float() if part == "bias" else tensor)
                self.modules[linear.name] = module
                if linear is not info.leader and specs[name].permutation:
                    module.share_permutation(self.modules[info.leader.name])
            self._replace(info, original)
        self._fill()
        for key, value in ({} if values is None else values).items():
            name, _, part = key.rpartition("/")
            self.tuned[name].values[part] = value
        self.parameters = {name: self.block.get_parameter(name) for name in self.tuned}
        self.settle()

    def _replace(self, info: SiteInfo, original: nn.Module | None) -> None:
        site = Site(self.modules[info.leader.name])
        self.sites.append(site)
        for linear in info.linears:
            module = self.modules[linear.name]
            target = None
            if original is not None:
                weights = original.get_parameter(f"{linear.name}.weight").detach()
                target = in_site_order(weights, module.order, module.spec)
            self.tuned[f"{linear.name}.weight"] = TunedMatrix(module.matrix(), target)
            if linear.bias:
                dtype = self.tensors[f"{self.prefix}.{linear.name}.bias"].dtype
                self.tuned[f"{linear.name}.bias"] = TunedVector(module.bias, dtype)
            self.block.set_submodule(linear.name, StraightLinear(module, site))

    def _fill(self) -> None:
        """Give what stays beside the linears its numbers; what has one dimension is tuned."""
        for name in [name for name in self.block.state_dict() if name not in self.tuned]:
            tensor = self.tensors[f"{self.prefix}.{name}"]
            path, _, leaf = name.rpartition(".")
            module = self.block.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor.float() if tensor.is_floating_point() else tensor
                continue
            vector = tensor.dim() == 1
            module._parameters[leaf] = nn.Parameter(tensor.float().clone(), requires_grad=vector)
            if vector:
                self.tuned[name] = TunedVector(tensor.float(), tensor.dtype)

    @property
    def values(self) -> Values:
        """All real numbers under tuning, by `tensor/part`."""
        return {f"{name}/{part}": value for name, tuned in self.tuned.items() for part, value in tuned.values.items()}

    def rates(self) -> dict[str, float]:
        """Learning rates by the names of `values`."""
        assert self.recipe.tune is not None
        return {
            f"{name}/{part}": rate
            for name, tuned in self.tuned.items()
            for part, rate in tuned.rates(self.recipe.tune).items()
        }

    def settle(self) -> None:
        """Put what the values stand for, as it would be stored, into the block."""
        with torch.no_grad():
            for name, tuned in self.tuned.items():
                tuned.settle()
                self.parameters[name].copy_(tuned.stored())

    def __call__(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Hidden states after the block, fp32 [1, length, width]; may be called by several threads."""
        arguments = dict(call)
        if self.recipe.kv is not None:
            arguments["past_key_values"] = StraightKVCache(self.depth, self.recipe.kv)
            arguments["use_cache"] = True
        try:
            return run_block(self.block, hidden, arguments)
        finally:
            for site in self.sites:
                site.forget()

    def gradients(self, hidden: Tensor, call: Mapping[str, Any], gradient: Tensor) -> tuple[Tensor, Values]:
        """The gradient by the block's output -> those by its input and by `values`."""
        with torch.enable_grad():
            entry = hidden.detach().requires_grad_()
            output = self(entry, call)
            wanted = [entry, *self.parameters.values()]
            before, *found = torch.autograd.grad(output, wanted, gradient)
        pulled = {}
        for (name, tuned), part in zip(self.tuned.items(), found, strict=True):
            pulled.update({f"{name}/{key}": value for key, value in tuned.pull(part).items()})
        return before, pulled

    def shard(self) -> dict[str, Tensor]:
        """What a shard holds: `tensors` with what was tuned in its place."""
        found = dict(self.tensors)
        for name, tuned in self.tuned.items():
            if isinstance(tuned, TunedMatrix):
                path = f"{self.prefix}.{name.removesuffix('.weight')}"
                found.update({f"{path}.{part}": tensor for part, tensor in tuned.snapped().tensors().items()})
            else:
                full = f"{self.prefix}.{name}"
                found[full] = tuned.stored().to(found[full].dtype)
        return found

    def packed(self) -> nn.Module:
        """The block with the very modules that a loaded artifact runs, as `shard` has them. Ends the tuning."""
        for name, tuned in self.tuned.items():
            path, _, leaf = name.rpartition(".")
            if isinstance(tuned, TunedMatrix):
                for part, tensor in tuned.snapped().tensors().items():
                    setattr(self.modules[path], part, tensor)
            elif path in self.modules:
                self.modules[path].bias = tuned.stored()
            else:
                self.block.get_submodule(path)._parameters[leaf] = nn.Parameter(tuned.stored(), requires_grad=False)
        for name, module in self.modules.items():
            self.block.set_submodule(name, module)
        return self.block
