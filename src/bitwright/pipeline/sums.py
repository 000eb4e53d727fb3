"""Statistics of a block's sites: channel energies of the full-precision stream, and sums over both streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.calibration import CrossSum, HessianSum, Stream, channel_energy, row_blocks, wave_sequences
from bitwright.models import ENTRY, SiteInfo
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


@dataclass
class SiteSums:
    """What is summed over the calibration tokens at a site, X its quantized inputs in site order.

    hessian  X^T X
    cross    X_full^T X, where the recipe asks for an asymmetric target
    strayed  (R_full - R)^T X for each linear that writes to the residual stream R, where the recipe asks for it
    """

    hessian: HessianSum
    cross: CrossSum | None
    strayed: dict[str, CrossSum]

    def work(self) -> list[tuple[HessianSum | CrossSum, str | None, int]]:
        """Independent units: a sum, the linear that it is for (None: the site), the first row of a block."""
        sums: list[tuple[HessianSum | CrossSum, str | None]] = [(self.hessian, None)]
        sums += [(self.cross, None)] if self.cross else []
        sums += [(total, name) for name, total in self.strayed.items()]
        return [(total, name, row) for total, name in sums for row in row_blocks(len(total.total))]

    def count(self, sequences: int) -> None:
        for total in (self.hessian, self.cross, *self.strayed.values()):
            if total is not None:
                total.sequences += sequences


@dataclass
class _Seen:
    """What one sequence showed: inputs by site, in site order, those of the full-precision model, and R_full - R by
    writer."""

    inputs: dict[str, Tensor]
    full: dict[str, Tensor]
    strayed: dict[str, Tensor]


def measure_sums(
    job: BlockJob,
    sites: tuple[SiteInfo, ...],
    ahead: tuple[SiteInfo, ...],
    source: Stream,
    source_full: Stream,
    original: nn.Module,
    share: float,
) -> dict[str, SiteSums]:
    """Step 2: the sums of `sites` over the quantized stream; inputs of the linears of all sites `ahead` are quantized.

    Where the recipe asks what the full-precision model does, `original` runs on its stream beside it.
    """
    crossed = job.recipe.calibration.asymmetry > 0
    names = {linear.name for site in sites for linear in site.linears}
    writers = {name: receiver for name, receiver in job.writers.items() if name in names}
    sums = {
        site.name: SiteSums(
            HessianSum(site.columns),
            CrossSum(site.columns, site.columns) if crossed else None,
            {linear.name: CrossSum(linear.rows, site.columns) for linear in site.linears if linear.name in writers},
        )
        for site in sites
    }

    def forward(index: int) -> _Seen:
        seen, stream, stream_full = _Seen({}, {}, {}), dict[str, Tensor](), dict[str, Tensor]()
        view, hidden = view_of(job.block), source.read(index)
        record_stream(view, writers, hidden, stream)
        quantize_inputs(job, view, ahead, seen.inputs, sites[-1].name)
        _until_enough(lambda: run_block(view, hidden, job.arguments(cached=True)))
        if crossed or writers:
            view, hidden = view_of(original), source_full.read(index)
            record_stream(view, writers, hidden, stream_full)
            record_inputs(job, view, sites, seen.full)
            _until_enough(lambda: run_block(view, hidden, job.arguments(cached=False)))
        seen.strayed.update({name: stream_full[name] - stream[name] for name in writers})
        job.advance("hessian", share / job.sequences)
        return seen

    work = [(site, *unit) for site, total in sums.items() for unit in total.work()]
    wave = wave_sequences(source.shape[1])
    for start in range(0, job.sequences, wave):
        results = job.workers.map(forward, range(start, min(start + wave, job.sequences)))

        def add(task: tuple[str, Any, str | None, int], results: list[_Seen] = results) -> None:
            site, total, writer, row = task
            for seen in results:
                x = seen.inputs[site]
                if isinstance(total, HessianSum):
                    total.add_rows(row, x)
                else:
                    total.add_rows(row, seen.full[site] if writer is None else seen.strayed[writer], x)

        job.workers.map(add, work)
        for total in sums.values():
            total.count(len(results))
    return sums


def record_stream(block: nn.Module, writers: dict[str, str], hidden: Tensor, stream: dict[str, Tensor]) -> None:
    """Hook `block`, which is to be run on `hidden`, so that `stream` receives by writer the residual stream, fp32
    [tokens, width], that its output is going to be added to."""
    for writer, receiver in writers.items():

        def keep(value: Tensor, writer: str = writer) -> None:
            stream[writer] = value.reshape(-1, value.shape[-1]).float()

        if receiver == ENTRY:
            keep(hidden)
        else:
            block.get_submodule(receiver).register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0]))


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
                spec = job.layer(site.leader).spec
                quantized = quantize_site(flat, spec.outliers, spec.group, job.recipe.activations)
                inputs[site.name] = quantized
                if site.name == last:
                    raise _Enough
                shared.update(x=x, restored=job.back(site, quantized).reshape(x.shape).to(x.dtype))
            return (shared["restored"],)

        for linear in site.linears:
            block.get_submodule(linear.name).register_forward_pre_hook(hook)
