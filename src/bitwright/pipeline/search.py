"""Clip ratios found on the solved model: a site's inputs and a layer's cache one after the other (GBS, section 4.2).

All weights are quantized by now, on inputs of full precision, and nothing else is. Block by block, and in a block in
the order of use, each *target* is quantized for the first time and its ratio searched, those before it being as found
and those after it still in 16 bits. What is asked of a ratio is the recipe's `search.objective`: the perplexity of the
whole model on the beginning of the calibration text, or the error of what the target makes. An `ambiguous` search asks
for that error first, and for perplexity only where it leaves several ratios open.

Blocks are read back from their shards one at a time, so that memory stays that of a block; hidden states lie in files,
and those before the block at work are kept, so that an evaluation costs the blocks from there on and no more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.activations.clip_search import Found, Objective, search
from bitwright.calibration import Stream
from bitwright.errors import RunError
from bitwright.models import SiteInfo, Skeleton
from bitwright.models.passes import head, run_block
from bitwright.pipeline.job import view_of
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.targets import CACHE, targets
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, dense_weights, to_site
from bitwright.runtime.linear import with_clip
from bitwright.workers import Workers

ALL = "all"
Ratios = dict[str, float]  # by target; what has no ratio is not quantized


@dataclass
class PackedBlocks:
    """The solved blocks of a run, in `directory`, and how hidden states pass them.

    `calls` is what the model passes to each block beside its hidden states. One block is in memory at a time.
    """

    skeleton: Skeleton
    plan: Plan
    directory: Path
    calls: Sequence[dict[str, Any]]
    workers: Workers
    _held: tuple[int, nn.Module] | None = field(default=None, repr=False)

    def block(self, index: int, ratios: Ratios) -> nn.Module:
        """Block `index`, its inputs quantized where `ratios` says how."""
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = (index, self._read(index))
        block = self._held[1]
        for site in self.skeleton.sites(index):
            ratio = ratios.get(f"{self.skeleton.block_name(index)}.{site.name}")
            inputs = None if ratio is None else with_clip(self.plan.recipe.activations, ratio)
            for linear in site.linears:
                _packed(block, linear.name).activations = inputs
        return block

    def _read(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.skeleton.blocks[index])
        prefix = f"{self.skeleton.block_name(index)}."
        stored = load_file(self.directory / self.plan.shard_names()[index + 1])
        state = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        for layer in self.plan.layers_of(index):
            own = layer.name.removeprefix(prefix)
            with torch.device("meta"):
                block.set_submodule(own, QuantizedLinear(layer.name, layer.spec, None, torch.float32))
            leader = layer.spec.permutation
            if leader is not None and leader != layer.name:
                _packed(block, own).share_permutation(_packed(block, leader.removeprefix(prefix)))
        # Norms, biases and sentinels in fp32, as they are computed with; the rest as it is stored.
        floats = {name: tensor.float() for name, tensor in state.items() if name.endswith((".weight", ".bias"))}
        block.load_state_dict({**state, **floats}, assign=True)
        return block.eval().requires_grad_(False)

    def run(self, block: nn.Module, index: int, hidden: Tensor, ratios: Ratios) -> Tensor:
        """Hidden states fp32 [1, length, width] behind `block`, through a fresh cache where it is quantized."""
        arguments = dict(self.calls[index])
        ratio, kv = ratios.get(f"{self.skeleton.block_name(index)}.{CACHE}"), self.plan.recipe.kv
        if ratio is not None and kv is not None:
            depth = len(self.skeleton.blocks)
            arguments["past_key_values"] = QuantizedKVCache(depth, kv, [ratio] * depth)
            arguments["use_cache"] = True
        return run_block(block, hidden, arguments)

    def move(self, index: int, ratios: Ratios, source: Stream, target: Stream) -> None:
        """All sequences of `source` through block `index` into `target`."""
        block = self.block(index, ratios)
        with dense_weights(block):

            def unit(number: int) -> None:
                target.write(number, self.run(block, index, source.read(number), ratios))

            self.workers.map(unit, range(source.shape[0]))


@dataclass
class ClipSearch:
    """The search of one run.

    windows  int64 [windows, length], on which the objective is measured
    embed    writes their hidden states before block 0 into the file that it is given
    after    fp32 parameters behind the blocks, by name
    scratch  where streams may lie; their names begin with `search-`
    done     what was found before the run was broken off; grows
    on_found is told of each target found, `done` being up to date
    """

    blocks: PackedBlocks
    windows: Tensor
    embed: Callable[[Path], None]
    after: dict[str, Tensor]
    scratch: Path
    done: list[dict[str, Any]]
    on_evaluation: Callable[[str, float, float], None]
    on_found: Callable[[dict[str, Any]], None]

    def __post_init__(self) -> None:
        self.recipe = self.blocks.plan.recipe.search
        self.skeleton = self.blocks.skeleton
        self.shape = (len(self.windows), self.windows.shape[1], self.skeleton.width)
        self.ratios = ratios_of(self.done)

    def carry_out(self) -> Ratios:
        """All ratios, by target. Raises RunError where the model has no finite loss with any ratio."""
        self.embed(self.path("a"))
        entering, spare = "a", "b"
        known = {entry["target"] for entry in self.done}
        if self.recipe.method == "global":
            if ALL not in known:
                every = [name for names in targets(self.skeleton, self.blocks.plan.recipe) for name in names]
                self.look(ALL, lambda ratio: self.loss(0, dict.fromkeys(every, ratio), entering))
        else:
            for index, names in enumerate(targets(self.skeleton, self.blocks.plan.recipe)):
                for name in names:
                    if name not in known:
                        self.look(name, *self.objectives(index, name, entering))
                with self.streams(entering, spare) as (source, target):
                    self.blocks.move(index, self.ratios, source, target)
                entering, spare = spare, entering
        for name in ("a", "b", "x", "y"):
            self.path(name).unlink(missing_ok=True)
        return spelled_out(self.ratios, targets(self.skeleton, self.blocks.plan.recipe))

    def look(self, name: str, objective: Objective, error: Objective | None = None) -> None:
        """Search the ratio of one target and write it down."""

        def told(ratio: float, ask: Objective = objective) -> float:
            value = ask(ratio)
            self.on_evaluation(name, ratio, value)
            return value

        cheap = None if error is None else partial(told, ask=error)
        found = search(self.recipe.method, told, self.recipe.iterations, cheap)
        if not math.isfinite(found.value):
            raise RunError(
                f"no clip ratio of {name} gives a finite {self.recipe.objective}; the model does not bear"
                " activations of so few bits: write activations.bits=4 kv.bits=4, or search.method=none"
            )
        entry = entry_of(name, found)
        self.ratios.update(ratios_of([entry]))
        self.done.append(entry)
        self.on_found(entry)

    def objectives(self, index: int, name: str, entering: str) -> list[Objective]:
        """What the recipe asks of a target's ratio; of an ambiguous search the loss, and the error that is asked first.

        The error's streams are free for the loss then: no error is asked for after a loss.
        """
        found: list[Objective] = []
        if self.recipe.objective == "perplexity":
            found.append(lambda ratio: self.loss(index, {**self.ratios, name: ratio}, entering))
        if self.recipe.objective == "output" or self.recipe.method == "ambiguous":
            found.append(self.output_error(index, name, entering))
        return found

    def output_error(self, index: int, name: str, entering: str) -> Objective:
        for site in self.skeleton.sites(index):
            if name == f"{self.skeleton.block_name(index)}.{site.name}":
                return self.site_error(index, site, entering)
        return self.cache_error(index, name, entering)

    def loss(self, first: int, ratios: Ratios, entering: str) -> float:
        """Mean loss of the windows: from the hidden states before block `first` through the rest of the model."""
        source, target = entering, "x"
        for index in range(first, len(self.skeleton.blocks)):
            with self.streams(source, target) as (from_, to):
                self.blocks.move(index, ratios, from_, to)
            source, target = target, "y" if target == "x" else "x"
        with head(self.skeleton, self.after) as logits, self.streams(source) as (stream,):

            def unit(number: int) -> float:
                scores = logits(stream.read(number))[0, :-1]
                return float(nn.functional.cross_entropy(scores, self.windows[number, 1:]))

            losses = self.blocks.workers.map(unit, range(len(self.windows)))
        return sum(losses) / len(losses)

    def site_error(self, index: int, site: SiteInfo, entering: str) -> Objective:
        """Squared error of what the site's linears make of quantized inputs: sum over tokens of |W (x - xhat)|^2.

        The inputs are written down once.
        """
        block = self.blocks.block(index, self.ratios)
        leader = _packed(block, site.leader.name)
        spec, order = leader.spec, leader.order
        shape = (len(self.windows), self.windows.shape[1], spec.columns)

        def catch(number: int) -> None:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = to_site(args[0].reshape(-1, spec.columns).float(), order, spec.transform)
                inputs.write(number, x.unsqueeze(0))
                raise _Caught

            view = view_of(block)
            view.get_submodule(site.leader.name).register_forward_pre_hook(hook)
            with suppress(_Caught):
                self.blocks.run(view, index, stream.read(number), self.ratios)

        inputs = Stream.create(self.path("x"), shape)
        with dense_weights(block), self.streams(entering) as (stream,):
            self.blocks.workers.map(catch, range(len(self.windows)))
        weights = [_packed(block, linear.name).matrix().dequantize_site_order() for linear in site.linears]

        def error(ratio: float) -> float:
            recipe = with_clip(self.blocks.plan.recipe.activations, ratio)

            def unit(number: int) -> float:
                x = inputs.read(number)[0]
                lost = quantize_site(x, spec.outliers, spec.group, recipe) - x
                return sum(float((lost @ weight.T).double().square().sum()) for weight in weights)

            return sum(self.blocks.workers.map(unit, range(len(self.windows))))

        return error

    def cache_error(self, index: int, name: str, entering: str) -> Objective:
        """Squared error of the block's output through the quantized cache, beside that without one."""
        block = self.blocks.block(index, self.ratios)
        with self.streams(entering, "x") as (source, target):
            self.blocks.move(index, self.ratios, source, target)

        def error(ratio: float) -> float:
            ratios = {**self.ratios, name: ratio}

            def unit(number: int) -> float:
                made = self.blocks.run(block, index, source.read(number), ratios)
                return float((made - exact.read(number)).double().square().sum())

            with dense_weights(block), self.streams(entering, "x") as (source, exact):
                return sum(self.blocks.workers.map(unit, range(len(self.windows))))

        return error

    def path(self, name: str) -> Path:
        return self.scratch / f"search-{name}.f32"

    def streams(self, *names: str) -> _Streams:
        return _Streams([self.path(name) for name in names], self.shape)


