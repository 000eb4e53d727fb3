from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BitwrightError, RecipeError
from bitwright.recipe import (
    PRESETS,
    ActivationRecipe,
    CalibrationRecipe,
    KVRecipe,
    Recipe,
    WeightRecipe,
    outlier_count,
    parse_option,
    preset,
)

from .twins import examples

weights = st.builds(
    WeightRecipe,
    bits=st.integers(1, 4),
    group=st.integers(1, 512).map(lambda n: 8 * n),
    levels=st.sampled_from(["em", "dp", "minmax", "uniform"]),
    em_iterations=st.integers(1, 1000),
    importance=st.sampled_from(["none", "hessian", "inverse", "conditional"]),
    feedback=st.sampled_from(["none", "block-diag", "block-tri", "column"]),
    feedback_outliers=st.booleans(),
    order=st.sampled_from(["ascending", "descending", "none"]),
    outliers=st.one_of(st.just("auto"), st.integers(0, 10**6)),
    damping=st.floats(1e-9, 1.0),
)
recipes = st.builds(
    Recipe,
    name=st.text(max_size=8),
    weights=weights,
    activations=st.one_of(
        st.none(),
        st.builds(ActivationRecipe, balance=st.sampled_from(["support", "literal", "none"]), clip=st.floats(0.1, 1.0)),
        st.builds(ActivationRecipe, bits=st.integers(1, 8), balance=st.just("none")),
    ),
    kv=st.one_of(st.none(), st.builds(KVRecipe, bits=st.sampled_from([4, 8]))),
    calibration=st.builds(
        CalibrationRecipe,
        sequences=st.integers(1, 10**4),
        length=st.one_of(st.just("auto"), st.integers(8, 10**5)),
        seed=st.integers(0, 10**9),
    ),
)


@given(recipes)
@examples(60)
def test_round_trip_and_canonical_bytes(recipe: Recipe) -> None:
    text = recipe.to_json()
    again = Recipe.from_dict(json.loads(text))
    assert again == recipe
    assert again.to_json() == text
    assert recipe.to_dict() == json.loads(text)
    # Keys in another order, numbers written otherwise: the same bytes.
    shuffled = json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    if shuffled["weights"]["damping"] == 1.0:
        shuffled["weights"]["damping"] = 1
    assert Recipe.from_dict(shuffled).to_json() == text
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text


def test_whole_numbers_where_fractions_are_expected_are_the_same_recipe() -> None:
    texts = {Recipe.from_dict({"weights": {"damping": one}}).to_json() for one in (1, 1.0)}
    assert len(texts) == 1


def test_options_that_came_later_are_left_out_where_they_change_nothing() -> None:
    """So that older versions read an artifact whose bytes they understand."""
    data = preset("bwa").to_dict()
    assert not {"clip", "rows_a_scale", "scale"} & data["weights"].keys()
    assert "quantizers" not in data["calibration"]
    assert "symmetric" not in data["activations"]
    assert "outer" not in data
    data = preset("atom").to_dict()
    assert (data["weights"]["clip"], data["activations"]["symmetric"]) == (0.85, True)
    assert Recipe.from_dict(data) == preset("atom")


def test_recipes_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        preset("bwa").weights.bits = 3  # type: ignore[misc]
    assert hash(preset("bwa")) == hash(Recipe())
    with pytest.raises(AttributeError):
        preset("bitwright").allocate.bits.append(1)  # type: ignore[union-attr]


