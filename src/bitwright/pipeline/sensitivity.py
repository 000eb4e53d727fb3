"""What the model's loss feels of each way to store each site, before anything is solved.

An error e of a linear's outputs moves the model's distribution by KL = (g . e)^2 / 2 nats to the second order, g the
gradient of -log p by the outputs with next tokens drawn from the model itself: the mean over such draws is the Fisher
information, the curvature of that divergence (Martens, New insights and perspectives on the natural gradient method,
JMLR 2020, section 9). So one pass forward and one back over a little calibration text, a block at a time, tells all
sites apart; errors of different tokens are taken as independent.

Those of different rows are not. They share the rounding of their input, and levels lie nearer to zero than what they
stand for, so that whole outputs shrink. Both parts are known for all rows at once: g . W (x - q) of inputs x rounded
to q is the gradient by the input times the input's error, and -s g . W q follows once some rows have told the share s
by which outputs shrink. What is left of the errors of those rows stands for the others, row by row.

For each candidate some rows of each linear are solved for the inputs of the full-precision model, quantized as in use,
without refinement and without the targets that make up for earlier errors, on half of the tokens. Their errors are
those on the other half: what feedback gains on its own text would be taken for quality.
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
from bitwright.models.passes import head, plain, run_block
from bitwright.pipeline.job import in_site_order, view_of
from bitwright.pipeline.layers import LayerPlan
from bitwright.pipeline.needs import measured_sequences
from bitwright.pipeline.source import Source
from bitwright.recipe import Recipe, WeightRecipe
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
    """One sequence at a block.

    inputs  of sites [tokens, columns]
    pulls   gradients by outputs of linears [judged tokens, some rows]
    back    the same by their inputs, each linear by itself [judged tokens, columns]
    before  the gradient by the block's input
    """

    inputs: dict[str, Tensor]
    pulls: dict[str, Tensor]
    back: dict[str, Tensor]
    before: Tensor


class Sensitivity:
    """One measurement. `entry`: a stream before the first block; `layers`: the linears under each candidate."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        layers: Sequence[Sequence[LayerPlan]],
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
        self.layers = [{layer.name: layer for layer in candidate} for candidate in layers]

    def measure(
        self,
        found: Sequence[list[Felt]] = (),
        keep: Callable[[Sequence[list[Felt]], Sequence[str]], None] = lambda found, names: None,
    ) -> list[Felt]:
        """Of every site, from the first block to the last.

        found  what is known from an earlier call, the last block first
        keep   told after each block what is known, and the names of the files that the rest needs
        """
        inputs = self.directory / "allocate-inputs.f32"
        if not found:
            self._forward(inputs)
        else:
            self.advance(0.2 + 0.8 * len(found) / self.depth)
        stream = Stream.open(inputs, self._shape(self.depth + 1))
        pulls = self._read(len(found)) if found else self._heads(stream)
        for index in reversed(range(self.depth - len(found))):
            felt, pulls = self._block(index, stream, pulls)
            found = [*found, felt]
            if index:
                keep(found, [inputs.name, self._write(len(found), pulls)])
        if self.depth == 1:  # nothing was kept
            inputs.unlink()
        return [felt for block in reversed(found) for felt in block]

    def _shape(self, times: int) -> tuple[int, int, int]:
        return (times * self.count, *self.entry.shape[1:])

    def _pulls(self, done: int) -> Path:
        """Gradients by the hidden states before the `done` last blocks, sequence after sequence."""
        return self.directory / f"allocate-pulls-{done}.f32"

    def _read(self, done: int) -> list[Tensor]:
        stream = Stream.open(self._pulls(done), self._shape(1))
        with torch.inference_mode(False):
            return [stream.read(place) for place in range(self.count)]

    def _write(self, done: int, pulls: Sequence[Tensor]) -> str:
        stream = Stream.create(self._pulls(done), self._shape(1))
        for place, pull in enumerate(pulls):
            stream.write(place, pull)
        stream.finish()
        return stream.path.name

    def _forward(self, path: Path) -> None:
        """Hidden states before block k at k * count, those after the last block behind them."""
        stream = Stream.create(path, self._shape(self.depth + 1))
        for place in range(self.count):
            stream.write(place, self.entry.read(place))
        for index in range(self.depth):
            block = self.source.block(index)

            def unit(place: int, block: nn.Module = block, index: int = index) -> None:
                hidden = stream.read(index * self.count + place)
                stream.write((index + 1) * self.count + place, run_block(block, hidden, self.calls[index]))

            self.workers.map(unit, range(self.count))
            self.advance(0.2 / self.depth)
        stream.finish()

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
        chosen = (self.asked.rows, self.recipe.weights.rows_a_scale)
        rows = {linear.name: rows_of(linear.rows, *chosen) for site in sites for linear in site.linears}

        def unit(place: int) -> _Seen:
            first = max(0, self.count * self.entry.shape[1] // 2 - place * self.entry.shape[1])
            with torch.inference_mode(False), torch.enable_grad():
                hidden = stream.read(index * self.count + place).requires_grad_()
                return _differentiate(block, call, sites, rows, hidden, pulls[place], first)

        seen = self.workers.map(unit, range(self.count))
        self.advance(0.2 / self.depth)
        felt = []
        for site in sites:
            inputs = torch.cat([sequence.inputs.pop(site.name) for sequence in seen])
            felt.append(self._site(f"{prefix}.", block, site, inputs, rows, seen))
            self.advance(0.6 / self.depth / len(sites))
        return felt, [sequence.before for sequence in seen]

    def _site(
        self, prefix: str, block: nn.Module, site: SiteInfo, x: Tensor, rows: dict[str, Tensor], seen: list[_Seen]
    ) -> Felt:
        """x fp32 [tokens, columns], the site's inputs in all sequences."""
        energy, half = channel_energy(x), len(x) // 2
        pulls = {i.name: torch.cat([sequence.pulls[i.name] for sequence in seen]) for i in site.linears}
        back = {i.name: torch.cat([sequence.back.pop(i.name) for sequence in seen]) for i in site.linears}
        specs = [layers[f"{prefix}{site.leader.name}"].spec for layers in self.layers]
        losses = [0.0] * len(specs)
        # Candidates with the same channels set aside and the same groups see the same inputs; a site that the recipe
        # fixes has only one way.
        layouts: dict[tuple[int, int], dict[WeightRecipe, list[int]]] = {}
        for candidate, spec in enumerate(specs):
            recipe = self.layers[candidate][f"{prefix}{site.leader.name}"].recipe
            layouts.setdefault((spec.outliers, spec.group), {}).setdefault(recipe, []).append(candidate)
        for (outliers, group), ways in layouts.items():
            candidates = list(ways.values())
            spec = specs[candidates[0][0]]
            order = channel_order(energy, outliers, self.recipe.weights.order) if spec.permutation else None
            wanted = to_site(x, order, spec.transform)
            inputs = quantize_site(wanted, outliers, group, self.recipe.activations)
            factor = self._factor(inputs[:half], outliers)
            wanted, inputs = wanted[half:], inputs[half:]
            turned = {name: to_site(part, order, spec.transform) for name, part in back.items()}
            rounded = torch.stack([(part * (wanted - inputs)).sum(dim=1) for part in turned.values()]).sum(dim=0)

            def unit(
                task: tuple[int, LinearInfo],
                order: Tensor | None = order,
                inputs: Tensor = inputs,
                factor: Factor = factor,
                turned: dict[str, Tensor] = turned,
            ) -> tuple[Tensor, float]:
                candidate, linear = task
                layer, pull = self.layers[candidate][f"{prefix}{linear.name}"], pulls[linear.name]
                weights = block.get_parameter(f"{linear.name}.weight")[rows[linear.name]]
                weights = in_site_order(weights, order, layer.spec)
                recipe = layer.recipe.model_copy(update={"refine": 0})
                stored = SOLVERS[recipe.method](weights, factor, layer.spec.outliers, recipe).dequantize_site_order()
                share, rest = shrinkage(pull * (inputs @ weights.T), pull * (inputs @ stored.T))
                return share * (turned[linear.name] * inputs).sum(dim=1), rest * linear.rows / len(weights)

            tasks = [(alike[0], linear) for alike in candidates for linear in site.linears]
            found = self.workers.map(unit, tasks)
            for place, alike in enumerate(candidates):
                own = found[place * len(site.linears) : (place + 1) * len(site.linears)]
                shared = rounded + torch.stack([common for common, _ in own]).sum(dim=0)
                rest = sum(part for _, part in own)
                for candidate in alike:
                    losses[candidate] = (float(shared.square().sum(dtype=torch.float64)) + rest) / len(shared) / 2
        names = [f"{prefix}{linear.name}" for linear in site.linears]
        sizes = [sum(layers[name].bytes for name in names) for layers in self.layers]
        return Felt(names, sizes, losses)

    def _factor(self, x: Tensor, outliers: int) -> Factor:
        weights, total = self.recipe.weights, HessianSum(x.shape[1])
        self.workers.map(lambda row: total.add_rows(row, x), row_blocks(x.shape[1]))
        total.sequences = self.count
        over = x.shape[1] - outliers if weights.damping_over == "normal" else None
        return factorize(total.finish(), weights.damping, weights.importance, self.workers.threads, over=over)


def rows_of(rows: int, count: int, together: int = 1) -> Tensor:
    """int64, ascending: about `count` of the `rows` of a linear, which stand for all of them.

    Of two rows that are solved `together` none comes without the other.
    """
    seed = torch.Generator().manual_seed(rows)
    places = torch.randperm(-(-rows // together), generator=seed)[: -(-count // together)].sort().values
    found = (places.unsqueeze(1) * together + torch.arange(together)).flatten()
    return found[found < rows]


def shrinkage(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """wanted, found fp32 [tokens, rows], outputs times their gradients -> (the share s of `wanted` that is nearest to
    what is missing in all of them, the sum of squares of what else is)."""
    missing = wanted - found
    energy = float(wanted.square().sum(dtype=torch.float64))
    share = float((missing * wanted).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
    return share, float((missing - share * wanted).square().sum(dtype=torch.float64))


def _differentiate(
    block: nn.Module,
    call: dict[str, Any],
    sites: Sequence[SiteInfo],
    rows: dict[str, Tensor],
    hidden: Tensor,
    pull: Tensor,
    first: int,
) -> _Seen:
    """hidden, pull [1, tokens, width]: the block's input, and the gradient by its output. Judged is from token `first`
    on."""
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
    parts = {name: part.reshape(-1, part.shape[-1])[first:] for name, part in zip(outputs, found, strict=True)}
    back = {name: part @ block.get_parameter(f"{name}.weight") for name, part in parts.items()}
    return _Seen(inputs, {name: part[:, rows[name]] for name, part in parts.items()}, back, before)
