"""Options that change what a site is solved for, through the whole run: re-forward, asymmetric target, refinement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
import simulation
import support
from bitwright.calibration import Text
from bitwright.codebook import CodebookMatrix

WEIGHTS_ONLY = {"activations": None, "kv": None}
FIRST = ("q_proj", "k_proj", "v_proj")


def solved(model: Path, out: Path, calibration: Text, **options: Any) -> dict[str, CodebookMatrix]:
    recipe = bitwright.preset("bwa").with_options(
        {**support.SMALL, **{k.replace("__", "."): v for k, v in options.items()}}
    )
    bitwright.quantize(model, out, recipe, calibration)
    return simulation.stored_matrices(out)


def same(a: CodebookMatrix, b: CodebookMatrix) -> bool:
    return torch.equal(a.dequantize_site_order(), b.dequantize_site_order())


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], calibration: Text, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return solved(models["llama_biases"], tmp_path_factory.mktemp("plain") / "out", calibration, **WEIGHTS_ONLY)


def test_reforward_reaches_all_but_the_first_site(
    plain: Any, models: dict[str, Path], calibration: Text, tmp_path: Path
) -> None:
    found = solved(models["llama_biases"], tmp_path / "out", calibration, calibration__reforward=True, **WEIGHTS_ONLY)
    for name in found:
        if ".layers.0." in name:  # later blocks get other hidden states
            assert same(found[name], plain[name]) == name.endswith(FIRST), name


def test_an_asymmetric_target_needs_a_difference_between_the_streams(
    plain: Any, models: dict[str, Path], calibration: Text, tmp_path: Path
) -> None:
    """Before the first solved site both streams are one: its target is its weights, and everything after is not."""
    found = solved(
        models["llama_biases"],
        tmp_path / "out",
        calibration,
        calibration__reforward=True,
        calibration__asymmetry=1.0,
        **WEIGHTS_ONLY,
    )
    for name in found:
        if ".layers.0." in name:
            difference = (found[name].dequantize_site_order() - plain[name].dequantize_site_order()).norm()
            relative = float(difference / plain[name].dequantize_site_order().norm())
            # T = W up to fp32: now and then a weight on the middle of two levels falls on the other side.
            assert (relative < 0.02) == name.endswith(FIRST), (name, relative)


@pytest.mark.parametrize("asymmetry", [0.5, 1.0])
def test_aiming_at_the_full_precision_outputs_gets_nearer_to_them(
    models: dict[str, Path], calibration: Text, tmp_path: Path, asymmetry: float
) -> None:
    """The hidden states after the last block, which the log compares between the streams."""
    distance = {}
    for share in (0.0, asymmetry):
        recipe = bitwright.preset("bwa").with_options(
            {**support.SMALL, "calibration.reforward": True, "calibration.asymmetry": share, "weights.refine": 1}
        )
        result = bitwright.quantize(models["mistral"], tmp_path / str(share), recipe, calibration)
        distance[share] = result.log[-1]["stream_error"]
    assert distance[asymmetry] < distance[0.0]


def test_the_first_writer_has_nothing_to_make_up_for(
    plain: Any, models: dict[str, Path], calibration: Text, tmp_path: Path
) -> None:
    """Up to the first linear that writes to the stream both streams are one; the second sees what the first did."""
    options = {"calibration__reforward": True, **WEIGHTS_ONLY}
    without = solved(models["llama_biases"], tmp_path / "without", calibration, **options)
    found = solved(models["llama_biases"], tmp_path / "out", calibration, calibration__residual=1.0, **options)
    for name in found:
        if ".layers.0." in name:
            assert same(found[name], without[name]) == (not name.endswith("down_proj")), name


@pytest.mark.parametrize("model", ["mistral", "qwen2"])
def test_making_up_for_the_stream_brings_it_nearer(
    models: dict[str, Path], calibration: Text, tmp_path: Path, model: str
) -> None:
    distance = {}
    for share in (0.0, 0.5, 1.0):
        options = {**support.SMALL, "calibration.reforward": True, "calibration.residual": share, "weights.refine": 1}
        recipe = bitwright.preset("bwa").with_options(options)
        result = bitwright.quantize(models[model], tmp_path / str(share), recipe, calibration)
        distance[share] = result.log[-1]["stream_error"]
    assert distance[1.0] < distance[0.5] < distance[0.0]
