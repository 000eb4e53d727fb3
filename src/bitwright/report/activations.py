"""What the sites of a model see: the largest value of each input channel, before and after the channels are moved.

Outlier channels are what makes activations hard to quantize, and the order of the channels is what a recipe does about
it. Curves are thinned for a page: the maximum of each of at most BINS runs of neighbouring channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bitwright.artifact.layout import INDEX_NAME
from bitwright.calibration import Text, load_tokenizer, random_windows, tokenize
from bitwright.evaluation import load
from bitwright.models import Checkpoint, Skeleton, context_length

BINS = 96
WINDOWS = 8


def shown_blocks(count: int) -> list[int]:
    """The first, the middle and the last of `count` blocks."""
    return sorted({0, count // 2, count - 1})


def site_maxima(directory: Path, calibration: Text) -> dict[str, Any]:
    """max |x| of each input channel of the original model, fp32 [columns], by `block/site` of the shown blocks.

    Over WINDOWS random segments of the calibration text. Beside the maxima: the leading linear of each site, and what
    was measured on, in words.
    """
    skeleton = Skeleton(Checkpoint(directory))
    model = load(directory)
    tokens = tokenize(load_tokenizer(directory), calibration, skeleton.config.get_text_config(decoder=True).vocab_size)
    length = min(2048, context_length(skeleton.config) or 2048, len(tokens))
    maxima: dict[str, torch.Tensor] = {}
    leaders: dict[str, str] = {}
    for block in shown_blocks(len(skeleton.blocks)):
        for site in skeleton.sites(block):
            key = f"{block}/{site.name}"
            leaders[key] = f"{skeleton.block_name(block)}.{site.leader.name}"

            def hook(_: Any, args: tuple[torch.Tensor, ...], key: str = key) -> None:
                found = args[0].reshape(-1, args[0].shape[-1]).float().abs().amax(dim=0)
                maxima[key] = torch.maximum(maxima[key], found) if key in maxima else found

            model.get_submodule(leaders[key]).register_forward_pre_hook(hook)
    with torch.inference_mode():
        for ids in random_windows(tokens, WINDOWS, length, 0, calibration):
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    return {
        "on": f"{WINDOWS} random segments of {length} tokens of {calibration.name}",
        "leaders": leaders,
        "maxima": {key: [float(f"{value:.4g}") for value in found.tolist()] for key, found in maxima.items()},
    }


def before(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Curves in the model's own order of channels."""
    return {key: thinned(np.array(values)) for key, values in measured["maxima"].items()}


def after(measured: dict[str, Any], artifact: Path) -> dict[str, dict[str, Any]]:
    """Curves in the artifact's order of channels, by site: `curve`, and `normal`, the share of channels before int8.

    Sites whose channels stay where they are have no entry.
    """
    layers = json.loads((artifact / "config.json").read_text(encoding="utf-8"))["quantization_config"]["layers"]
    files = json.loads((artifact / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    curves = {}
    for key, leader in measured["leaders"].items():
        spec = layers[leader]
        if spec["permutation"] is None:
            continue
        name = f"{spec['permutation']}.permutation"
        with safe_open(artifact / files[name], framework="pt") as file:
            order = file.get_tensor(name).to(torch.int64).numpy()
        values = np.array(measured["maxima"][key])[order]
        curves[key] = {"curve": thinned(values), "normal": 1 - spec["outliers"] / spec["columns"]}
    return curves


def thinned(values: np.ndarray) -> list[float]:
    """At most BINS numbers: the maxima of equal runs."""
    return [float(part.max()) for part in np.array_split(values, min(BINS, len(values)))]
