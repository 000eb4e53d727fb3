"""One decoder block through the pipeline: statistics, solve, and both streams moved on to the next block.

1. The full-precision stream passes the block as it is; the energy of each site's input channels gives their order.
2. The quantized stream passes the block with full-precision weights and quantized activations, keys and values; the
   site inputs, in site order, give the Hessians (Atom's order of things, spec 2.3 (c) and (d)).
3. Each linear is solved, in chunks of rows that are independent units of work. With `reforward` steps 2 and 3 are done
   site by site, the solved ones in their place, so that each sees what the ones before did to its input.
4. The quantized stream passes the packed block, the very modules that a loaded artifact runs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.calibration import HessianSum, Stream, channel_energy, wave_sequences
from bitwright.models import LinearInfo, SiteInfo
from bitwright.models.passes import run_block
from bitwright.pipeline.plan import LayerPlan
from bitwright.recipe import Recipe
from bitwright.runtime import QuantizedKVCache, QuantizedLinear, dense_weights, to_site
from bitwright.solvers import SOLVERS, Factor, asymmetric_target, factorize, join_rows, native, output_error
from bitwright.transforms import channel_order
from bitwright.workers import Workers

ROW_CHUNK = 256
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
        weights = self.linear(linear).weight[row : row + count][:, self.orders[site.name]]
        transform = self.layer(linear).spec.transform
        return weights if transform is None else transform.apply(weights)

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


def measure_energy(job: BlockJob, source: Stream, target: Stream) -> None:
    """Step 1: move the full-precision stream on and find each site's channel order from the calibration sequences."""

    def unit(index: int) -> dict[str, Tensor]:
        energies: dict[str, Tensor] = {}
        handles = []
        view = _view(job.block)
        for site in job.sites:

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                energies[name] = channel_energy(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(view.get_submodule(site.leader.name).register_forward_pre_hook(hook))
        target.write(index, run_block(view, source.read(index), job.arguments(cached=False)))
        job.advance("energy", 1 / source.shape[0])
        return energies

    results = job.workers.map(unit, range(source.shape[0]))[: job.sequences]
    for site in job.sites:
        total = torch.stack([energies[site.name] for energies in results]).sum(dim=0)
        job.orders[site.name] = channel_order(total, job.outliers(site), job.recipe.weights.order)


def solve_sites(
    job: BlockJob, source: Stream, source_full: Stream
) -> tuple[dict[str, QuantizedLinear], list[dict[str, Any]]]:
    """Steps 2 and 3: quantized modules by their name in the block, put in place, and a log entry for each."""
    original = _view(job.block)
    modules: dict[str, QuantizedLinear] = {}
    entries: list[dict[str, Any]] = []
    phases = [(site,) for site in job.sites] if job.recipe.calibration.reforward else [job.sites]
    with ExitStack() as stack:
        for number, sites in enumerate(phases):
            ahead = tuple(site for phase in phases[number:] for site in phase)
            sums = measure_sums(job, sites, ahead, source, source_full, original, 1 / len(phases))
            solved, log = solve_block(job, sites, sums)
            del sums
            for name, module in solved.items():
                job.block.set_submodule(name, module)
            if number + 1 < len(phases):
                for site in sites:
                    for linear in site.linears:
                        stack.enter_context(dense_weights(job.block.get_submodule(linear.name)))
            modules.update(solved)
            entries.extend(log)
    return modules, entries


def measure_sums(
    job: BlockJob,
    sites: tuple[SiteInfo, ...],
    ahead: tuple[SiteInfo, ...],
    source: Stream,
    source_full: Stream,
    original: nn.Module,
    share: float,
) -> dict[str, HessianSum]:
    """Step 2: the sums of `sites` over the quantized stream; inputs of the linears of all sites `ahead` are quantized.

    Where the recipe asks for an asymmetric target, `original` runs on the full-precision stream beside it.
    """
    crossed = job.recipe.calibration.asymmetry > 0
    sums = {site.name: HessianSum(site.columns, crossed) for site in sites}

    def forward(index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs: dict[str, Tensor] = {}
        full: dict[str, Tensor] = {}
        view = _view(job.block)
        quantize_inputs(job, view, ahead, inputs, sites[-1].name)
        _until_enough(lambda: run_block(view, source.read(index), job.arguments(cached=True)))
        if crossed:
            view = _view(original)
            record_inputs(job, view, sites, full)
            _until_enough(lambda: run_block(view, source_full.read(index), job.arguments(cached=False)))
        job.advance("hessian", share / job.sequences)
        return inputs, full

    wave = wave_sequences(source.shape[1])
    for start in range(0, job.sequences, wave):
        results = job.workers.map(forward, range(start, min(start + wave, job.sequences)))

        def add(task: tuple[str, int], results: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = results) -> None:
            name, row = task
            for inputs, full in results:
                sums[name].add_rows(row, inputs[name])
                if crossed:
                    sums[name].add_cross(row, full[name], inputs[name])

        job.workers.map(add, [(name, row) for name, total in sums.items() for row in total.row_blocks()])
        for total in sums.values():
            total.sequences += len(results)
    return sums


class _Enough(Exception):
    """Raised by the hook of the last site whose input is wanted: the rest of the block need not be run."""


def _until_enough(run: Callable[[], Any]) -> None:
    with suppress(_Enough):
        run()


def record_inputs(job: BlockJob, block: nn.Module, sites: tuple[SiteInfo, ...], inputs: dict[str, Tensor]) -> None:
    """Hook `block` so that a forward pass ends at the last of `sites`, having put what each saw, in site order, fp32
    [tokens, columns], into `inputs`."""
    for site in sites:

        def hook(_: nn.Module, args: tuple[Tensor, ...], site: SiteInfo = site) -> None:
            inputs[site.name] = job.into(site, args[0].reshape(-1, site.columns).float())
            if site is sites[-1]:
                raise _Enough

        block.get_submodule(site.leader.name).register_forward_pre_hook(hook)


def quantize_inputs(
    job: BlockJob,
    block: nn.Module,
    sites: tuple[SiteInfo, ...],
    inputs: dict[str, Tensor] | None = None,
    last: str | None = None,
) -> None:
    """Hook the linears of `block` so that they see quantized activations in their own channel order.

    `inputs` receives, by site name, what the site saw in site order, fp32 [tokens, columns]; a forward pass ends once
    the site named `last` has seen its own. The hooks hold the last input of each site, so a hooked block must not be
    run by two threads at once.
    """
    for site in sites:
        shared: dict[str, Any] = {}

        def hook(
            _: nn.Module,
            args: tuple[Tensor, ...],
            site: SiteInfo = site,
            shared: dict[str, Any] = shared,
        ) -> tuple[Tensor, ...]:
            (x,) = args
            if shared.get("x") is not x:
                flat = job.into(site, x.reshape(-1, site.columns).float())
                recipe = job.recipe
                group = recipe.weights.group_of(site.columns - job.outliers(site))
                quantized = quantize_site(flat, job.outliers(site), group, recipe.activations)
                if inputs is not None:
                    inputs[site.name] = quantized
                if site.name == last:
                    raise _Enough
                shared.update(x=x, restored=job.back(site, quantized).reshape(x.shape).to(x.dtype))
            return (shared["restored"],)

        for linear in site.linears:
            block.get_submodule(linear.name).register_forward_pre_hook(hook)


def factorize_sites(job: BlockJob, sites: tuple[SiteInfo, ...], hessians: dict[str, Tensor]) -> dict[str, Factor]:
    """Factors by site: one after the other on all threads in native code, else one site a thread."""
    recipe = job.recipe.weights

    def prepare(site: SiteInfo, threads: int | None = None) -> Factor:
        return factorize(hessians[site.name], recipe.damping, recipe.importance, threads)

    if all(native.available(hessian) for hessian in hessians.values()):
        with torch.inference_mode():
            factors = [prepare(site, job.workers.threads) for site in sites]
    else:
        factors = job.workers.map(prepare, sites)
    return dict(zip([site.name for site in sites], factors, strict=True))


def solve_block(
    job: BlockJob, sites: tuple[SiteInfo, ...], sums: dict[str, HessianSum]
) -> tuple[dict[str, QuantizedLinear], list[dict[str, Any]]]:
    """Step 3 for some sites: quantized modules by their name in the block, and a log entry for each."""
    solver = SOLVERS[job.recipe.weights.method]
    weights_recipe, asymmetry = job.recipe.weights, job.recipe.calibration.asymmetry

    hessians = {name: total.finish() for name, total in sums.items()}
    crosses = {name: total.finish_cross() for name, total in sums.items()}
    factors = factorize_sites(job, sites, hessians)
    # Where all rows share a table, all are solved together.
    chunk = ROW_CHUNK if weights_recipe.kind != "shared" else max(info.rows for site in sites for info in site.linears)
    tasks = [(site, linear, row) for site in sites for linear in site.linears for row in range(0, linear.rows, chunk)]

    def solve(task: tuple[SiteInfo, LinearInfo, int]) -> tuple[Any, float, float, float]:
        site, linear, row = task
        began = time.perf_counter()
        weights = job.weights(site, linear, row, chunk)
        factor, cross = factors[site.name], crosses[site.name]
        aim = weights if cross is None else asymmetric_target(weights, cross, factor, asymmetry)
        matrix = solver(aim, factor, job.outliers(site), weights_recipe)
        lost, total = output_error(weights, matrix.dequantize_site_order(), hessians[site.name])
        job.advance("solve", 1 / len(tasks) * len(sites) / len(job.sites))
        return matrix, lost, total, time.perf_counter() - began

    solved = dict(zip([(t[1].name, t[2]) for t in tasks], job.workers.map(solve, tasks), strict=True))
    modules: dict[str, QuantizedLinear] = {}
    entries: list[dict[str, Any]] = []
    for site in sites:
        for linear in site.linears:
            layer = job.layer(linear)
            parts = [solved[linear.name, row] for row in range(0, linear.rows, chunk)]
            order = job.orders[site.name] if layer.spec.permutation else None
            matrix = join_rows([part[0] for part in parts], order)
            bias = job.linear(linear).bias
            module = QuantizedLinear.from_matrix(layer.name, layer.spec, job.recipe.activations, matrix, bias)
            if linear is not site.leader and layer.spec.permutation:
                module.share_permutation(modules[site.leader.name])
            modules[linear.name] = module
            factor = factors[site.name]
            total = sum(part[2] for part in parts)
            entries.append(
                {
                    "block": job.index,
                    "linear": layer.name,
                    "site": site.name,
                    "shape": [linear.rows, linear.columns],
                    "outliers": layer.spec.outliers,
                    "bits": layer.bits_per_weight,
                    "error": sum(part[1] for part in parts) / total if total else 0.0,
                    "damping": factor.damping,
                    "rescue": factor.rescue,
                    "dead_inputs": int(factor.dead.sum()),
                    "seconds": sum(part[3] for part in parts),
                }
            )
    return modules, entries


def propagate(job: BlockJob, source: Stream, target: Stream, full: Stream) -> float:
    """Step 4: move the quantized stream on; returns its relative squared distance from the full-precision stream."""

    def unit(index: int) -> tuple[float, float]:
        hidden = run_block(job.block, source.read(index), job.arguments(cached=True))
        target.write(index, hidden)
        reference = full.read(index)
        job.advance("propagate", 1 / source.shape[0])
        distance = (hidden - reference).double().square().sum()
        return float(distance), float(reference.double().square().sum())

    with dense_weights(job.block):
        results = job.workers.map(unit, range(source.shape[0]))
    total = sum(result[1] for result in results)
    return sum(result[0] for result in results) / total if total else 0.0


def _view(block: nn.Module) -> nn.Module:
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
