"""Bad texts, recipes and options: one line naming the thing, code 1, no traceback, nothing that looks whole.

Every case goes through the command line. Where a command writes, the output directory must not exist afterwards.
"""

from __future__ import annotations

import lzma

import pytest

import bitwright
import support
import test_bad_artifacts
import test_bad_models
from refusals import Arguments, Case, Cases, Ground, check_case

case = Cases()


# --- texts ------------------------------------------------------------------------------------------------------------


def text_case(name: str, file: str, content: bytes | None, *words: str, command: str = "quantize") -> None:
    """A case: that content as the text; None leaves the file out."""

    def prepare(ground: Ground) -> Arguments:
        path = ground.tmp / file if content is None else ground.file(file, content)
        if command == "eval":
            return ["eval", ground.models["llama"], "--text", path]
        return ground.quantize(calib=path)

    case(name, *words)(prepare)


text_case("text_missing", "t.txt", None, "t.txt does not exist")
text_case("text_empty", "t.txt", b"", "t.txt is empty")
text_case("text_blank", "t.txt", b" \n\n\t\n", "t.txt is empty")
text_case("text_binary", "t.txt", b"abc\xff\xfe\x00", "t.txt is not UTF-8 text (byte 3)")
text_case("text_xz_garbage", "t.txt.xz", b"no archive at all", "t.txt.xz is not a whole .xz file")
text_case("text_xz_cut", "t.txt.xz", lzma.compress(b"ba ren " * 999)[:-9], "t.txt.xz is not a whole .xz file")
text_case("jsonl_without_text", "t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "t.jsonl line 2", "field 'text'")
text_case("jsonl_broken", "t.jsonl", b'{"text": "a"}\n\n{"text": ', "t.jsonl line 3", "field 'text'")
text_case("jsonl_with_a_number", "t.jsonl", b'{"text": 5}\n', "t.jsonl line 1", "field 'text'")
text_case("jsonl_empty", "t.jsonl", b"\n\n", "t.jsonl is empty")
text_case("text_shorter_than_a_window", "t.txt", b"Ba ren.", "t.txt has", "one window needs 32", "calibration.length")
text_case("text_missing_eval", "t.txt", None, "t.txt does not exist", command="eval")
text_case("text_empty_eval", "t.txt", b"", "t.txt is empty", command="eval")
text_case("text_shorter_than_a_window_eval", "t.txt", b"Ba ren.", "one window needs 128", "--window", command="eval")


@case("text_is_a_directory", "is a directory; give a text file")
def _(ground: Ground) -> Arguments:
    return ground.quantize(calib=ground.tmp)


@case("text_below_a_file", "cannot read text file", "calibration.txt")
def _(ground: Ground) -> Arguments:
    return ground.quantize(calib=ground.calib / "part.txt")


@case("evaluation_text_too_short", "short.txt has", "one window needs 32")
def _(ground: Ground) -> Arguments:
    return ground.quantize(None, "--eval-text", ground.file("short.txt", "Ba."))


# --- recipes ----------------------------------------------------------------------------------------------------------


def option_case(name: str, options: list[str], *words: str) -> None:
    case(name, *words)(lambda ground: ground.quantize(None, *options))


@case("length_too_short", "length = 4 is too short")
def _(ground: Ground) -> Arguments:
    return ["plan", ground.models["llama"], "--set", "calibration.length=4"]


def recipe_case(name: str, content: str | None, *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        path = ground.tmp / "r.json" if content is None else ground.file("r.json", content)
        return ground.quantize(None, "--recipe", path)

    case(name, *words)(prepare)


option_case("preset_unknown", ["--preset", "bwaa"], "no preset 'bwaa'", ", ".join(sorted(bitwright.presets)))
option_case(
    "billm_by_column", ["--preset", "billm", "--set", "weights.feedback=column"], "method 'billm'", "'block-tri'"
)
option_case("billm_of_other_widths", ["--preset", "billm", "--set", "weights.bits=3"], "bits = 3", "bits = 2")
option_case("billm_refined", ["--preset", "billm", "--set", "weights.refine=1"], "refine needs free levels")
option_case(
    "symmetric_and_balanced",
    ["--preset", "bwa", "--set", "activations.symmetric=true"],
    "balance = 'none' with symmetric = true",
)
option_case("clip_of_free_levels", ["--set", "weights.clip=0.85"], "clip is for levels = 'uniform' alone")
option_case("clip_and_search", ["--preset", "atom", "--set", "weights.range=mse"], "clip = 0.85", "write clip = 1")
option_case("key_unknown", ["--set", "weights.outlier=0"], "no key 'weights.outlier'", "did you mean 'outliers'?")
option_case("part_unknown", ["--set", "weigths.outliers=0"], "no key 'weigths.outliers'", "did you mean 'weights'?")
option_case("key_of_a_part_that_is_off", ["--set", "kv=none", "--set", "kv.bits=8"], "kv.bits", "kv is off")
option_case("set_without_value", ["--set", "weights.outliers"], "'weights.outliers'", "key=value")
option_case("set_without_key", ["--set", "=3"], "'=3'", "key=value")
option_case("value_of_wrong_type", ["--set", "weights.group=big"], "weights.group = 'big'")
option_case("value_out_of_range", ["--set", "weights.bits=9"], "weights.bits = 9")
option_case("value_not_among_the_words", ["--set", "weights.levels=kmeans"], "weights.levels = 'kmeans'", "'dp'")
option_case("group_not_of_bytes", ["--set", "weights.group=100"], "group = 100 is not a multiple of 8")
option_case("outliers_negative", ["--outliers", "-4"], "outliers = -4 is negative")
option_case("outliers_in_words", ["--outliers", "many"], "weights.outliers", "'many'")
option_case("outliers_too_many", ["--outliers", "72"], "outliers = 72 leaves", "model.layers.0.self_attn.q_proj")
option_case("outliers_of_signs", ["--outliers=--5"], "weights.outliers", "'--5'")
option_case(
    "two_recipes", ["--preset", "bwa", "--recipe", "r.json"], "--preset bwa and --recipe r.json", "leave out one"
)
option_case(
    "an_option_and_a_set", ["--outliers", "0", "--set", "weights.outliers=16"], "weights.outliers", "leave out one"
)
option_case("sites_without_patterns", ["--set", 'sites={"bits":3}'], "sites.bits = 3", "the keys bits, group")
option_case("tuned_and_not", ["--tune", "--set", "tune=none"], "--tune asks for tune", "leave out one")
option_case("two_targets", ["--target-bits", "3", "--set", "allocate.target=3.5"], "asked to be 3.0 and, by --set, 3.5")
option_case("searched_and_tuned", ["--preset", "gbs", "--tune"], "write tune = none or search.method = 'none'")
option_case("length_over_the_context", ["--length", "129"], "calibration.length = 129", "context of 128")
option_case("method_and_levels_do_not_match", ["--set", "weights.method=rtn"], "method 'rtn'", "levels = 'uniform'")
option_case(
    "balance_without_planes", ["--preset", "bwa", "--set", "activations.bits=8"], "balance is defined for 4 planes only"
)
recipe_case("recipe_missing", None, "cannot read recipe", "r.json")
recipe_case("recipe_not_json", "weights: 2", "r.json is not valid JSON")
recipe_case("recipe_is_a_list", "[1]", "r.json holds a list")
recipe_case("recipe_key_unknown", '{"weights": {"grup": 64}}', "r.json", "'weights.grup'", "did you mean 'group'?")
recipe_case("recipe_part_unknown", '{"activation": null}', "r.json", "'activation'", "did you mean 'activations'?")
recipe_case("recipe_wrong_type", '{"calibration": {"sequences": "all"}}', "r.json", "calibration.sequences = 'all'")


# --- eval and generate ------------------------------------------------------------------------------------------------


def eval_case(name: str, options: list[str], *words: str) -> None:
    case(name, *words)(lambda ground: ["eval", ground.artifact(), "--text", ground.calib, *options])


eval_case("window_over_the_context", ["--window", "129"], "a window of 129 tokens", "context of 128")
eval_case("join_unknown", ["--join", "comma"], "--join 'comma'", "none, space, blank-line")
eval_case("dtype_unknown", ["--dtype", "int4"], "dtype 'int4'", "float32, bfloat16, float16")


def compare_case(name: str, options: list[str], *words: str) -> None:
    def prepare(ground: Ground) -> Arguments:
        files = ["--calib", ground.calib, "--text", ground.calib, "--out", ground.out]
        return ["compare", ground.models["llama"], "--methods", "rtn", *files, *options]

    case(name, *words)(prepare)


# Before a method is quantized.
compare_case("compare_window_over_the_context", ["--window", "129"], "a window of 129 tokens", "context of 128")
compare_case("compare_dtype_unknown", ["--dtype", "int4"], "dtype 'int4'", "float32, bfloat16, float16")


@case("generate_dtype_unknown", "dtype 'half'", "float32, bfloat16, float16")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact(), "Ba ren.", "--dtype", "half")


@case("prompt_empty", "the prompt is empty")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact("mistral"), "")


