"""Recipes by name: a preset carries the name of its method."""

from __future__ import annotations

from typing import Any

from bitwright.errors import RecipeError
from bitwright.recipe.parts import (
    ActivationRecipe,
    AllocateRecipe,
    CalibrationRecipe,
    KVRecipe,
    SearchRecipe,
    TransformRecipe,
    WeightRecipe,
)
from bitwright.recipe.whole import Recipe

# What is used where no preset is named.
DEFAULT = "bitwright"

# GPTQ on round-to-nearest grids, whatever the width; and no channel sorted or set aside.
_GPTQ: dict[str, Any] = {"method": "gptq", "levels": "uniform", "feedback": "column", "importance": "none"}
_IN_PLACE: dict[str, Any] = {"order": "none", "outliers": 0}

PRESETS: dict[str, Recipe] = {
    # The least excess that we know of without training at the bits of `bwa` (docs/methods.md).
    DEFAULT: Recipe(
        name=DEFAULT,
        weights=WeightRecipe(
            levels="dp", feedback="column", order="descending", refine=2, damping=0.15, damping_over="normal"
        ),
        transform=TransformRecipe(hadamard="group"),
        activations=ActivationRecipe(balance="none"),
        calibration=CalibrationRecipe(reforward=True, asymmetry=1.0, residual=1.0),
        allocate=AllocateRecipe(),
    ),
    "bwa": Recipe(name="bwa"),
    "rtn": Recipe(name="rtn", weights=WeightRecipe(method="rtn", levels="uniform", feedback="none", importance="none")),
    # Weights alone, in the order of the model, as the paper and its code by default.
    "gptq": Recipe(
        name="gptq",
        weights=WeightRecipe(bits=4, **_GPTQ, **_IN_PLACE),
        activations=None,
        kv=None,
    ),
    # W4A4KV4, GPTQ on round-to-nearest grids; groups of 128 for weights and activations, both asymmetric.
    "quarot": Recipe(
        name="quarot",
        weights=WeightRecipe(bits=4, **_GPTQ, **_IN_PLACE),
        transform=TransformRecipe(rotation="quarot"),
        activations=ActivationRecipe(balance="none", clip=0.9),
        kv=KVRecipe(hadamard=True),
    ),
    # Weights alone, in the order of the model, as the paper; blocks of 128 columns.
    "billm": Recipe(
        name="billm",
        weights=WeightRecipe(method="billm", levels="split", **_IN_PLACE),
        activations=None,
        kv=None,
    ),
    # W4A4KV4 on symmetric grids with the clips of its code, groups of 128, int8 outliers behind the sorted channels.
    "atom": Recipe(
        name="atom",
        weights=WeightRecipe(bits=4, symmetric=True, clip=0.85, **_GPTQ),
        activations=ActivationRecipe(balance="none", clip=0.9, symmetric=True),
    ),
    # W3A3KV3: as quarot, with grids that err least, sizes expanded where they must be, and clip ratios searched.
    "gbs": Recipe(
        name="gbs",
        weights=WeightRecipe(bits=3, range="mse", **_GPTQ, **_IN_PLACE),
        transform=TransformRecipe(rotation="quarot", expansion="hadamard"),
        activations=ActivationRecipe(bits=3, balance="none"),
        kv=KVRecipe(bits=3, hadamard=True),
        search=SearchRecipe(method="gbs"),
    ),
    # Weights alone, as the paper: 32 groups a matrix. What moves channels or reads a Hessian is off.
    "wgm": Recipe(
        name="wgm",
        weights=WeightRecipe(method="wgm", bits=6, levels="windowed", feedback="none", importance="none", **_IN_PLACE),
        activations=None,
        kv=None,
    ),
}


def preset(name: str) -> Recipe:
    """The recipe of that name. Raises RecipeError that lists the presets."""
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}; the presets are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