def test_presets() -> None:
    assert preset("bwa") == Recipe()
    bwa, rtn = preset("bwa").weights, preset("rtn").weights
    assert (bwa.method, bwa.bits, bwa.group, bwa.levels, bwa.feedback) == ("bwa", 2, 128, "em", "block-diag")
    assert (bwa.feedback_outliers, bwa.order, bwa.importance, bwa.outliers) == (
        True,
        "ascending",
        "conditional",
        "auto",
    )
    assert (rtn.method, rtn.levels, rtn.feedback, rtn.importance) == ("rtn", "uniform", "none", "none")
    wgm = preset("wgm")
    assert (wgm.weights.method, wgm.weights.bits, wgm.weights.levels, wgm.weights.window) == ("wgm", 6, "windowed", 512)
    assert (wgm.weights.outliers, wgm.weights.order, wgm.weights.penalty) == (0, "none", 0.75)
    assert wgm.activations is wgm.kv is None
    assert [preset(name).weights.kind for name in ("bwa", "rtn", "wgm")] == ["free", "uniform", "shared"]
    quarot = preset("quarot")
    assert (quarot.weights.bits, quarot.weights.kind, quarot.weights.feedback) == (4, "uniform", "column")
    assert (quarot.transform.rotation, quarot.kv) == ("quarot", KVRecipe(bits=4, hadamard=True))
    assert quarot.activations == ActivationRecipe(balance="none", clip=0.9)
    assert preset("rtn").activations == preset("bwa").activations == ActivationRecipe()
    gbs = preset("gbs")
    assert (gbs.weights.bits, gbs.weights.range, gbs.transform.expansion) == (3, "mse", "hadamard")
    assert (gbs.activations, gbs.kv) == (ActivationRecipe(bits=3, balance="none"), KVRecipe(bits=3, hadamard=True))
    assert (gbs.search.method, gbs.search.objective, gbs.search.iterations, gbs.search.share) == (
        "gbs",
        "perplexity",
        10,
        0.1,
    )
    gptq = preset("gptq")
    assert (gptq.weights.bits, gptq.weights.feedback, gptq.weights.kind) == (4, "column", "uniform")
    assert gptq.with_options({"weights.symmetric": True}).weights.kind == "symmetric"
    assert (gptq.weights.outliers, gptq.weights.order, gptq.activations, gptq.kv) == (0, "none", None, None)
    billm = preset("billm")
    assert (billm.weights.method, billm.weights.bits, billm.weights.kind) == ("billm", 2, "salient")
    assert (billm.weights.feedback, billm.weights.importance) == ("block-diag", "conditional")
    assert (billm.weights.outliers, billm.weights.order, billm.activations, billm.kv) == (0, "none", None, None)
    atom = preset("atom")
    assert (atom.weights.method, atom.weights.bits, atom.weights.kind, atom.weights.clip) == (
        "gptq",
        4,
        "symmetric",
        0.85,
    )
    assert (atom.weights.outliers, atom.weights.order, atom.kv) == ("auto", "ascending", KVRecipe())
    assert atom.activations == ActivationRecipe(balance="none", clip=0.9, symmetric=True)
    assert (gptq.weights.group_of(200), WeightRecipe(group=0).group_of(203)) == (128, 208)
    for name, recipe in PRESETS.items():
        assert recipe.name == name
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match=r"no preset 'awq'; the presets are atom, billm, bitwright, bwa, .*rtn, wgm"):
        preset("awq")