@case("prompt_over_the_context", "the prompt has", "context is 128")
def _(ground: Ground) -> Arguments:
    return ground.generate(ground.artifact(), "Ba ren tol mi sha kur. " * 40)


@pytest.mark.parametrize("bad", case, ids=case.names)
def test_bad_input(bad: Case, ground: Ground) -> None:
    check_case(bad, ground)


def test_there_are_enough_kinds() -> None:
    """Of all files together."""
    names = [*case.names, *test_bad_models.case.names, *test_bad_artifacts.case.names]
    assert len(names) == len(set(names))
    assert len(names) >= 40


# --- used wrongly -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "MODEL", "OUT"],
        ["quantize", "MODEL", "OUT", "--calib", "x", "--sequences", "0"],
        ["quantize", "MODEL", "OUT", "--calib", "x", "--length", "7"],
        ["eval", "MODEL"],
        ["eval", "MODEL", "--text", "x", "--windows", "none"],
        ["generate", "MODEL"],
        ["generate", "MODEL", "prompt", "--temperature", "-1"],
        ["plan", "MODEL", "--fast"],
        ["compress", "MODEL"],
    ],
)
def test_wrong_usage(arguments: list[str], ground: Ground) -> None:
    outcome = support.run_cli(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert not ground.out.exists()
