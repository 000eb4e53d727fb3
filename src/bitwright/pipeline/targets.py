"""What has a clip ratio of its own, by name, and what it costs to search them all."""

from __future__ import annotations

from bitwright.activations.clip_search import evaluations
from bitwright.models import Skeleton
from bitwright.recipe import Recipe

CACHE = "cache"
# An ambiguous search is to be cheap: it measures on so many windows at most.
WINDOWS = 16


def targets(skeleton: Skeleton, recipe: Recipe) -> list[list[str]]:
    """Block by block in the order of the search: `BLOCK.SITE`, and behind a block's first site `BLOCK.cache` for its
    keys and values (GBS: q, k, v, the keys, o, gate, up, down)."""
    found = []
    for index in range(len(skeleton.blocks)):
        name = skeleton.block_name(index)
        sites = [f"{name}.{site.name}" for site in skeleton.sites(index)] if recipe.activations else []
        found.append([*sites[:1], *([f"{name}.{CACHE}"] if recipe.kv else []), *sites[1:]])
    return found


def search_notes(skeleton: Skeleton, recipe: Recipe) -> list[str]:
    """What a search asks for, for the plan; nothing where there is none."""
    asked = recipe.search
    if asked.method == "none":
        return []
    count = 1 if asked.method == "global" else sum(len(names) for names in targets(skeleton, recipe))
    most = evaluations(asked.method, asked.iterations)
    what, where = f"up to {most} evaluations of the {asked.objective}", ""
    if asked.method == "ambiguous":
        what = f"{most // 2} evaluations of the output's error and up to {most // 2} of the perplexity"
        where = f"at most {WINDOWS} windows of "
    return [
        f"clip ratios: {count} searches of {what} on {where}the first {asked.share * 100:g} % of the calibration text,"
        f" each token of which takes {16 * skeleton.width:,} bytes of disk meanwhile"
    ]
