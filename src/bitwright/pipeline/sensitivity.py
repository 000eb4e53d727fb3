"""What the model's loss feels of each way to store each site, before anything is solved.

An error e of a linear's outputs moves the model's distribution by KL = (g . e)^2 / 2 nats to the second order, g the
gradient of -log p by the outputs with next tokens drawn from the model itself: the mean over such draws is the Fisher
information, the curvature of that divergence (Martens, New insights and perspectives on the natural gradient method,
JMLR 2020, section 9). So one pass forward and one back over a little calibration text, a block at a time, tells all
sites apart; errors of different tokens are taken as independent. Those of different rows are not: levels lie nearer to
zero than what they stand for, so that whole outputs shrink.

For each candidate some rows of each linear are solved as the run will solve them, but for refinement, on half of the
tokens, and their errors are those on the other half: what feedback gains on its own text would be taken for quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.calibration import HessianSum, Stream, channel_energy, row_blocks
from bitwright.models import LinearInfo, SiteInfo
from bitwright.models.passes import head, run_block
from bitwright.pipeline.job import in_site_order, view_of
from bitwright.pipeline.layers import LayerPlan
from bitwright.pipeline.needs import measured_sequences
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.source import Source
from bitwright.pipeline.tunable import plain
from bitwright.recipe import Recipe
from bitwright.runtime import to_site
from bitwright.solvers import SOLVERS, Factor, factorize
from bitwright.transforms import channel_order
from bitwright.workers import Workers


@dataclass(frozen=True)
class Felt:
    """A site by the full names of its linears: for each candidate its bytes, and the loss in nats a token."""

    linears: list[str]
    bytes: list[int]
    losses: list[float]


@dataclass
class _Seen:
    """One sequence at a block: inputs of sites [tokens, columns], gradients by outputs of linears [tokens, some rows],
    and the gradient by the block's input."""

    inputs: dict[str, Tensor]
    pulls: dict[str, Tensor]
    before: Tensor


