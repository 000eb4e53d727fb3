"""Run `quantize` in child processes and kill them: a helper program of test_resume.py, no test.

Start-up is most of a short run, so this program imports everything once, by a run of its own, and forks a child for
each attempt; a child is a process like any other and dies as one. One JSON object on stdin, one on stdout.

    {"argv": [...], "out": DIR, "mode": "random", "seed": 1, "kills": 6}     SIGKILL after random times
    {"argv": [...], "out": DIR, "mode": "files", "stride": 3}                exit before operations 1, 1 + stride, ...
    {"argv": [...], "out": DIR, "mode": "compare", "seed": 1, "kills": 6}    SIGKILL a `compare` after random times
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads that a fork would cut off

import support

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}


def in_child(argv: list[str], out: Path, leave_at: int | None = None, counter: Path | None = None) -> int:
    """Fork; run the command line in the child; returns its process id. It exits before file operation `leave_at`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        operations = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal operations
            if event not in EVENTS or not arguments or not str(arguments[0]).startswith(str(out)):
                return
            operations += 1
            if operations == leave_at:
                os._exit(9)

        if leave_at is not None or counter:
            sys.addaudithook(watch)
        log = os.open(out.with_name("child.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        total = lambda: operations  # noqa: E731 - read before the counter itself is opened
        code = support.run_cli(*argv).code
        if counter:
            counter.write_text(str(total()))
    finally:
        os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def remove(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(path, ignore_errors=True)


def unbroken(argv: list[str], out: Path, counter: Path | None = None) -> tuple[dict[str, str], float]:
    began = time.monotonic()
    assert finish(in_child(argv, out, counter=counter)) == 0
    return support.tree(out), time.monotonic() - began


def survives(argv: list[str], out: Path, seconds: float) -> bool:
    """Whether a child is at its end before it is killed after so many seconds."""
    child = in_child(argv, out)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finish(child) == 0


def kill_at_random(argv: list[str], out: Path, seed: int, wanted: int) -> dict[str, Any]:
    expected, seconds = unbroken(argv, out)
    remove(out)
    rng = random.Random(seed)
    kills, blocks, rounds = 0, [], 0
    while kills < wanted:
        rounds += 1
        if rounds > 100:
            raise AssertionError("it is never hit")
        while True:
            if survives(argv, out, rng.uniform(0.1, 0.9) * seconds):
                break
            kills += 1
            assert not out.exists() or support.tree(out) == expected, "an output directory that is not whole"
            state = out.with_name(out.name + ".run") / "run.json"
            blocks.append(json.loads(state.read_text())["completed"] if state.exists() else None)
            if len(blocks) > 200:
                raise AssertionError("it never gets done")
        assert support.tree(out) == expected
        remove(out)
    return {"kills": kills, "rounds": rounds, "blocks": blocks, "seconds": seconds, "files": len(expected)}


def leave_before_file_operations(argv: list[str], out: Path, stride: int) -> dict[str, Any]:
    counter = out.with_name("operations")
    expected, _ = unbroken(argv, out, counter)
    operations = int(counter.read_text())
    remove(out)
    # The last operations make shards an artifact: each of them is tried.
    points = sorted({*range(1, operations + 1, stride), *range(max(1, operations - 24), operations + 1)})
    for point in points:
        assert finish(in_child(argv, out, leave_at=point)) == 9, f"operation {point} of {operations} did not come"
        if out.exists():
            assert support.tree(out) == expected, f"left before operation {point}: an output that is not whole"
        assert finish(in_child(argv, out)) == 0, f"left before operation {point}: cannot go on"
        assert support.tree(out) == expected, f"left before operation {point}: other bytes"
        assert not out.with_name(out.name + ".run").exists(), f"left before operation {point}: the run is left over"
        remove(out)
    return {"operations": operations, "points": len(points)}


def answers(out: Path) -> Any:
    """What a comparison found, without the time it took."""
    results = json.loads((out / "results.json").read_text())
    for row in results["methods"]:
        del row["quantize_seconds"]
        for measured in row["measured"]:
            del measured["seconds"]
    return results


def kill_compare(argv: list[str], out: Path, seed: int, wanted: int) -> dict[str, Any]:
    _, seconds = unbroken(argv, out)
    expected = answers(out)
    texts = len(expected["texts"])
    remove(out)
    rng = random.Random(seed)
    kills, finished = 0, []
    for _ in range(100):
        done: dict[Path, bytes] = {}
        while True:
            if survives(argv, out, rng.uniform(0.1, 0.9) * seconds):
                break
            kills += 1
            for path, content in done.items():
                assert path.read_bytes() == content, f"{path.name} was done again"
            for path in out.glob("methods/*.json"):
                record = json.loads(path.read_text())
                if len(record["texts"]) == texts:
                    done[path] = path.read_bytes()
            finished.append(len(done))
        for path, content in done.items():
            assert path.read_bytes() == content, f"{path.name} was done again"
        assert answers(out) == expected
        assert not any((out / "artifacts").iterdir()), "artifacts are left over"
        remove(out)
        if kills >= wanted and any(finished):  # one of them after a method was finished, however busy the machine is
            break
    return {"kills": kills, "finished": finished, "seconds": seconds}


def main() -> None:
    asked = json.load(sys.stdin)
    argv, out = asked["argv"], Path(asked["out"])
    warm = out.with_name("warm-up")
    outcome = support.run_cli(*[str(warm) if word == str(out) else word for word in argv])
    assert outcome.code == 0, outcome.err
    if asked["mode"] == "random":
        result = kill_at_random(argv, out, asked["seed"], asked["kills"])
    elif asked["mode"] == "compare":
        result = kill_compare(argv, out, asked["seed"], asked["kills"])
    else:
        result = leave_before_file_operations(argv, out, asked["stride"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
