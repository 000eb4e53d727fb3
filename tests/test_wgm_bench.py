"""The script that times WGM: the matrices of a 3B model, and figures that are consistent with each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bitwright.native import find

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("a source distribution has no bench/", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import wgm  # noqa: E402 - a script, not a package

if find() is None:
    pytest.skip("built without native kernels", allow_module_level=True)

SIZES = {"blocks": 3, "layers": 1, "hidden": 128, "inner": 320, "heads": 4, "kv-heads": 2, "groups": 8, "window": 64}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


def test_the_shapes_of_a_3b_model() -> None:
    shapes = wgm.block_shapes(3072, 8192, 24, 8)
    assert sorted(shapes) == [(1024, 3072)] * 2 + [(3072, 3072)] * 2 + [(3072, 8192)] + [(8192, 3072)] * 2
    assert 28 * len(shapes) == 196
    assert 28 * sum(rows * columns for rows, columns in shapes) == 2_818_572_288


def test_one_layer_speaks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    wgm.main([*TINY, "--repeat", "2", "--json"])
    said = capsys.readouterr()
    assert said.err.startswith("block 1/1: windowed ")
    found = json.loads(said.out)
    assert (found["matrices"], found["weights"]) == (3 * 7, 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 320 * 128))
    windowed, dp = found["results"]
    for entry in (windowed, dp):
        assert entry["seconds"] == pytest.approx(3 * entry["measured_seconds"])
        assert entry["measured_seconds"] > 0
    # Of Gaussian weights and eight groups, as docs/methods.md has it for a million.
    assert dp["error"] == pytest.approx(0.0095, rel=0.03)
    assert dp["error"] < windowed["error"] < 1.5 * dp["error"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    wgm.main([*TINY, "--levels", "dp", "--float32", "--student", "5"])
    title, _, row = capsys.readouterr().out.splitlines()
    assert title.startswith("21 matrices, 516,096 weights, 8 groups, one core, ")
    assert title.endswith(", 1 of 3 blocks measured and scaled up")
    assert row.split()[0] == "dp"
    # Heavier tails than a Gaussian's lose more to the same groups.
    assert float(row.split()[3]) > 0.012


@pytest.mark.parametrize(("option", "value"), [("--groups", "12"), ("--layers", "0"), ("--repeat", "0")])
def test_bad_numbers_are_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wgm.main([option, value])
    assert f"{option} {value} is" in capsys.readouterr().err
