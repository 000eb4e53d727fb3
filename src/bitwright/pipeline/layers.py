"""One linear under a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.artifact.layout import LayerSpec, Shape, counted
from bitwright.artifact.shards import shape_bytes
from bitwright.recipe import WeightRecipe


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
