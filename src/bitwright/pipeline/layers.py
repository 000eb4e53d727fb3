"""The linears of a model under a recipe, and what they may take where the recipe leaves a choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitwright.artifact.layout import LayerSpec, Shape, counted, layer_shapes
from bitwright.artifact.shards import TORCH_DTYPES, shape_bytes
from bitwright.errors import ModelError, RecipeError
from bitwright.models import Skeleton
from bitwright.pipeline.source import Source
from bitwright.recipe import Recipe, WeightRecipe, outlier_count
from bitwright.transforms.hadamard import constructible, largest_block, next_size


@dataclass(frozen=True)
class LayerPlan:
    """One linear: where it stands, how it will be stored."""

    name: str
    block: int
    site: str
    spec: LayerSpec
    shapes: dict[str, Shape]
    weights: int  # of the model as it is, without zeros that a rotation asks for
    recipe: WeightRecipe

    @property
    def bytes(self) -> int:
        """Honest bytes: codes, levels, scales, outliers, permutation."""
        return sum(shape_bytes(shape) for name, shape in self.shapes.items() if counted(name))

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.weights


def layers_of_block(skeleton: Skeleton, recipe: Recipe, source: Source, block: int) -> list[LayerPlan]:
    """Raises RecipeError or ModelError where a linear cannot be stored so."""
    prefix = skeleton.block_name(block)
    layers = []
    for site in skeleton.sites(block):
        site_name = f"{prefix}.{site.leader.name}"
        asked = recipe.weights_at(f"{prefix}.{linear.name}" for linear in site.linears)
        try:
            outliers = outlier_count(site.columns, asked.outliers)
        except RecipeError as error:
            raise RecipeError(f"{site_name}: {error}") from None
        if site.columns < 8:
            raise ModelError(f"{site_name} has {site.columns} inputs; at least 8 are needed")
        moves = outliers > 0 or asked.order != "none"
        hadamard, stride = source.hadamard(site) if source.rotates else (_hadamard(recipe, site_name, asked.group), 1)
        for linear in site.linears:
            name = f"{prefix}.{linear.name}"
            spec = LayerSpec(
                rows=linear.rows,
                columns=linear.columns,
                bits=asked.bits,
                group=asked.group_of(linear.columns - outliers),
                kind=asked.kind,
                outliers=outliers,
                bias=linear.bias,
                permutation=site_name if moves else None,
                hadamard=hadamard,
                stride=stride,
            )
            dtype = TORCH_DTYPES[skeleton.checkpoint.info(f"{name}.weight").dtype]
            weights = skeleton.checkpoint.elements(f"{name}.weight")
            layers.append(LayerPlan(name, block, site.name, spec, layer_shapes(name, spec, dtype), weights, asked))
    return layers


def candidate_layers(skeleton: Skeleton, recipe: Recipe, source: Source) -> list[list[LayerPlan]]:
    """All linears under each of the candidates of `recipe.allocate`. Raises as `layers_of_block`."""
    made = (recipe.settled({"*": candidate}) for candidate in recipe.candidates())
    blocks = range(len(skeleton.blocks))
    return [[layer for block in blocks for layer in layers_of_block(skeleton, one, source, block)] for one in made]


def allotted_bytes(recipe: Recipe, layers: Sequence[LayerPlan], candidates: Sequence[Sequence[LayerPlan]]) -> int:
    """Bytes that all linears together may take, by `allocate.target`; `layers` are those without a choice.

    Raises RecipeError where the smallest candidates take more.
    """
    assert recipe.allocate is not None
    weights, target = sum(layer.weights for layer in layers), recipe.allocate.target
    if target == "auto":
        return sum(layer.bytes for layer in layers)
    budget, sites = int(target * weights / 8), [_site_bytes(candidate) for candidate in candidates]
    least = sum(min(sizes) for sizes in zip(*(found.values() for found in sites), strict=True))
    if least > budget:
        bits = math.ceil(least * 8e4 / weights) / 1e4
        raise RecipeError(
            f"allocate.target = {target} is below the {bits:.4f} bits a weight that the smallest candidates take; write"
            " so many or more, or smaller allocate.bits or larger allocate.groups"
        )
    return budget


def _site_bytes(layers: Sequence[LayerPlan]) -> dict[tuple[int, str], int]:
    """Bytes of each site of each block."""
    found: dict[tuple[int, str], int] = {}
    for layer in layers:
        found[layer.block, layer.site] = found.get((layer.block, layer.site), 0) + layer.bytes
    return found


def _hadamard(recipe: Recipe, site: str, group: int) -> int:
    """Size of the blocks of a site's input that are transformed, 0 for none. Raises RecipeError."""
    if recipe.transform.hadamard == "none":
        return 0
    if group == 0:
        raise RecipeError(f"{site}: transform.hadamard = 'group' needs groups of inputs, found group = 0; write 128")
    if not constructible(group):
        raise RecipeError(
            f"{site}: transform.hadamard = 'group' has no matrix for group = {group};"
            f" write {largest_block(group, power_of_two=True)} or {next_size(group)}"
        )
    return group