WGM, QUAROT = preset("wgm").to_dict(), preset("quarot").to_dict()
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # what is asked for, the key that the message has to name, the cure that it has to offer
    ({"wieghts": {}}, "'wieghts'", "did you mean 'weights'?"),
    ({"zzz": 1}, "'zzz'", "the keys there are name, weights, transform, activations, kv, calibration"),
    ({"weights": {"outlier": 3}}, "'weights.outlier'", "did you mean 'outliers'?"),
    ({"weights": {"zzz": 3}}, "'weights.zzz'", "the keys there are method, bits, group, levels"),
    ({"kv": {"bit": 4}}, "'kv.bit'", "did you mean 'bits'?"),
    ({"activations": {"balanc": "none"}}, "'activations.balanc'", "did you mean 'balance'?"),
    ({"calibration": {"sequence": 1}}, "'calibration.sequence'", "did you mean 'sequences'?"),
    ({"weights": {"bits": "2"}}, "weights.bits = '2'", "valid integer"),
    ({"weights": {"bits": True}}, "weights.bits = True", "valid integer"),
    ({"weights": {"bits": 2.0}}, "weights.bits = 2.0", "valid integer"),
    (
        {"weights": {"bits": 5}},
        "bits = 5 is for method 'wgm' and levels = 'uniform' alone",
        "write a number from 1 to 4",
    ),
    ({"weights": {"bits": 9}}, "weights.bits = 9", "less than or equal to 8"),
    ({"weights": {"levels": "greedy"}}, "levels = 'greedy' is for method 'wgm' alone", "write levels = 'em' or 'dp'"),
    ({"weights": {"method": "wgm"}}, "method 'wgm'", "write levels = 'windowed', 'greedy' or 'dp' and feedback"),
    (
        {"weights": {"method": "wgm", "levels": "dp", "feedback": "column"}},
        "feedback = 'column'",
        "and feedback = 'none'",
    ),
    ({"weights": {"window": 0}}, "weights.window = 0", "greater than or equal to 1"),
    ({"weights": {"penalty": -0.1}}, "weights.penalty = -0.1", "greater than or equal to 0"),
    ({"weights": {"penalty": float("inf")}}, "weights.penalty = inf", "finite number"),
    ({"weights": {"bits": 0}}, "weights.bits = 0", "greater than or equal to 1"),
    (
        {"weights": {"levels": "kmeans"}},
        "weights.levels = 'kmeans'",
        "'em', 'dp', 'minmax', 'uniform', 'windowed', 'greedy' or 'split'",
    ),
    ({"weights": {"feedback": None}}, "weights.feedback = None", "'none', 'block-diag', 'block-tri' or 'column'"),
    ({"weights": {"group": 12}}, "group = 12 is not a multiple of 8", "write for example 64 or 128"),
    ({"weights": {"group": 4}}, "group = 4 is not a multiple of 8", "or 0 for a whole row"),
    ({"weights": {"group": -8}}, "weights.group = -8", "greater than or equal to 0"),
    ({"weights": {"method": "gptq"}}, "method 'gptq' has no levels = 'em'", "feedback = 'column'"),
    ({"weights": {"symmetric": True}}, "symmetric is for levels = 'uniform' alone", "leave it out with levels = 'em'"),
    ({"weights": {"range": "mse"}}, "range is for levels = 'uniform' alone", "leave it out with levels = 'em'"),
    ({"weights": {"clip": 0.9}}, "clip is for levels = 'uniform' alone", "leave it out with levels = 'em'"),
    ({"weights": {"clip": 0}}, "weights.clip = 0", "greater than 0"),
    ({"weights": {"scale": "max"}}, "scale = 'max' is for levels = 'uniform'", "write scale = 'span'"),
    (
        {"weights": {"levels": "uniform", "symmetric": True, "scale": "max", "bits": 1}},
        "with symmetric = true and 2 bits or more",
        "write scale = 'span'",
    ),
    ({"calibration": {"quantizers": "no"}}, "calibration.quantizers = 'no'", "valid boolean"),
    ({"weights": {"rows_a_scale": 3}}, "weights.rows_a_scale = 3", "less than or equal to 2"),
    ({"weights": {"rows_a_scale": 2}}, "rows_a_scale = 2 is for levels = 'uniform' with symmetric", "rows_a_scale = 1"),
    (
        {"weights": {"levels": "uniform", "rows_a_scale": 2}},
        "rows_a_scale = 2 is for levels = 'uniform' with symmetric = true",
        "write rows_a_scale = 1",
    ),
    (
        {"weights": {"levels": "uniform", "symmetric": True, "rows_a_scale": 2}, "tune": {}},
        "tune moves the scale of each row",
        "write tune = none or weights.rows_a_scale = 1",
    ),
    (
        {"weights": {"method": "rtn", "levels": "uniform", "feedback": "none", "clip": 0.9, "range": "mse"}},
        "clip = 0.9 is what range = 'mse' searches for",
        "write clip = 1",
    ),
    ({"weights": {"levels": "split"}}, "levels = 'split' is for method 'billm' alone", "write levels = 'em' or 'dp'"),
    ({"weights": {"method": "billm"}}, "method 'billm' has no levels = 'em'", "write levels = 'split', bits = 2"),
    (
        {"weights": {"method": "billm", "levels": "split", "feedback": "column"}},
        "feedback = 'column'",
        "feedback = 'block-diag', 'block-tri' or 'none'",
    ),
    ({"activations": {"symmetric": True}}, "balance is for codes with a zero point", "write balance = 'none'"),
    ({"weights": {"outliers": -1}}, "outliers = -1 is negative", "write 'auto', 0 or a positive number"),
    ({"weights": {"outliers": "some"}}, "weights.outliers = 'some'", "'auto' or"),
    ({"weights": {"outliers": "some"}}, "weights.outliers = 'some'", "valid integer"),
    ({"weights": {"outliers": 1.5}}, "weights.outliers = 1.5", "valid integer"),
    ({"weights": {"damping": float("nan")}}, "weights.damping = nan", "less than or equal to 1"),
    ({"weights": {"damping": 0}}, "weights.damping = 0", "greater than 0"),
    ({"weights": {"method": "rtn"}}, "method 'rtn'", "write levels = 'uniform' and feedback = 'none'"),
    (
        {"weights": {"method": "rtn", "levels": "uniform", "feedback": "column"}},
        "feedback = 'column'",
        "write levels = 'uniform' and feedback = 'none'",
    ),
    ({"weights": 5}, "weights = 5", "an object with the keys method, bits, group"),
    ({"weights": None}, "weights = None", "an object with the keys method, bits, group"),
    ({"kv": 4}, "kv = 4", "an object with the keys bits"),
    ({"activations": {"bits": 8}}, "activations: balance", "write balance = 'none' with bits = 8"),
    ({"activations": {"bits": 3}}, "activations: balance", "write balance = 'none' with bits = 3"),
    ({"activations": {"bits": 0, "balance": "none"}}, "activations.bits = 0", "greater than or equal to 1"),
    ({"activations": {"bits": 1, "balance": "none", "symmetric": True}}, "activations: one bit", "symmetric = false"),
    ({"activations": {"bits": 9, "balance": "none"}}, "activations.bits = 9", "less than or equal to 8"),
    ({"activations": {"clip": 0}}, "activations.clip = 0", "greater than 0"),
    ({"kv": {"bits": 1}}, "kv.bits = 1", "greater than or equal to 2"),
    ({"allocate": {"target": "2,5"}}, "allocate.target = '2,5'", "a valid number"),
    ({"allocate": {"bits": [9]}}, "allocate.bits.0 = 9", "less than or equal to 8"),
    ({"allocate": {"groups": []}}, "allocate.groups = []", "at least 1 item"),
    ({"calibration": {"length": 4}}, "length = 4 is too short", "write 8 or more"),
    ({"calibration": {"length": "x"}}, "calibration.length = 'x'", "'auto' or"),
    ({"calibration": {"sequences": 0}}, "calibration.sequences = 0", "greater than or equal to 1"),
    ({"name": 3}, "name = 3", "valid string"),
    ({"sites": {"*.q": {"bits": 5}}}, "sites '*.q': bits = 5", "from 1 to 4"),
    ({"sites": {"*.q": {"levels": "em"}}}, "sites.*.q.levels", "the keys there are bits, group, outliers"),
    ({"sites": {"*.q": {"group": 20}}}, "sites '*.q': group = 20", "64 or 128"),
    ({"allocate": {"target": 0}}, "allocate: target = 0", "2.5, or 'auto'"),
    ({"allocate": {"bits": []}}, "allocate.bits = ()", "at least 1 item"),
    ({"allocate": {"bits": [2, 5]}}, "allocate: bits = 5", "from 1 to 4"),
    ({"allocate": {"bits": {}}}, "allocate.bits = {}", "valid tuple"),
    (WGM | {"allocate": {}}, "method 'wgm'", "allocate = none"),
    (QUAROT | {"allocate": {"outliers": [16]}}, "allocate: transform.rotation", "outliers = 0"),
    (QUAROT | {"sites": {"*": {"outliers": 16}}}, "sites '*': transform.rotation", "outliers = 0"),
]


