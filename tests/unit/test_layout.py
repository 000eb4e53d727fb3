from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bitwright.artifact.layout import (
    FORMAT_VERSION,
    LayerSpec,
    check_version,
    counted,
    layer_shapes,
    permutation_dtype,
    requirements,
    shard_name,
)
from bitwright.codebook import matrix_shapes
from bitwright.errors import ArtifactError
from bitwright.transforms import SiteHadamard

SPEC = LayerSpec(rows=6, columns=40, bits=2, group=16, kind="free", outliers=8, bias=True, permutation="a.q_proj")


def test_shard_names() -> None:
    assert shard_name(0, 3) == "model-00001-of-00003.safetensors"
    assert shard_name(2, 3) == "model-00003-of-00003.safetensors"


def test_spec_round_trip_ignores_notes_of_newer_versions() -> None:
    assert LayerSpec.from_dict("x", SPEC.to_dict() | {"note": 1}) == SPEC
    assert SPEC.weights == 240


@pytest.mark.parametrize("key", sorted(SPEC.to_dict()))
def test_missing_keys_are_named(key: str) -> None:
    data = {k: v for k, v in SPEC.to_dict().items() if k != key}
    with pytest.raises(ArtifactError, match=rf"layer a\.q_proj without {key}; the artifact is damaged"):
        LayerSpec.from_dict("a.q_proj", data)


def test_a_transform_is_named_where_there_is_one() -> None:
    turned = dataclasses.replace(SPEC, hadamard=12, stride=2)
    assert SPEC.to_dict().keys() | {"hadamard", "stride"} == turned.to_dict().keys()
    assert LayerSpec.from_dict("x", turned.to_dict()) == turned
    assert SPEC.transform is None
    assert turned.transform == SiteHadamard(12, 2, 32)
    assert requirements([SPEC, SPEC]) == []
    assert requirements([SPEC, turned]) == ["hadamard"]
    salient = dataclasses.replace(SPEC, kind="salient")
    assert requirements([SPEC, salient], outer=True, symmetric_inputs=True) == ["outer", "salient", "symmetric_inputs"]
    with pytest.raises(ArtifactError, match="layer x has a Hadamard transform of size 14, which has no matrix"):
        LayerSpec.from_dict("x", turned.to_dict() | {"hadamard": 14})


@pytest.mark.parametrize("feature", ["hadamard", "salient", "symmetric_inputs"])
def test_a_reader_that_does_not_know_a_feature_refuses(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"format_version": FORMAT_VERSION, "requires": [feature]}
    check_version(config)
    monkeypatch.setattr("bitwright.artifact.layout.KNOWN_REQUIREMENTS", frozenset())
    with pytest.raises(ArtifactError, match=f"format feature '{feature}', which this bitwright does not know"):
        check_version(config)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ArtifactError, match="kind 'trellis'; this version reads free, uniform"):
        LayerSpec.from_dict("x", SPEC.to_dict() | {"kind": "trellis"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows = 0; expected a number from 1 on"),
        ({"columns": "40"}, "columns = '40'"),
        ({"bits": True}, "bits = True"),
        ({"group": 16.0}, r"group = 16\.0"),
        ({"outliers": -1}, "outliers = -1; expected a number from 0 on"),
        ({"outliers": 40}, "outliers = 40 of 40 columns"),
        ({"permutation": 3}, "permutation = 3"),
    ],
)
def test_absurd_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"layer x.*{message}"):
        LayerSpec.from_dict("x", SPEC.to_dict() | change)


def test_a_layer_that_is_no_object_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"layer x by 7; the artifact is damaged"):
        LayerSpec.from_dict("x", 7)  # type: ignore[arg-type]


def test_shapes_of_a_layer() -> None:
    shapes = layer_shapes("a.q_proj", SPEC, torch.bfloat16)
    matrix = {f"a.q_proj.{part}": shape for part, shape in matrix_shapes(6, 40, 2, 16, "free", 8).items()}
    assert shapes == matrix | {
        "a.q_proj.weight": (torch.bfloat16, (0,)),
        "a.q_proj.permutation": (torch.uint16, (40,)),
        "a.q_proj.bias": (torch.bfloat16, (6,)),
    }
    shared = matrix_shapes(6, 40, 3, 16, "shared", 8)
    assert shared.pop("table") == (torch.float32, (8,))
    assert shared.keys() == {"codes", "outliers", "outlier_scales"}
    # A follower of the same site stores no permutation of its own.
    assert "a.k_proj.permutation" not in layer_shapes("a.k_proj", SPEC, torch.bfloat16)
    assert [name for name in shapes if not counted(name)] == ["a.q_proj.weight", "a.q_proj.bias"]


@pytest.mark.parametrize(("columns", "dtype"), [(1, torch.uint16), (65536, torch.uint16), (65537, torch.int32)])
def test_permutations_fit_their_dtype(columns: int, dtype: torch.dtype) -> None:
    assert permutation_dtype(columns) == dtype
    last = torch.tensor([columns - 1]).to(dtype).to(torch.int64)
    assert int(last) == columns - 1


def test_current_version_is_read() -> None:
    check_version({"format_version": FORMAT_VERSION})
    check_version({"format_version": FORMAT_VERSION, "requires": []})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "format_version None; expected a number from 1 on"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"format_version": 0}, "format_version 0"),
        ({"format_version": FORMAT_VERSION + 1}, f"format version {FORMAT_VERSION + 1}.*upgrade bitwright"),
        ({"format_version": 1, "requires": ["rotation"]}, "format feature 'rotation'.*upgrade bitwright"),
    ],
)
def test_other_versions_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_version(config)
