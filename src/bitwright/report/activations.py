"""What the sites of a model see: the largest value of each input channel, in the original and before a quantizer.

Outlier channels are what makes activations hard to quantize; the order of the channels, Hadamard matrices and rotations
are what a recipe does about it. Both models are run: what a rotation makes of an input can be told in no simpler way.
Curves are thinned for a page: the maximum of each of at most BINS runs of neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.artifact.layout import LayerSpec
from bitwright.calibration import Text, load_tokenizer, random_windows, tokenize
from bitwright.errors import ArtifactError
from bitwright.evaluation import load
from bitwright.integrations.transformers import quantized_cache, recipe_of
from bitwright.models import Checkpoint, Skeleton, context_length
from bitwright.models.checkpoint import read_json
from bitwright.recipe import Recipe
from bitwright.runtime import QuantizedLinear, to_site
from bitwright.workers import Workers

BINS = 96
WINDOWS = 8


def shown_blocks(count: int) -> list[int]:
    """The first, the middle and the last of `count` blocks."""
    return sorted({0, count // 2, count - 1})


def site_maxima(directory: Path, calibration: Text, threads: int | None = None) -> dict[str, Any]:
    """max |x| of each input channel of the original model, fp32 [columns], by `block/site` of the shown blocks.

    Over WINDOWS random segments of the calibration text. Beside the maxima: the leading linear of each site, and what
    was measured on, in words.
    """
    skeleton = Skeleton(Checkpoint(directory))
    leaders = {
        f"{block}/{site.name}": f"{skeleton.block_name(block)}.{site.leader.name}"
        for block in shown_blocks(len(skeleton.blocks))
        for site in skeleton.sites(block)
    }
    maxima, length = _largest(directory, leaders, calibration, threads)
    return {
        "on": f"{WINDOWS} random segments of {length} tokens of {calibration.name}",
        "leaders": leaders,
        "maxima": {key: [float(f"{value:.4g}") for value in found.tolist()] for key, found in maxima.items()},
    }


def before(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Curves in the model's own order of channels."""
    return {key: thinned(np.array(values)) for key, values in measured["maxima"].items()}


def after(
    measured: dict[str, Any], artifact: Path, calibration: Text, threads: int | None = None
) -> dict[str, dict[str, Any]]:
    """Curves of what the artifact's activation quantizers see, by site, on the segments of `site_maxima`.

    `curve`: max |x| after all that is done to a site's input before it is quantized: basis and width of the stream,
    channel order, Hadamard matrices. The errors of the sites and of the cache before it are in it.
    `normal`: the share of channels before the int8 ones.
    Nothing where activations are not quantized, or all sites get their inputs in the order and basis of the original.
    """
    described = read_json(artifact / "config.json", ArtifactError)["quantization_config"]
    recipe = Recipe.from_dict(described["recipe"], "quantization_config.recipe")
    specs = {key: LayerSpec.from_dict(name, described["layers"][name]) for key, name in measured["leaders"].items()}
    moved = any(spec.permutation is not None or spec.hadamard for spec in specs.values())
    if recipe.activations is None or not (moved or recipe.transform.rotation != "none"):
        return {}
    maxima, _ = _largest(artifact, measured["leaders"], calibration, threads)
    return {
        key: {"curve": [float(f"{value:.4g}") for value in thinned(found.numpy())],
              "normal": 1 - specs[key].outliers / specs[key].columns}
        for key, found in maxima.items()
    }  # fmt: skip


def _largest(
    directory: Path, leaders: Mapping[str, str], calibration: Text, threads: int | None
) -> tuple[dict[str, Tensor], int]:
    """max |x| fp32 [columns] of the inputs of the linears `leaders` of a model or artifact, and tokens a segment.

    Of a QuantizedLinear in site order and transformed, as its quantizer gets them; through the cache of its recipe.
    """
    model = load(directory)
    config = model.config.get_text_config(decoder=True)
    tokens = tokenize(load_tokenizer(directory), calibration, config.vocab_size)
    length = min(2048, context_length(config) or 2048, len(tokens))
    recipe = recipe_of(model)
    maxima: dict[str, Tensor] = {}
    lock = Lock()
    for key, name in leaders.items():

        def hook(linear: Any, args: tuple[Tensor, ...], key: str = key) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            if isinstance(linear, QuantizedLinear):
                x = to_site(x, linear.order, linear.spec.transform)
            found = x.abs().amax(dim=0)
            with lock:
                maxima[key] = torch.maximum(maxima[key], found) if key in maxima else found

        # A hook also keeps blocks off the lean path, which calls no linear.
        model.get_submodule(name).register_forward_pre_hook(hook)

    def unit(ids: Tensor) -> None:
        cache = quantized_cache(model, recipe) if recipe else None
        extra = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        model(input_ids=ids.unsqueeze(0), **extra)

    with Workers(threads) as workers:
        workers.map(unit, random_windows(tokens, WINDOWS, length, 0, calibration))
    return {key: maxima[key] for key in leaders}, length


def thinned(values: np.ndarray) -> list[float]:
    """At most BINS numbers: the maxima of equal runs."""
    return [float(part.max()) for part in np.array_split(values, min(BINS, len(values)))]
