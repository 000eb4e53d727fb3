"""Sites stored in ways of their own, so that the whole model keeps to a number of bits and loses least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitwright.calibration import Stream
from bitwright.models.checkpoint import sha256_file
from bitwright.pipeline.budget import allot
from bitwright.pipeline.layers import candidate_layers
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.sensitivity import Felt, Sensitivity
from bitwright.pipeline.source import Source
from bitwright.recipe import Recipe, SiteRecipe
from bitwright.workers import Workers


def allocate(
    source: Source,
    plan: Plan,
    entry: Stream,
    calls: Sequence[dict[str, Any]],
    workers: Workers,
    directory: Path,
    begun: dict[str, Any],
    seal: Callable[[dict[str, Any]], None],
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """What `plan.recipe.allocate` comes to, for run.json and the manifest.

    begun   what an earlier call gave to `seal`, which is told after each block and keeps it; empty at first
    sites   changes of `weights` by full names of leaders, for `Recipe.settled`
    budget  bytes of the quantized linears
    losses  {leader: [nats a token of each candidate]}; candidates  what they are
    """
    recipe = plan.recipe
    candidates, layers = recipe.candidates(), candidate_layers(source.skeleton, recipe, source)
    blocks = [[Felt(**site) for site in block] for block in begun.get("felt", [])]
    digests = begun.get("files", {})

    def keep(found: Sequence[Sequence[Felt]], names: Sequence[str]) -> None:
        nonlocal digests
        digests = {name: digests.get(name) or sha256_file(directory / name) for name in names}
        seal({"felt": [[asdict(site) for site in block] for block in found], "files": digests})

    felt = Sensitivity(source, recipe, layers, entry, calls, workers, directory, advance).measure(blocks, keep)
    chosen = allot([site.bytes for site in felt], [site.losses for site in felt], plan.bound)
    assert chosen is not None
    return {
        "sites": _changes(recipe, candidates, felt, chosen),
        "budget": plan.bound,
        "candidates": [candidate.model_dump() for candidate in candidates],
        "losses": {site.linears[0]: site.losses for site in felt},
    }


def settle(recipe: Recipe, allocation: dict[str, Any]) -> Recipe:
    """The recipe with what `allocate` came to."""
    return recipe.settled({name: SiteRecipe(**changes) for name, changes in allocation["sites"].items()})


def _changes(
    recipe: Recipe, candidates: Sequence[SiteRecipe], felt: Sequence[Felt], chosen: Sequence[int]
) -> dict[str, dict[str, Any]]:
    own = recipe.weights
    usual = SiteRecipe(bits=own.bits, group=own.group, outliers=own.outliers)
    made = zip(felt, (candidates[choice] for choice in chosen), strict=True)
    # What `sites` fixes is the same under all candidates.
    return {
        site.linears[0]: candidate.model_dump()
        for site, candidate in made
        if candidate != usual and recipe.pattern_of(site.linears) is None
    }
