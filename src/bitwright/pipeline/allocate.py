"""Sites stored in ways of their own, so that the whole model keeps to a number of bits and loses least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitwright.calibration import Stream
from bitwright.errors import RecipeError
from bitwright.pipeline.budget import allot
from bitwright.pipeline.plan import Plan, plan_for
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
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """What `plan.recipe.allocate` comes to, for run.json and the manifest.

    sites   changes of `weights` by full names of leaders, for `Recipe.settled`
    budget  bytes of the quantized linears
    losses  {leader: [nats a token of each candidate]}; candidates  what they are

    Raises RecipeError where the target is below what the smallest candidates take.
    """
    recipe, skeleton = plan.recipe, source.skeleton
    assert recipe.allocate is not None
    candidates = recipe.candidates()
    plans = [plan_for(skeleton, recipe.settled({"*": candidate})) for candidate in candidates]
    budget = target_bytes(plan)
    least = sum(_smallest(plans))
    if least > budget:
        raise RecipeError(
            f"allocate.target = {recipe.allocate.target} is below the"
            f" {least * 8 / plan.linear_weights:.4f} bits a weight of the smallest candidates;"
            " write a larger one, or fewer allocate.bits or larger allocate.groups"
        )
    felt = Sensitivity(source, recipe, plans, entry, calls, workers, directory, advance).measure()
    chosen = allot([site.bytes for site in felt], [site.losses for site in felt], budget)
    assert chosen is not None
    return {
        "sites": _changes(recipe, candidates, felt, chosen),
        "budget": budget,
        "candidates": [candidate.model_dump() for candidate in candidates],
        "losses": {site.linears[0]: site.losses for site in felt},
    }


def target_bytes(plan: Plan) -> int:
    """Bytes that the linears of an unsettled plan may take."""
    assert plan.recipe.allocate is not None
    target = plan.recipe.allocate.target
    return plan.linear_bytes if target == "auto" else int(target * plan.linear_weights / 8)


def settle(recipe: Recipe, allocation: dict[str, Any]) -> Recipe:
    """The recipe with what `allocate` came to."""
    return recipe.settled({name: SiteRecipe(**changes) for name, changes in allocation["sites"].items()})


def _smallest(plans: Sequence[Plan]) -> list[int]:
    """Bytes of each linear where it takes least."""
    return [min(sizes) for sizes in zip(*([layer.bytes for layer in plan.layers] for plan in plans), strict=True)]


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
