"""The search for clip ratios as a stage of a run: behind the last block, before what the run measures of itself.

Where a recipe asks for a search, or for no `calibration.quantizers`, weights are solved as if activations and cache
were never quantized (as GBS's and QuaRot's code does: ratios that are not known yet cannot be in the statistics). A
last pass of the quantized stream then has them all. What was found is written down after each target, so that a run
that is broken off goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bitwright.activations.clip_search import evaluations
from bitwright.calibration import Stream, Text, consecutive_windows
from bitwright.models import Skeleton
from bitwright.models.passes import embed
from bitwright.pipeline.plan import Plan
from bitwright.pipeline.search import ClipSearch, PackedBlocks, Ratios
from bitwright.pipeline.targets import CACHE, WINDOWS, targets
from bitwright.recipe import Recipe, SearchRecipe

# The quantized stream with all ratios in their places.
FINAL = "stream-final.f32"


class Searching:
    """What a recipe asks of a search: the windows to measure on, and the recipe that the weights are solved by.

    deferred  what is quantized beside the weights is quantized in a last pass
    """

    def __init__(self, recipe: Recipe, tokens: Tensor, length: int, text: Text) -> None:
        self.asked = recipe.search.method != "none"
        self.solving = recipe
        something = recipe.activations is not None or recipe.kv is not None
        self.deferred = self.asked or (something and not recipe.calibration.quantizers)
        if self.deferred:
            off = {"activations": None, "kv": None, "search": SearchRecipe()}
            self.solving = recipe.model_copy(update=off)
        if self.asked:
            count = max(length, int(len(tokens) * recipe.search.share))
            most = WINDOWS if recipe.search.method == "ambiguous" else None
            self.windows = consecutive_windows(tokens[:count], length, most, text, "calibration.length")

    def disk(self, width: int, tokens: int) -> int:
        """Bytes of the files of hidden states: four of a search, two of the last pass over the run's `tokens`."""
        search = 4 * 4 * self.windows.numel() * width if self.asked else 0
        return max(search, 2 * 4 * tokens * width if self.deferred else 0)


@dataclass
class SearchStage:
    """The stage of one run.

    outer    fp32 parameters before or behind the blocks, embedding and head as they are stored
    scratch  the run's directory
    done     entries of what was found before; grows
    report   Reporter.searching
    save     makes `done` durable
    """

    blocks: PackedBlocks
    searching: Searching
    outer: Callable[[Literal["before", "after"]], dict[str, Tensor]]
    scratch: Path
    done: list[dict[str, Any]]
    report: Callable[[str, float, int, dict[str, Any] | None], None]
    save: Callable[[], None]

    def __post_init__(self) -> None:
        self.recipe = self.blocks.plan.recipe.search
        every = targets(self.blocks.skeleton, self.blocks.plan.recipe)
        self.total = 1 if self.recipe.method == "global" else sum(len(names) for names in every)

    def ratios(self) -> Ratios:
        """Of every target, from what was found before, and what is found now."""
        most, tried = evaluations(self.recipe.method, self.recipe.iterations), 0

        def evaluated(target: str, ratio: float, value: float) -> None:
            nonlocal tried
            tried += 1
            self.report(target, len(self.done) + min(tried / most, 1.0), self.total, None)

        def found(entry: dict[str, Any]) -> None:
            nonlocal tried
            tried = 0
            self.save()
            self.report(entry["target"], len(self.done), self.total, entry)

        search = ClipSearch(
            self.blocks,
            self.searching.windows,
            lambda path: embed_windows(self.blocks.skeleton, self.outer("before"), self.searching.windows, path),
            self.outer("after"),
            self.scratch,
            self.done,
            evaluated,
            found,
        )
        return search.carry_out()

    def apply(self, ratios: Ratios, windows: Tensor, path: Path) -> None:
        """All windows of the run through the model with all ratios, into the stream file `path`."""
        shape = (len(windows), windows.shape[1], self.blocks.skeleton.width)
        first, second = (path.with_name(f"search-final-{name}.f32") for name in ("a", "b"))
        embed_windows(self.blocks.skeleton, self.outer("before"), windows, first)
        depth = len(self.blocks.skeleton.blocks)
        for index in range(depth):
            source, target = Stream.open(first, shape), Stream.create(second, shape)
            self.blocks.move(index, ratios, source, target)
            target.finish()
            first, second = second, first
            self.report("all, the last pass", self.total, self.total, None)
        first.replace(path)
        second.unlink(missing_ok=True)


def asked_ratios(skeleton: Skeleton, recipe: Recipe) -> Ratios:
    """Every target with the clip that the recipe says."""
    inputs = recipe.activations.clip if recipe.activations is not None else 1.0
    cache = recipe.kv.clip if recipe.kv is not None else 1.0
    names = [name for block in targets(skeleton, recipe) for name in block]
    return {name: cache if name.endswith(f".{CACHE}") else inputs for name in names}


def embed_windows(skeleton: Skeleton, values: dict[str, Tensor], windows: Tensor, path: Path) -> None:
    """The hidden states of `windows` before block 0 into a stream file; `values` as models.passes.embed has them."""
    target = Stream.create(path, (len(windows), windows.shape[1], skeleton.width))
    # The model's own forward is not safe for several threads while its blocks are replaced: one after the other.
    for index in range(len(windows)):
        hidden, _ = embed(skeleton, values, windows[index : index + 1])[0]
        target.write(index, hidden)
    target.finish()


def with_ratios(skeleton: Skeleton, plan: Plan, ratios: Ratios) -> dict[str, Any]:
    """`layers`, and `cache` where it has ratios, of a quantization_config."""
    layers = {}
    for layer in plan.layers:
        ratio = ratios.get(f"{skeleton.block_name(layer.block)}.{layer.site}")
        layers[layer.name] = replace(layer.spec, clip=ratio).to_dict()
    found: dict[str, Any] = {"layers": layers}
    if plan.recipe.kv is not None:
        names = [skeleton.block_name(index) for index in range(len(skeleton.blocks))]
        found["cache"] = {"clips": [ratios[f"{name}.{CACHE}"] for name in names]}
    return found
