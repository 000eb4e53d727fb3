"""A run can be killed at any moment and goes on to the same bytes; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitwright
import support
from bitwright.calibration import Text, text_of
from bitwright.errors import RunError
from bitwright.pipeline.run import Silent

TINY = {"calibration.sequences": 2, "calibration.length": 32}


class Broken(Exception):
    """What the reporters below raise; nothing in bitwright knows it."""


class BreakAt(Silent):
    """A reporter that raises at the n-th call of one of its methods, and counts them."""

    def __init__(self, method: str = "", at: int = 0) -> None:
        self.method, self.at = method, at
        self.calls: dict[str, int] = {}
        self.notes: list[str] = []

    def _called(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1
        if method == self.method and self.calls[method] == self.at:
            raise Broken

    def begin(self, plan: Any, completed: int) -> None:
        self._called("begin")

    def advance(self, fraction: float) -> None:
        self._called("advance")

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None:
        self._called("block_done")

    def note(self, message: str) -> None:
        self.notes.append(message)


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def recipe() -> bitwright.Recipe:
    return bitwright.preset("bwa").with_options(TINY)


@pytest.fixture(scope="module")
def unbroken(
    models: dict[str, Path], calibration: Text, recipe: bitwright.Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    bitwright.quantize(models["llama"], out, recipe, calibration, threads=1)
    return out


@pytest.fixture
def run(models: dict[str, Path], calibration: Text, recipe: bitwright.Recipe, tmp_path: Path) -> Run:
    """run(reporter, **changes) quantizes into the same output again and again."""

    def again(reporter: Silent | None = None, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "model": models["llama"],
            "output": tmp_path / "out",
            "recipe": recipe,
            "calibration": calibration,
            "threads": 1,
            "reporter": reporter,
        }
        return bitwright.quantize(**(arguments | changes))

    return again


@pytest.fixture
def half_done(run: Run, tmp_path: Path) -> Path:
    """OUT.run after the first of two blocks."""
    with pytest.raises(Broken):
        run(BreakAt("block_done", 1))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.run"


def killed(mode: str, model: Path, calibration_file: Path, out: Path, sequences: int, **more: Any) -> dict[str, Any]:
    argv = ["quantize", str(model), str(out), "--calib", str(calibration_file)]
    argv += ["--sequences", str(sequences), "--length", "32", "--threads", "1"]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py"))],
        input=json.dumps({"argv": argv, "out": str(out), "mode": mode, **more}),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_killed_at_random_moments(models: dict[str, Path], calibration_file: Path, tmp_path: Path) -> None:
    """kill -9, again and again until a run gets to its end: the bytes of an unbroken run, and never half an output."""
    found = killed("random", models["llama_sharded"], calibration_file, tmp_path / "out", 8, seed=20, kills=6)
    print(
        f"\n{found['kills']} kills in {found['rounds']} runs of {found['seconds']:.1f} s, blocks done {found['blocks']}"
    )
    assert found["kills"] >= 6
    assert found["files"] >= 9


def test_dead_before_each_file_operation(models: dict[str, Path], calibration_file: Path, tmp_path: Path) -> None:
    """A process that ends before its n-th open, rename or removal in the output: resumed, the same bytes."""
    found = killed("files", models["llama"], calibration_file, tmp_path / "out", 2, stride=13)
    print(f"\n{found['points']} of {found['operations']} file operations")
    assert found["points"] >= 25


def test_broken_off_in_every_stage(run: Run, unbroken: Path, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    """An exception in the midst of energy, Hessian, solve and propagation of each block, and at its end."""
    whole = BreakAt()
    run(whole)
    expected = support.tree(unbroken)
    assert support.tree(tmp_path / "out") == expected
    # Per block: 2 sequences three times, and 7 linears.
    assert whole.calls == {"begin": 1, "advance": 2 * (2 + 2 + 7 + 2), "block_done": 2}
    points = [("begin", 1), ("block_done", 1), ("block_done", 2)]
    points += [("advance", block * 13 + call) for block in (0, 1) for call in (1, 2, 3, 4, 5, 11, 12, 13)]
    for method, at in points:
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(Broken):
            run(BreakAt(method, at))
        assert not (tmp_path / "out").exists()
        resumed = BreakAt()
        run(resumed)
        assert support.tree(tmp_path / "out") == expected, (method, at)
        assert not (tmp_path / "out.run").exists()
        assert any(note.startswith("resuming: ") for note in resumed.notes), (method, at)
        # What was done is not done again.
        done = 2 if (method, at) == ("block_done", 2) else int(method == "block_done" or at > 13)
        assert resumed.calls.get("block_done", 0) == 2 - done, (method, at)


def test_broken_off_again_and_again(run: Run, unbroken: Path, tmp_path: Path) -> None:
    """One step further each time: five interruptions of one and the same run."""
    for at in (3, 20, 9, 12, 13):
        with pytest.raises(Broken):
            run(BreakAt("advance", at) if at < 14 else BreakAt("block_done", 1))
    run()
    assert support.tree(tmp_path / "out") == support.tree(unbroken)


def test_log_is_complete_after_a_resume(run: Run, half_done: Path, tmp_path: Path) -> None:
    result = run()
    lines = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert lines == result.log
    assert [entry["linear"] for entry in lines] == [layer.name for layer in result.plan.layers]
    for entry in lines:
        assert {"block", "site", "shape", "outliers", "bits", "error", "damping", "rescue", "seconds"} <= set(entry)
        assert entry["error"] >= 0


def test_a_second_run_at_the_same_time_is_refused(run: Run, unbroken: Path, tmp_path: Path) -> None:
    refused = []

    class Rival(Silent):
        def advance(self, fraction: float) -> None:
            if not refused:
                with pytest.raises(RunError, match=r"another run is at work in .*out\.run"):
                    run()
                refused.append(True)

    run(Rival())
    assert refused
    assert support.tree(tmp_path / "out") == support.tree(unbroken)


def changed_model(model_copy: Callable[[str], Path]) -> Path:
    copy = model_copy("llama")
    support.flip_bit(copy / "model.safetensors", -3, 2)
    return copy.rename(copy.with_name("llama")) if copy.name != "llama" else copy


@pytest.mark.parametrize("what", ["recipe", "calibration", "model", "windows", "evaluation"])
def test_resume_with_something_else_is_refused(
    what: str,
    run: Run,
    half_done: Path,
    unbroken: Path,
    recipe: bitwright.Recipe,
    calibration: Text,
    model_copy: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The message names what differs, the unfinished run stays as it is, its own command still finishes it."""
    other = text_of("another text", support.words(3000, 99))
    changes: dict[str, Any] = {
        "recipe": {"recipe": recipe.with_options({"weights.group": 64})},
        "calibration": {"calibration": other},
        "model": {"model": changed_model(model_copy) if what == "model" else None},
        "windows": {"recipe": recipe.with_options({"calibration.seed": 5})},
        "evaluation": {"evaluation": other},
    }[what]
    before = support.tree(half_done)
    with pytest.raises(RunError, match=rf"unfinished run that differs in .*{what}") as caught:
        run(**changes)
    assert "--restart" in str(caught.value)
    if what in ("recipe", "model"):
        # Nothing else is blamed.
        assert f"differs in {what};" in str(caught.value)
    assert support.tree(half_done) == before
    run()
    assert support.tree(tmp_path / "out") == support.tree(unbroken)


