"""bench/quality.py: which rows it makes, what it reads, and a whole small run of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import support
from bitwright.recipe import preset

SCRIPT = support.REPO / "bench" / "quality.py"
if not SCRIPT.exists():
    pytest.skip("bench/ is not in this checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("bench_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_path_leads_from_the_paper_to_the_default(quality: Any) -> None:
    every = list(quality.rows([0, 1], [8], {"calibration.sequences": 4}))
    path = [recipe for section, _, recipe in every if section == "the path"]
    options = {"calibration.sequences": 4}
    assert path[0] == preset("bwa").with_options(options)
    assert path[-1] == preset("bitwright").with_options(options)
    assert len(path) == len(quality.IDEAS) + 1
    # Every step changes something, and an idea left out of the default is that step back.
    assert all(before != after for before, after in itertools.pairwise(path))
    without = [recipe for section, _, recipe in every if section == "the default without"]
    assert without[-1].with_options({"name": "x"}) == path[-2].with_options({"name": "x"})
    assert [label for section, label, _ in every if quality.decides(section, label)] == [
        "bwa", "+ bits where the loss feels them (bitwright)", "bitwright --tune",
    ]  # fmt: skip


def test_parts_and_sums_of_files(quality: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("0123456789")
    b.write_text("x\ny\n")
    assert quality.read(str(a)).content == "0123456789"
    assert quality.read(f"{a}@0.5:1").content == "56789"
    assert quality.read(f"{a}@2:4+{b}").content == "23\n\nx\ny\n"
    assert quality.read(str(b), "space").content == "x y"


def test_shares_of_the_papers_loss(quality: Any) -> None:
    rows = [
        {"section": "the path", "label": "bwa", "calibration": "c", "seconds": 10.0, "excess": [0.4, 0.2]},
        {"section": "tuning", "label": "bitwright --tune", "calibration": "c", "seconds": 25.0, "excess": [0.1, 0.1]},
    ]
    assert quality.against(rows, ["one", "two"])[-2] == "| bitwright --tune | c | 0.25 | 0.50 | 0.38 | 2.5 x |"


def test_brief_calibrations_stand_in_a_table_of_their_own(quality: Any) -> None:
    last = f"+ {list(quality.IDEAS)[-1]} (bitwright)"
    rows = [
        {"section": "the path", "label": label, "calibration": text, "seconds": 10.0, "bits": 2.5, "excess": excess}
        for text in ("own", "other")
        for label, excess in (("bwa", [0.4, 0.2]), ("+ column feedback", [0.3, 0.2]), (last, [0.1, 0.2]))
        if text == "own" or quality.decides("the path", label)
    ]
    lines = quality.document(rows, ["one", "two"], ["other"])
    assert lines.count("| other | bitwright | 0.1000 | 0.2000 | 0.1500 |") == 1
    assert "| | bits | s | one (own) | two (own) |" in lines
    assert "| + column feedback | 2.5000 | 10 | 0.3000 | 0.2000 |" in lines
    assert not any("(other)" in line for line in lines)


def test_a_run(models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPT), str(models["llama"]), "--calib", f"x={calibration_file}",
        "--text", f"{evaluation_file}@0:0.5", "--window", "64", "--windows", "2", "--sequences", "4", "--length", "64",
        "--seeds", "0", "--sizes", "3", "--sections", "seeds,calibration", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [row["label"] for row in found] == [
        "bwa, seed 0", "bwa, 3 segments", "bitwright, seed 0", "bitwright, 3 segments",
    ]  # fmt: skip
    # Seed 0 is the presets' own, and three segments are other calibration than four.
    assert found[0]["excess"] != found[1]["excess"]
    assert f"| {found[2]['label']} | {found[2]['bits']:.4f} |" in (tmp_path / "out" / "quality.md").read_text()