@pytest.mark.parametrize(("data", "key", "cure"), REFUSED)
def test_errors_say_key_and_cure(data: dict[str, Any], key: str, cure: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data, "my.json")
    message = str(caught.value)
    assert message.startswith("my.json: ")
    assert key in message
    assert cure in message
    assert "\n" not in message
    assert isinstance(caught.value, BitwrightError)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("base", PRESETS)
def test_what_makes_one_preset_of_another(name: str, base: str) -> None:
    changes = preset(name).changed_from(preset(base))
    assert preset(base).with_options({**changes, "name": name}) == preset(name)
    assert bool(changes) == (name != base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bitwright", {"allocate": None}),
        ("bitwright", {"calibration.residual": 0.0, "weights.damping_over": "all"}),
        ("bitwright", {"tune": {"steps": 8}, "allocate.target": 2.5, "kv": None}),
        ("bwa", {"tune": {}, "sites": {"*.mlp.*": {"bits": 3, "group": None, "outliers": None}}}),
        ("atom", {"weights.clip": 1.0}),
        ("atom", {"weights.rows_a_scale": 2}),
        ("quarot", {"weights.symmetric": True, "weights.scale": "max", "calibration.quantizers": False}),
    ],
)
def test_changes_are_the_options(name: str, options: dict[str, Any]) -> None:
    assert preset(name).with_options(options).changed_from(preset(name)) == options


def test_a_later_option_reaches_into_an_earlier_one() -> None:
    made = preset("bwa").with_options({"tune": {"steps": 8}, "tune.batch": 2, "allocate": {}, "allocate.bits": 3})
    assert made.tune is not None
    assert (made.tune.steps, made.tune.batch, made.tune.interval) == (8, 2, 8)
    assert made.allocate is not None
    assert made.allocate.bits == (3,)


