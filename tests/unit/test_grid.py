"""How `--methods` is taken apart."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError
from bitwright.recipe import PRESETS, preset
from bitwright.report.grid import choose, split_commas, split_methods

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_JSON, min_size=1, max_size=4))
def test_json_is_never_split(values: list[object]) -> None:
    assert [json.loads(part) for part in split_commas(",".join(map(json.dumps, values)))] == values


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["original,rtn", "bwa"], ["original", "rtn", "bwa"]),
        (["bwa:a=1,b=2,rtn:c=3", "wgm,"], ["bwa:a=1,b=2", "rtn:c=3", "wgm"]),
        (["bwa,a=1"], ["bwa:a=1"]),
        (['bwa:s={"x": {"b": 3, "o": 0}},kv={}, rtn'], ['bwa:s={"x": {"b": 3, "o": 0}},kv={}', "rtn"]),
    ],
)
def test_methods(words: list[str], methods: list[str]) -> None:
    assert split_methods(words) == methods


def test_an_option_needs_a_method() -> None:
    with pytest.raises(RecipeError, match="without a method"):
        split_methods(["a=1"])


def test_all_presets_with_the_common_options() -> None:
    methods, titles, unknown = choose(["presets,bwa"], {"calibration.sequences": 3}, 64)
    assert [method.label for method in methods] == ["original", *PRESETS]
    assert titles == ["Every preset"]
    assert unknown == []
    assert [method.recipe for method in methods[1:]] == [
        preset(name).with_options({"calibration.sequences": 3}) for name in PRESETS
    ]


def test_options_of_sites() -> None:
    [method], _, _ = choose(['bwa:sites={"*.mlp.*": {"bits": 3, "outliers": 0}}'], {}, 64)
    assert method.recipe == preset("bwa").with_options({"sites": {"*.mlp.*": {"bits": 3, "outliers": 0}}})