def test_restart_drops_the_unfinished_run(run: Run, half_done: Path, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    reporter = BreakAt()
    run(reporter, recipe=recipe.with_options({"weights.group": 64}), restart=True)
    assert reporter.calls["block_done"] == 2
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]["weights"]["group"]
        == 64
    )
    assert not half_done.exists()


@pytest.mark.parametrize("victim", ["stream-1-full.f32", "stream-1-quantized.f32", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_in_the_run_directory_is_found(
    victim: str, damage: str, run: Run, half_done: Path, unbroken: Path, tmp_path: Path
) -> None:
    (path,) = half_done.rglob(victim)
    if damage == "flipped":
        support.flip_bit(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with pytest.raises(RunError, match=victim):
        run()
    assert not (tmp_path / "out").exists()
    run(restart=True)
    assert support.tree(tmp_path / "out") == support.tree(unbroken)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unknown": 1}'])
def test_damaged_state_is_refused_by_name(content: str, run: Run, half_done: Path, tmp_path: Path) -> None:
    (half_done / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        run()
    assert not (tmp_path / "out").exists()
    run(restart=True)
    assert bitwright.verify(tmp_path / "out") == []


# --- a finished output --------------------------------------------------------------------------------------------


def test_the_same_command_again_has_nothing_to_do(run: Run, tmp_path: Path) -> None:
    first = run()
    before = support.tree(tmp_path / "out")
    reporter = BreakAt()
    second = run(reporter)
    assert "already complete" in reporter.notes[-1]
    assert reporter.calls == {}
    assert support.tree(tmp_path / "out") == before
    assert second.measured == first.measured


def test_another_command_on_a_finished_output_is_refused(run: Run, recipe: bitwright.Recipe, tmp_path: Path) -> None:
    run()
    before = support.tree(tmp_path / "out")
    for restart in (False, True):
        with pytest.raises(RunError, match=r"already holds another artifact .*recipe"):
            run(recipe=recipe.with_options({"weights.outliers": 0}), restart=restart)
    assert support.tree(tmp_path / "out") == before


def test_left_over_run_directory_is_cleaned(run: Run, tmp_path: Path) -> None:
    """Killed after the output got its name and before the run's directory was gone."""
    run()
    left = tmp_path / "out.run"
    left.mkdir()
    (left / "lock").touch()
    (left / "stream-2-full.f32").write_bytes(b"rest")
    run()
    assert not left.exists()


def test_the_command_resumes_too(models: dict[str, Path], run: Run, half_done: Path, calibration_file: Path) -> None:
    """Through the command line: a word on resuming, one on completion, and exit code 0 for both."""
    out = half_done.with_name("out")
    command = ["quantize", models["llama"], out, "--preset", "bwa", "--calib", calibration_file]
    command += ["--sequences", "2", "--length", "32"]
    first = support.run_cli(*command)
    assert first.code == 0, first.err
    assert "resuming: 1 of 2 blocks are done" in first.err
    assert "block 2/2" in first.err
    second = support.run_cli(*command, "--json")
    assert second.code == 0
    assert "already complete" in second.err
    assert second.json["output"] == str(out)
    other = support.run_cli(*command, "--seed", "3")
    assert other.code == 1
    assert "differs in recipe, windows" in other.message


def test_a_foreign_directory_in_the_place_of_the_run_is_not_touched(run: Run, tmp_path: Path) -> None:
    foreign = tmp_path / "out.run"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunError, match=r"out\.run exists and holds no run of bitwright"):
        run(restart=True)
    assert (foreign / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert not (tmp_path / "out").exists()
