"""Statistics of a block's sites: channel energies of the full-precision stream, Hessians of the quantized one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.calibration import HessianSum, Stream, channel_energy, wave_sequences
from bitwright.models import SiteInfo
from bitwright.models.passes import run_block
from bitwright.pipeline.job import BlockJob, view_of
from bitwright.transforms import channel_order


def measure_energy(job: BlockJob, source: Stream, target: Stream) -> None:
    """Step 1: move the full-precision stream on and find each site's channel order from the calibration sequences."""

    def unit(index: int) -> dict[str, Tensor]:
        energies: dict[str, Tensor] = {}
        handles = []
        view = view_of(job.block)
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
        view = view_of(job.block)
        quantize_inputs(job, view, ahead, inputs, sites[-1].name)
        _until_enough(lambda: run_block(view, source.read(index), job.arguments(cached=True)))
        if crossed:
            view = view_of(original)
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
    inputs: dict[str, Tensor],
    last: str,
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
                inputs[site.name] = quantized
                if site.name == last:
                    raise _Enough
                shared.update(x=x, restored=job.back(site, quantized).reshape(x.shape).to(x.dtype))
            return (shared["restored"],)

        for linear in site.linears:
            block.get_submodule(linear.name).register_forward_pre_hook(hook)