class _Streams:
    """Streams of one shape, the first to be read, a second to be written; made where they are missing."""

    def __init__(self, paths: list[Path], shape: tuple[int, int, int]) -> None:
        self.paths, self.shape = paths, shape

    def __enter__(self) -> list[Stream]:
        shape, size = self.shape, math.prod(self.shape) * 4  # a file of another size is that of another search
        fits = [path.exists() and path.stat().st_size == size for path in self.paths]
        return [
            Stream(path, shape, "r+") if fit else Stream.create(path, shape)
            for path, fit in zip(self.paths, fits, strict=True)
        ]

    def __exit__(self, *_: object) -> None: ...


class _Caught(Exception):
    """Raised where a wanted input is seen: the rest of the block need not be run."""


def entry_of(name: str, found: Found) -> dict[str, Any]:
    """What run.json and the manifest keep of a target."""
    entry: dict[str, Any] = {
        "target": name,
        "ratio": found.ratio,
        "value": found.value,
        "tried": _finite(found.tried),
    }
    if found.ambiguous is not None:
        entry["ambiguous"] = found.ambiguous
    if found.errors:
        entry["errors"] = _finite(found.errors)
    return entry


def _finite(tried: Sequence[tuple[float, float]]) -> list[list[float | None]]:
    return [[ratio, value if math.isfinite(value) else None] for ratio, value in tried]


def ratios_of(entries: list[dict[str, Any]]) -> Ratios:
    return {entry["target"]: float(entry["ratio"]) for entry in entries}


def spelled_out(ratios: Ratios, names: list[list[str]]) -> Ratios:
    """A ratio for every target: that of all, where they were searched together."""
    return {name: ratios[name] if name in ratios else ratios[ALL] for block in names for name in block}


def _packed(block: nn.Module, name: str) -> QuantizedLinear:
    module = block.get_submodule(name)
    assert isinstance(module, QuantizedLinear)
    return module


def _dense(block: nn.Module, name: str) -> Tensor:
    weights = _packed(block, name)._dense
    assert weights is not None
    return weights
