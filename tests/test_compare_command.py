"""`bitwright compare`: what it measures is what the single commands measure, and nothing is done twice."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright.recipe import parse_option

METHODS = ("--methods", "original,rtn,bwa:weights.feedback=column,weights.levels=dp", "--methods", "wgm")
QUICK = ("--sequences", "3", "--length", "48", "--window", "48", "--windows", "4", "--threads", "2")


@pytest.fixture(scope="module")
def more_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "more.txt"
    path.write_text(support.words(1500, 13))
    return path


@pytest.fixture(scope="module")
def command(models: dict[str, Path], calibration_file: Path, evaluation_file: Path) -> Callable[..., list[Any]]:
    """command(out, *more) -> arguments of a small comparison on one text."""

    def make(out: Path, *more: str | Path, methods: tuple[str, ...] = METHODS) -> list[Any]:
        files = ["--calib", calibration_file, "--text", evaluation_file, "--out", out]
        return ["compare", models["llama"], *methods, *files, *QUICK, *more]

    return make


@pytest.fixture(scope="module")
def comparison(command: Callable[..., list[Any]], more_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of four methods on two texts. Do not write to it."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    outcome = support.run_cli(*command(out, "--text", more_file))
    assert outcome.code == 0, outcome.err
    return out


def results_of(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_figures_are_those_of_plan_quantize_and_eval(
    comparison: Path,
    models: dict[str, Path],
    calibration_file: Path,
    evaluation_file: Path,
    more_file: Path,
    tmp_path: Path,
) -> None:
    rows = {row["label"]: row for row in results_of(comparison)["methods"]}
    assert list(rows) == ["original", "rtn", "bwa weights.feedback=column weights.levels=dp", "wgm"]
    options = ["--preset", "bwa", "--set", "weights.feedback=column", "--set", "weights.levels=dp"]
    small = ["--set", "calibration.sequences=3", "--set", "calibration.length=48"]
    quantized = tmp_path / "by-hand"
    support.run_cli("quantize", models["llama"], quantized, "--calib", calibration_file, *options, *small)
    measured = ("--window", "48", "--windows", "4", "--json")
    for label, path in (("original", models["llama"]), ("bwa weights.feedback=column weights.levels=dp", quantized)):
        for found, text in zip(rows[label]["measured"], (evaluation_file, more_file), strict=True):
            alone = support.run_cli("eval", path, "--text", text, *measured).json
            assert {key: found[key] for key in alone} == alone
    planned = support.run_cli("plan", models["llama"], *options, "--json").json
    row = rows["bwa weights.feedback=column weights.levels=dp"]
    assert (row["linear_bits"], row["model_bits"]) == (planned["linear_bits"], planned["model_bits"])
    manifest = json.loads((quantized / "bitwright_manifest.json").read_text())
    assert row["layers"] == manifest["layers"]
    assert rows["original"]["linear_bits"] == 32
    for row in rows.values():
        for number, found in enumerate(row["measured"]):
            before = rows["original"]["measured"][number]["perplexity"]
            assert found["excess"] == pytest.approx(math.log(found["perplexity"] / before), abs=1e-9)


def test_the_three_files_and_the_table_say_the_same(comparison: Path, command: Any, more_file: Path) -> None:
    results = results_of(comparison)
    lines = list(csv.DictReader((comparison / "results.csv").open()))
    page = (comparison / "report.html").read_text()
    outcome = support.run_cli(*command(comparison, "--text", more_file))
    assert len(lines) == 8
    for index, line in enumerate(lines):
        row, found = results["methods"][index // 2], results["methods"][index // 2]["measured"][index % 2]
        assert (line["label"], line["text"], line["protocol"]) == (row["label"], found["text"], found["protocol"])
        assert float(line["perplexity"]) == found["perplexity"]
        for place in (page, outcome.out):
            assert f"{found['perplexity']:.3f}" in place
            assert f"{row['linear_bits']:.4f}" in place
    assert results["methods"][3]["claimed_bits"] < 2 < results["methods"][3]["linear_bits"]
    assert "claimed bits" in outcome.out
    assert not any((comparison / "artifacts").iterdir())


def test_what_is_done_is_not_done_again_and_a_new_text_is_measured_alone(
    comparison: Path, command: Any, more_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert support.run_cli(*command(out)).code == 0
    first = support.tree(out / "methods")
    again = support.run_cli(*command(out))
    assert again.err.count("already measured") == 4
    assert "block" not in again.err
    assert support.tree(out / "methods") == first
    before = {path.name: json.loads(path.read_text()) for path in (out / "methods").iterdir()}
    assert support.run_cli(*command(out, "--text", more_file, "--keep-artifacts")).code == 0
    for path in (out / "methods").iterdir():
        record, old = json.loads(path.read_text()), before[path.name]
        assert len(record["texts"]) == 2
        assert old["texts"].items() <= record["texts"].items()
        assert record["seconds"] == old["seconds"]
    kept = sorted(path.name for path in (out / "artifacts").iterdir() if path.is_dir())
    assert len(kept) == 3
    for name in kept:
        assert support.run_cli("verify", out / "artifacts" / name).code == 0
    # Later calls leave what was kept, and make what is missing again.
    assert support.run_cli(*command(out)).err.count("already measured") == 4
    assert sorted(path.name for path in (out / "artifacts").iterdir() if path.is_dir()) == kept
    whole = support.tree(out / "artifacts" / kept[0])
    shutil.rmtree(out / "artifacts" / kept[0])
    records = support.tree(out / "methods")
    again = support.run_cli(*command(out, "--text", more_file, "--keep-artifacts"))
    assert again.err.count("already measured") == 3
    assert support.tree(out / "artifacts" / kept[0]) == whole
    assert support.tree(out / "methods") == records
    expected = [row["measured"] for row in results_of(comparison)["methods"]]
    for row, other in zip(results_of(out)["methods"], expected, strict=True):
        assert [m["loss"] for m in row["measured"]] == [m["loss"] for m in other]


def test_killed_at_random_moments_it_goes_on(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    files = ["--calib", calibration_file, "--text", evaluation_file, "--out", out]
    # One thread: a fork would cut off the pool of the kernels.
    argv = ["compare", models["llama_sharded"], "--methods", "original,rtn", *files, *QUICK[:-1], "1"]
    asked = {"argv": [str(word) for word in argv], "out": str(out), "mode": "compare", "seed": 5, "kills": 3}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 3
    assert max(found["finished"]) >= 1, "no kill came after a method was finished"


def test_grids_of_the_paper(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path
) -> None:
    grids = "paper-table1,paper-table4,paper-table5,paper-table9,awq"
    files = ["--calib", calibration_file, "--text", evaluation_file, "--out", tmp_path / "out"]
    tiny = ("--sequences", "1", "--length", "32", "--window", "48", "--windows", "1")
    argv = ["compare", models["llama"], "--methods", grids, *files, *tiny]
    refused = support.run_cli(*argv)
    assert refused.code == 1
    assert "'awq'" in refused.message
    assert "--skip-unknown" in refused.message
    assert not (tmp_path / "out").exists()
    outcome = support.run_cli(*argv, "--skip-unknown")
    assert outcome.code == 0, outcome.err
    results = results_of(tmp_path / "out")
    assert results["skipped"] == ["awq"]
    assert len(results["titles"]) == 4
    labels = [row["label"] for row in results["methods"]]
    assert labels.count("original") == 1
    bits = {
        row["label"]: (row["recipe"]["weights"]["bits"], row["recipe"]["activations"]) for row in results["methods"][1:]
    }
    for method in ("QuaRot", "Atom"):
        assert [bits[f"{method} W{width}A4"][0] for width in (4, 2)] == [4, 2]
    for label in ("RTN W2A4", "GPTQ W2A4", "BiLLM W(1+1)A4"):
        assert (bits[label][0], bits[label][1]["bits"], bits[label][1]["balance"]) == (2, 4, "none")
    assert bits["BiLLM W(1+1)A16"] == (2, None)
    by_label = {row["label"]: row for row in results["methods"]}
    assert 1 < by_label["BiLLM W(1+1)A16"]["claimed_bits"] < 2 < by_label["BiLLM W(1+1)A16"]["linear_bits"]
    assert bits["BWA W(1+1)A(1x4)"][1]["balance"] == "support"
    rows = {row["label"]: row for row in results["methods"]}
    # The narrowest layer has 72 inputs.
    assert [label for label in labels if "int8 channels" in label] == [f"{n} int8 channels" for n in (0, 16, 32)]
    assert rows["0 int8 channels"]["outliers"] == [0, 0]
    assert rows["32 int8 channels"]["outliers"] == [32, 32]
    # The rungs are those that docs/recipe.md lists.
    listed = (support.REPO / "docs" / "recipe.md").read_text().split("## The ablation ladder")[1].split("\n## ")[0]
    rungs = re.findall(r"^\| ([^|]+) \| (?:`([^`]+)`|\(the preset\)) \|$", listed, re.MULTILINE)
    assert len(rungs) == 6
    common = {"calibration.sequences": 1, "calibration.length": 32}
    for label, options in rungs:
        recipe = bitwright.preset("bwa").with_options(common | dict(map(parse_option, options.split())))
        found = rows.get(label) or rows[f"{label} (preset bwa)"]
        assert found["recipe"] == recipe.to_dict(), label


def test_comparisons_that_cannot_be(
    comparison: Path, command: Any, models: dict[str, Path], evaluation_file: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"

    def refused(*words: str | Path, out: Path = fresh, methods: tuple[str, ...] = METHODS) -> str:
        outcome = support.run_cli(*command(out, *words, methods=methods))
        assert outcome.code == 1, outcome.out
        assert not fresh.exists()
        return outcome.message

    def of(methods: str) -> str:
        return refused(methods=("--methods", methods))

    assert "no preset or grid 'bwq'" in of("original,bwq")
    assert "bwa" in of("bwq")
    for behind_a_grid in ("paper-table1:weights.bits=3", "original,presets,weights.bits=3", "presets:"):
        assert "is a grid, a list of methods" in of(behind_a_grid)
    assert "presets is a grid" in refused("--skip-unknown", methods=("--methods", "presets:weights.bits=3"))
    assert "did you mean 'feedback'" in of("bwa:weights.fedback=column")
    assert "bwa:weights.levels=dp" in of("weights.levels=dp")
    assert "original has no options" in of("original:weights.bits=1")
    assert "outliers = 72 leaves" in of("bwa:weights.outliers=72")
    assert "bwa:weights.outliers=72" in of("bwa:weights.outliers=72")
    assert "no method" in refused("--skip-unknown", methods=("--methods", "bwq"))
    assert "same text twice" in refused("--text", evaluation_file)
    assert "does not exist" in refused("--text", tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("ba ren")
    assert "short.txt has" in refused("--text", tmp_path / "short.txt")
    short: list[str | Path] = ["--calib", tmp_path / "short.txt", "--text", evaluation_file, "--out", fresh]
    outcome = support.run_cli("compare", models["llama"], "--methods", "original,rtn,bwa", *short, *QUICK)
    assert outcome.code == 1
    assert re.match("method 'rtn': short.txt has .* tokens and one window needs 48.*--length", outcome.message)
    assert outcome.err.count("\n") == 1, "work was done before"
    assert not fresh.exists()
    assert "--join" in refused("--join", "tab")
    other = support.run_cli(*command(comparison), "--calib", evaluation_file)
    assert other.code == 1
    assert "differs in calibration" in other.message
    assert "is no comparison and holds" in refused(out=models["llama"])
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(out=tmp_path / "file")


def test_what_fails_does_not_cost_the_others(comparison: Path, command: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert support.run_cli(*command(out, methods=("--methods", "original"))).code == 0
    keys = {row["label"]: row["key"] for row in results_of(comparison)["methods"]}
    in_the_way = out / "artifacts" / f"{keys['wgm']}.run"
    in_the_way.mkdir()
    (in_the_way / "mine.txt").write_text("")
    # Where not even the failure can be written down, the command ends, as by a kill.
    unwritable = out / "methods" / f"{keys['rtn']}.json.tmp"
    unwritable.mkdir()

    def texts() -> tuple[str, list[dict[str, str]]]:
        return (out / "report.html").read_text(), list(csv.DictReader((out / "results.csv").open()))

    def run() -> tuple[support.Outcome, dict[str, Any]]:
        outcome = support.run_cli(*command(out, methods=("--methods", "original,wgm,rtn")))
        return outcome, results_of(out)

    outcome, results = run()
    assert outcome.code == 1
    assert str(unwritable) in outcome.message
    assert [row["label"] for row in results["methods"]] == ["original", "wgm"]
    assert results["unfinished"] == ["rtn"]
    assert "Not measured yet: rtn" in texts()[0]

    unwritable.rmdir()
    outcome, results = run()
    why = f"{in_the_way} exists and holds no run of bitwright"
    assert outcome.code == 1
    assert outcome.message.startswith(f"1 of 3 methods failed: wgm ({why}")
    assert "failed: " in outcome.out
    assert results["unfinished"] == []
    original, wgm, rtn = results["methods"]
    assert wgm["failed"].startswith(why)
    assert wgm["measured"] == [None]
    assert original["failed"] is rtn["failed"] is None
    expected = {row["label"]: row["measured"][0]["loss"] for row in results_of(comparison)["methods"]}
    assert rtn["measured"][0]["loss"] == expected["rtn"]
    page, lines = texts()
    assert f"2. wgm (failed: {why}" in page
    assert [(line["label"], line["failed"], line["perplexity"] == "") for line in lines] == [
        ("original", "", False),
        ("wgm", wgm["failed"], True),
        ("rtn", "", False),
    ]

    shutil.rmtree(in_the_way)
    outcome, results = run()
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("already measured") == 2
    assert {row["label"]: row["measured"][0]["loss"] for row in results["methods"]}.items() <= expected.items()
    page, lines = texts()
    assert "failed: " not in page
    assert not any(line["failed"] for line in lines)
    assert not any((out / "artifacts").iterdir())


def test_a_method_that_fails_on_a_later_text_keeps_what_it_has(command: Any, more_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = ("--methods", "rtn")
    assert support.run_cli(*command(out, "--keep-artifacts", methods=one)).code == 0
    [before] = results_of(out)["methods"]
    kept = out / "artifacts" / before["key"]
    next(kept.glob("*.safetensors")).unlink()
    outcome = support.run_cli(*command(out, "--text", more_file, methods=one))
    assert outcome.code == 1
    [row] = results_of(out)["methods"]
    assert row["measured"] == [before["measured"][0], None]
    assert row["linear_bits"] == before["linear_bits"]
    assert row["failed"]
    assert row["failed"] in outcome.message
    # What is asked for here has not failed.
    assert support.run_cli(*command(out, methods=one)).code == 0
    assert results_of(out)["methods"] == [before]
    shutil.rmtree(kept)
    assert support.run_cli(*command(out, "--text", more_file, methods=one)).code == 0
    [row] = results_of(out)["methods"]
    assert row["failed"] is None
    assert None not in row["measured"]


def test_no_name_leads_out_of_the_directory(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    named = ("--methods", 'rtn:name="../../x"', "--methods", 'rtn:name="a/b"', "--methods", 'rtn:name=".."')
    outcome = support.run_cli(*command(out, "--keep-artifacts", methods=named))
    assert outcome.code == 0, outcome.err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and out not in path.parents] == []
    results = results_of(out)["methods"]
    assert [row["recipe"]["name"] for row in results] == ["../../x", "a/b", ".."]
    for folder, suffix in (("methods", ".json"), ("artifacts", "")):
        assert all((out / folder / f"{row['key']}{suffix}").exists() for row in results)
    assert support.run_cli(*command(out, methods=named)).err.count("already measured") == 3
    assert support.run_cli(*command(out, "--restart", methods=("--methods", "original"))).code == 0
    assert [path.name for path in (out / "methods").iterdir()] == ["original.json"]
    assert not any((out / "artifacts").iterdir())


def test_a_restart_that_is_broken_off_leaves_no_old_page(comparison: Path, command: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(comparison, tmp_path / "out"))
    [rtn] = [row for row in results_of(out)["methods"] if row["label"] == "rtn"]
    assert support.run_cli(*command(out, "--restart", "--dtype", "float33")).code == 1
    assert (out / "methods" / f"{rtn['key']}.json").exists()
    (out / "activations.json.tmp").mkdir()
    assert support.run_cli(*command(out, "--restart")).code == 1
    assert not list((out / "methods").iterdir())
    assert not [name for name in ("results.json", "results.csv", "report.html") if (out / name).exists()]


def test_a_text_is_its_content_and_is_shown_by_its_new_name(
    comparison: Path,
    command: Any,
    models: dict[str, Path],
    calibration_file: Path,
    evaluation_file: Path,
    tmp_path: Path,
) -> None:
    out = Path(shutil.copytree(comparison, tmp_path / "out"))
    assert support.run_cli(*command(out, "--keep-artifacts", methods=("--methods", "rtn"))).code == 0
    calib = shutil.copy(calibration_file, tmp_path / "first-renamed.txt")
    text = shutil.copy(evaluation_file, tmp_path / "second-renamed.txt")
    files = ["--calib", calib, "--text", text, "--out", out]
    outcome = support.run_cli("compare", models["llama"], *METHODS, *files, *QUICK)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("already measured") == 4
    for name in ("results.json", "results.csv", "report.html"):
        content = (out / name).read_text()
        assert "second-renamed.txt" in content
        assert ("first-renamed.txt" in content) == (name != "results.csv")
        assert calibration_file.name not in content
        assert evaluation_file.name not in content
    # What was kept serves for a new text, too.
    third = tmp_path / "third.txt"
    third.write_text(support.words(600, 14))
    again = support.run_cli("compare", models["llama"], "--methods", "rtn", *files, "--text", third, *QUICK)
    assert again.code == 0, again.err
    assert "is already complete" in again.err


def test_without_matplotlib_it_says_what_to_install(
    command: Any, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for argv in (command(tmp_path / "out"), ["report", artifact()]):
        outcome = support.run_cli(*argv)
        assert outcome.code == 1
        assert "pip install 'bitwright[report]'" in outcome.message
    assert not (tmp_path / "out").exists()