def test_options_replace_keys() -> None:
    recipe = preset("bwa").with_options({"weights.outliers": 0, "kv": None, "activations.clip": 0.9, "name": "mine"})
    assert (recipe.weights.outliers, recipe.kv, recipe.name) == (0, None, "mine")
    assert recipe.activations == ActivationRecipe(clip=0.9)
    assert recipe.weights.model_copy(update={"outliers": "auto"}) == preset("bwa").weights
    assert preset("bwa") == Recipe()  # a copy
    assert recipe.with_options({"kv": {"bits": 8}}).kv == KVRecipe(bits=8)
    assert recipe.with_options({}) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights.outlier": 3}, "no key 'weights.outlier'; did you mean 'outliers'?"),
        ({"wieghts.outliers": 3}, "no key 'wieghts.outliers'; did you mean 'weights'?"),
        ({"weights.outliers.x": 3}, "no key 'weights.outliers.x'"),
        ({"zzz.x": 3}, "no key 'zzz.x'; the keys there are name, weights, transform, activations, kv, calibration"),
        ({"": 3}, "no key ''"),
        ({"weights.bits": 9}, "weights.bits = 9: input should be less than or equal to 8"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        preset("bwa").with_options(options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("part", "option", "value"), [("kv", "bits", 8), ("activations", "clip", 0.9)])
def test_options_of_a_part_that_is_off(part: str, option: str, value: Any) -> None:
    off = preset("bwa").with_options({part: None})
    with pytest.raises(RecipeError, match=f"{part}.{option} has no effect because {part} is off") as caught:
        off.with_options({f"{part}.{option}": value})
    # The cure is an option that works.
    cure = f'{part}={{"{option}": {json.dumps(value)}}}'
    assert cure in str(caught.value)
    key, parsed = parse_option(cure)
    assert getattr(getattr(off.with_options({key: parsed}), part), option) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights.outliers=0", ("weights.outliers", 0)),
        ("weights.outliers=auto", ("weights.outliers", "auto")),
        ("weights.feedback=none", ("weights.feedback", "none")),
        ("weights.damping=1e-2", ("weights.damping", 0.01)),
        ("weights.feedback_outliers=false", ("weights.feedback_outliers", False)),
        ("kv=none", ("kv", None)),
        ("kv=off", ("kv", None)),
        ("kv=null", ("kv", None)),
        (" activations = none ", ("activations", None)),
        (" weights.order = none ", ("weights.order", "none")),
        ('kv={"bits": 8}', ("kv", {"bits": 8})),
        ('name="7"', ("name", "7")),
        ("name=a=b", ("name", "a=b")),
        ("name=", ("name", "")),
    ],
)
def test_parse_option(text: str, expected: tuple[str, Any]) -> None:
    found = parse_option(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


@pytest.mark.parametrize("text", ["weights.outliers", "=3", " = 3", ""])
def test_parse_option_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not of the form key=value, for example weights\.outliers=0"):
        parse_option(text)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"name": "mine", "weights": {"levels": "dp"}, "kv": null}')
    recipe = Recipe.from_file(path)
    assert recipe == Recipe(name="mine", weights=WeightRecipe(levels="dp"), kv=None)
    assert Recipe.from_file(str(path)) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read recipe .*recipe\.json: No such file"),
        (b"{", r"recipe .*recipe\.json is not valid JSON: .*line 1"),
        (b"\xff\xfe", r"recipe .*recipe\.json is not valid JSON"),
        (b"[1]", r"recipe .*recipe\.json holds a list; a JSON object was expected"),
        (b"null", r"recipe .*recipe\.json holds a NoneType; a JSON object was expected"),
        (b'{"weihgts": {}}', r"recipe\.json: there is no key 'weihgts'; did you mean 'weights'\?"),
    ],
)
def test_recipe_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(path)


def test_a_directory_is_no_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: Is a directory"):
        Recipe.from_file(tmp_path)


@pytest.mark.parametrize(
    ("columns", "expected"), [(64, 16), (172, 16), (256, 16), (4096, 128), (5632, 176), (11008, 352), (16, 8), (1, 0)]
)
def test_outlier_rule(columns: int, expected: int) -> None:
    assert outlier_count(columns, "auto") == expected


@given(st.integers(1, 100_000))
@examples(60)
def test_outlier_rule_leaves_half(columns: int) -> None:
    count = outlier_count(columns, "auto")
    assert 0 <= count <= columns // 2
    if columns >= 32:
        assert count % 16 == 0
        assert abs(count - columns / 32) <= 16


def test_outliers_by_number() -> None:
    assert outlier_count(64, 0) == 0
    assert outlier_count(64, 63) == 63
    for asked in (64, 1000):
        with pytest.raises(RecipeError, match=rf"outliers = {asked} leaves .* 64 inputs; write a number below 64"):
            outlier_count(64, asked)
