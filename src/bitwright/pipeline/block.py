"""One decoder block through the pipeline: statistics, solve, and both streams moved on to the next block.

1. The full-precision stream passes the block as it is; the energy of each site's input channels gives their order.
2. The quantized stream passes the block with full-precision weights and quantized activations, keys and values; the
   site inputs, in site order, give the Hessians (Atom's order of things, spec 2.3 (c) and (d)).
3. Each linear is solved, in chunks of rows that are independent units of work. With `reforward` steps 2 and 3 are done
   site by site, the solved ones in their place, so that each sees what the ones before did to its input.
4. The quantized stream passes the packed block, the very modules that a loaded artifact runs.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration import Stream
from bitwright.models import LinearInfo, SiteInfo
from bitwright.models.passes import run_block
from bitwright.pipeline.job import BlockJob, view_of
from bitwright.pipeline.sums import SiteSums, measure_sums
from bitwright.runtime import QuantizedLinear, dense_weights
from bitwright.solvers import (
    SOLVERS,
    Factor,
    asymmetric_target,
    factorize,
    input_drift,
    join_rows,
    native,
    output_error,
    residual_correction,
)

ROW_CHUNK = 256  # even: two rows that share a scale are in one chunk


def solve_sites(
    job: BlockJob, source: Stream, source_full: Stream
) -> tuple[dict[str, QuantizedLinear], list[dict[str, Any]]]:
    """Steps 2 and 3: quantized modules by their name in the block, put in place, and a log entry for each."""
    original = view_of(job.block)
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
                for module in solved.values():
                    stack.enter_context(dense_weights(module))
            modules.update(solved)
            entries.extend(log)
    return modules, entries


def factorize_sites(job: BlockJob, sites: tuple[SiteInfo, ...], hessians: dict[str, Tensor]) -> dict[str, Factor]:
    """Factors by site: one after the other on all threads in native code, else one site a thread."""
    recipe = job.recipe.weights
    keep = recipe.refine > 0 or job.recipe.calibration.asymmetry > 0

    def prepare(site: SiteInfo, threads: int | None = None) -> Factor:
        over = site.columns - job.outliers(site) if recipe.damping_over == "normal" else None
        return factorize(hessians[site.name], recipe.damping, recipe.importance, threads, keep_hessian=keep, over=over)

    if all(native.available(hessian) for hessian in hessians.values()):
        with torch.inference_mode():
            factors = [prepare(site, job.workers.threads) for site in sites]
    else:
        factors = job.workers.map(prepare, sites)
    return dict(zip([site.name for site in sites], factors, strict=True))


def solve_block(
    job: BlockJob, sites: tuple[SiteInfo, ...], sums: dict[str, SiteSums]
) -> tuple[dict[str, QuantizedLinear], list[dict[str, Any]]]:
    """Step 3 for some sites: quantized modules by their name in the block, and a log entry for each."""
    solver = SOLVERS[job.recipe.weights.method]
    weights_recipe, calibration = job.recipe.weights, job.recipe.calibration

    hessians = {name: total.hessian.finish() for name, total in sums.items()}
    factors = factorize_sites(job, sites, hessians)
    drifts = {name: input_drift(total.cross.finish(), factors[name]) for name, total in sums.items() if total.cross}
    strayed = {name: part.finish() for total in sums.values() for name, part in total.strayed.items()}
    # Where all rows share a table, or the choice of the salient columns, all are solved together.
    together = weights_recipe.kind in ("shared", "salient")
    chunk = max(info.rows for site in sites for info in site.linears) if together else ROW_CHUNK
    tasks = [(site, linear, row) for site in sites for linear in site.linears for row in range(0, linear.rows, chunk)]

    def solve(task: tuple[SiteInfo, LinearInfo, int]) -> tuple[Any, float, float, float]:
        site, linear, row = task
        began = time.perf_counter()
        weights = job.weights(site, linear, row, chunk)
        factor = factors[site.name]
        aim = weights
        if calibration.asymmetry:
            aim = asymmetric_target(weights, drifts[site.name], factor, calibration.asymmetry)
        if linear.name in strayed:
            aim = aim + residual_correction(strayed[linear.name][row : row + chunk], factor, calibration.residual)
        matrix = solver(aim, factor, job.outliers(site), job.layer(linear).recipe)
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
                    **({} if matrix.salient is None else {"salient": int(matrix.salient_channels().sum())}),
                    "bits": layer.bits_per_weight,
                    "error": sum(part[1] for part in parts) / total if total else 0.0,
                    "damping": factor.damping,
                    "rescue": factor.rescue,
                    "dead_inputs": int(factor.dead.sum()),
                    "seconds": sum(part[3] for part in parts),
                }
            )
    return modules, entries


def propagate(job: BlockJob, source: Stream, target: Stream, full: Stream | None) -> float:
    """Step 4: move the quantized stream on; returns its relative squared distance from the full-precision stream, 0
    where that is not given."""

    def unit(index: int) -> tuple[float, float]:
        hidden = run_block(job.block, source.read(index), job.arguments(cached=True))
        target.write(index, hidden)
        job.advance("propagate", 1 / source.shape[0])
        if full is None:
            return 0.0, 0.0
        reference = full.read(index)
        distance = (hidden - reference).double().square().sum()
        return float(distance), float(reference.double().square().sum())

    with dense_weights(job.block):
        results = job.workers.map(unit, range(source.shape[0]))
    total = sum(result[1] for result in results)
    return sum(result[0] for result in results) / total if total else 0.0