class Sensitivity:
    """One measurement. `entry`: a stream before the first block; `plans`: the model under each candidate."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        plans: Sequence[Plan],
        entry: Stream,
        calls: Sequence[dict[str, Any]],
        workers: Workers,
        directory: Path,
        advance: Callable[[float], None],
    ) -> None:
        self.source, self.skeleton, self.workers = source, source.skeleton, workers
        self.recipe, self.calls, self.directory, self.advance = recipe, calls, directory, advance
        assert recipe.allocate is not None
        self.asked = recipe.allocate
        self.entry, self.depth = entry, len(self.skeleton.blocks)
        self.count = measured_sequences(recipe, entry.shape[1])
        self.layers: list[dict[str, LayerPlan]] = [{layer.name: layer for layer in plan.layers} for plan in plans]

    def measure(self) -> list[Felt]:
        """Of every site, from the first block to the last."""
        stream = self._forward()
        pulls = self._heads(stream)
        found: list[list[Felt]] = []
        for index in reversed(range(self.depth)):
            felt, pulls = self._block(index, stream, pulls)
            found.insert(0, felt)
        stream.path.unlink()
        return [felt for block in found for felt in block]

    def _forward(self) -> Stream:
        """Hidden states before block k at k * count, those after the last block behind them."""
        shape = ((self.depth + 1) * self.count, *self.entry.shape[1:])
        stream = Stream.create(self.directory / "allocate-inputs.f32", shape)
        for place in range(self.count):
            stream.write(place, self.entry.read(place))
        for index in range(self.depth):
            block = self.source.block(index)

            def unit(place: int, block: nn.Module = block, index: int = index) -> None:
                hidden = stream.read(index * self.count + place)
                stream.write((index + 1) * self.count + place, run_block(block, hidden, self.calls[index]))

            self.workers.map(unit, range(self.count))
            self.advance(0.2 / self.depth)
        return stream

    def _heads(self, stream: Stream) -> list[Tensor]:
        """Gradients of -log p of tokens drawn from the model by the hidden states behind the last block."""

        def unit(place: int) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                hidden = stream.read(self.depth * self.count + place).requires_grad_()
                log_p = logits(hidden).float()[0].log_softmax(dim=-1)
                seed = torch.Generator().manual_seed(place)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=seed)
                return torch.autograd.grad(-log_p.gather(1, drawn).sum(), hidden)[0]

        with torch.inference_mode(False):
            values = self.source.outer("after")
        with head(self.skeleton, values) as logits:
            return self.workers.map(unit, range(self.count))

    def _block(self, index: int, stream: Stream, pulls: list[Tensor]) -> tuple[list[Felt], list[Tensor]]:
        """What is felt at the sites of a block, and the gradients by its input."""
        sites, prefix = self.skeleton.sites(index), self.skeleton.block_name(index)
        with torch.inference_mode(False):
            block, call = self.source.block(index), plain(self.calls[index])
        rows = {linear.name: self._rows(linear) for site in sites for linear in site.linears}

        def unit(place: int) -> _Seen:
            with torch.inference_mode(False), torch.enable_grad():
                hidden = stream.read(index * self.count + place).requires_grad_()
                return _differentiate(block, call, sites, rows, hidden, pulls[place])

        seen = self.workers.map(unit, range(self.count))
        self.advance(0.2 / self.depth)
        felt = []
        for site in sites:
            inputs = torch.cat([sequence.inputs.pop(site.name) for sequence in seen])
            felt.append(self._site(f"{prefix}.", block, site, inputs, rows, seen))
            self.advance(0.6 / self.depth / len(sites))
        return felt, [sequence.before for sequence in seen]

    def _rows(self, linear: LinearInfo) -> Tensor:
        """The rows of a linear that stand for all of them."""
        seed = torch.Generator().manual_seed(linear.rows)
        return torch.randperm(linear.rows, generator=seed)[: self.asked.rows].sort().values

    def _site(
        self, prefix: str, block: nn.Module, site: SiteInfo, x: Tensor, rows: dict[str, Tensor], seen: list[_Seen]
    ) -> Felt:
        """x fp32 [tokens, columns], the site's inputs in all sequences."""
        energy, half = channel_energy(x), len(x) // 2
        pulls = {i.name: torch.cat([sequence.pulls[i.name] for sequence in seen])[half:] for i in site.linears}
        specs = [layers[f"{prefix}{site.leader.name}"].spec for layers in self.layers]
        losses = [0.0] * len(specs)
        # Candidates with the same channels set aside and the same groups see the same inputs.
        layouts: dict[tuple[int, int], list[int]] = {}
        for candidate, spec in enumerate(specs):
            layouts.setdefault((spec.outliers, spec.group), []).append(candidate)
        for (outliers, group), candidates in layouts.items():
            spec = specs[candidates[0]]
            order = channel_order(energy, outliers, self.recipe.weights.order) if spec.permutation else None
            wanted = to_site(x, order, spec.transform)
            inputs = quantize_site(wanted, outliers, group, self.recipe.activations)
            factor = self._factor(inputs[:half], outliers)

            def unit(
                task: tuple[int, LinearInfo],
                order: Tensor | None = order,
                wanted: Tensor = wanted[half:],
                inputs: Tensor = inputs[half:],
                factor: Factor = factor,
            ) -> float:
                candidate, linear = task
                layer, chosen = self.layers[candidate][f"{prefix}{linear.name}"], rows[linear.name]
                weights = in_site_order(block.get_parameter(f"{linear.name}.weight")[chosen], order, layer.spec)
                recipe = layer.recipe.model_copy(update={"refine": 0})
                stored = SOLVERS[recipe.method](weights, factor, layer.spec.outliers, recipe).dequantize_site_order()
                errors = (wanted @ weights.T - inputs @ stored.T).mul_(pulls[linear.name])
                return of_all_rows(errors, linear.rows) / 2

            tasks = [(candidate, linear) for candidate in candidates for linear in site.linears]
            for (candidate, _), loss in zip(tasks, self.workers.map(unit, tasks), strict=True):
                losses[candidate] += loss
        names = [f"{prefix}{linear.name}" for linear in site.linears]
        sizes = [sum(layers[name].bytes for name in names) for layers in self.layers]
        return Felt(names, sizes, losses)

    def _factor(self, x: Tensor, outliers: int) -> Factor:
        weights, total = self.recipe.weights, HessianSum(x.shape[1])
        self.workers.map(lambda row: total.add_rows(row, x), row_blocks(x.shape[1]))
        total.sequences = self.count
        over = x.shape[1] - outliers if weights.damping_over == "normal" else None
        return factorize(total.finish(), weights.damping, weights.importance, self.workers.threads, over=over)


def of_all_rows(products: Tensor, rows: int) -> float:
    """products fp32 [tokens, some rows], of each row g_r e_r -> the mean of (g . e)^2 over all rows, estimated.

    Squares stand for one row each and products of two rows for a pair of rows: unbiased for rows drawn at random. It is
    no less than what the squares alone come to.
    """
    tokens, some = products.shape
    squares = float(products.square().sum(dtype=torch.float64))
    pairs = float(products.sum(dim=1, dtype=torch.float64).square().sum()) - squares
    spread = rows * (rows - 1) / (some * (some - 1)) if some > 1 else 0.0
    return (squares * rows / some + max(pairs, 0.0) * spread) / tokens


def _differentiate(
    block: nn.Module,
    call: dict[str, Any],
    sites: Sequence[SiteInfo],
    rows: dict[str, Tensor],
    hidden: Tensor,
    pull: Tensor,
) -> _Seen:
    """hidden, pull [1, tokens, width]: the block's input, and the gradient by its output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    view = view_of(block)
    for site in sites:
        for linear in site.linears:

            def hook(
                _: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                name: str = linear.name,
                site: str = site.name,
            ) -> None:
                inputs[site] = args[0].detach().reshape(-1, args[0].shape[-1])
                outputs[name] = output

            view.get_submodule(linear.name).register_forward_hook(hook)
    after = run_block(view, hidden, call)
    before, *found = torch.autograd.grad(after, [hidden, *outputs.values()], pull)
    parts = zip(outputs, found, strict=True)
    pulls = {name: part.reshape(-1, part.shape[-1])[:, rows[name]] for name, part in parts}
    return _Seen(inputs, pulls, before)
