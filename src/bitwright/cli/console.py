"""What the commands share: consoles, units, recipe options, and progress on stderr."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitwright.errors import RecipeError
from bitwright.recipe import DEFAULT, Recipe, parse_option, preset


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # Tables keep their columns in a pipe or a log.
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


out = _console(stderr=False)
err = _console(stderr=True)


def size(count: float) -> str:
    """Bytes for people: 1 kB = 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def recipe_from(
    preset_name: str | None,
    file: str | None,
    options: list[str],
    *,
    tune: bool = False,
    target_bits: float | None = None,
    **shortcuts: Any,
) -> Recipe:
    """The recipe that a command line asks for: a file or a preset (or DEFAULT), changed by --set and by options of
    their own, which must not contradict each other."""
    if file and preset_name:
        raise RecipeError(f"--preset {preset_name} and --recipe {file} are two recipes; leave out one of them")
    recipe = Recipe.from_file(file) if file else preset(preset_name or DEFAULT)
    asked = {key.replace("__", "."): value for key, value in shortcuts.items() if value is not None}
    set_ = dict(parse_option(option) for option in options)
    changes: dict[str, Any] = {}
    for key, option, wanted in (("tune", "--tune", tune), ("allocate", "--target-bits", target_bits is not None)):
        if wanted and key in set_ and set_[key] is None:
            raise RecipeError(f"{option} asks for {key}, which --set {key}=none turns off; leave out one of them")
        if wanted and getattr(recipe, key) is None:
            changes[key] = {}
    if target_bits is not None:
        asked["allocate.target"] = target_bits
    for key, value in asked.items():
        if set_.get(key, value) != value:
            raise RecipeError(f"{key} is asked to be {value} and, by --set, {set_[key]}; leave out one of them")
    changes |= set_ | asked
    return recipe.with_options(changes) if changes else recipe


def outliers_option(text: str | None) -> str | int | None:
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]+", text) else text


@contextmanager
def counting(label: str, total: int) -> Iterator[Any]:
    """A progress bar for a loop of known length; yields the function that sets how much is done."""
    with _bar() as progress:
        task = progress.add_task(label, total=total)
        yield lambda done, all_=None: progress.update(task, completed=done, total=all_ or total)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )


class RunReporter:
    """Progress of a quantization: a bar on a terminal, a line a block elsewhere."""

    def __init__(self) -> None:
        self._progress = _bar()
        self._task: TaskID | None = None
        self._search: tuple[TaskID, float, float] | None = None
        self._began = self._told = time.monotonic()
        self._chosen = 0.0
        self._first = 0
        self._blocks = 0

    def allocating(self, fraction: float) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("choosing bits", total=1.0)
            self._began, self._chosen, self._told = time.monotonic(), 0.0, time.monotonic()
        self._progress.advance(self._task, fraction)
        self._chosen += fraction
        if not err.is_terminal and time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            err.print(f"choosing bits {self._chosen:.0%}  {self._told - self._began:.0f} s", markup=False)

    def begin(self, plan: Any, completed: int) -> None:
        self._blocks = len(plan.shards) - 1
        self._first = completed
        self._began = time.monotonic()
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._progress.start()
        self._task = self._progress.add_task("quantizing", total=self._blocks, completed=completed)

    def advance(self, fraction: float) -> None:
        if self._task is not None:
            self._progress.advance(self._task, fraction)

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None:
        done, left = index + 1 - self._first, self._blocks - index - 1
        seconds = time.monotonic() - self._began
        worst = max(entries, key=lambda entry: entry["error"])
        for entry in entries:
            if entry["rescue"]:
                err.print(f"  note: {entry['linear']}: {entry['rescue']}", markup=False, soft_wrap=True)
        if not err.is_terminal:
            err.print(
                f"block {index + 1}/{self._blocks}  worst error {worst['error']:.4f} ({worst['linear']})"
                f"  {seconds:.0f} s, about {seconds / done * left:.0f} s left",
                markup=False,
                soft_wrap=True,
            )
        if left == 0:
            self._progress.stop()

    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        """A bar of its own behind that of the blocks; elsewhere a line a ratio."""
        if self._search is None:
            self._progress.stop()
            self._progress = _bar()
            self._progress.start()
            self._search = self._progress.add_task("clip ratios", total=total), done, time.monotonic()
        task, first, began = self._search
        self._progress.update(task, completed=done, description=f"clip ratio of {target}")
        if found and not err.is_terminal:
            seconds = time.monotonic() - began
            left = seconds / max(done - first, 1e-9) * (total - done)
            err.print(
                f"clip ratio {round(done)}/{total}  {found['target']} {found['ratio']:.5g} (value {found['value']:.5g})"
                f"  {seconds:.0f} s, about {left:.0f} s left",
                markup=False,
                soft_wrap=True,
            )

    def begin_tuning(self, intervals: int, completed: int) -> None:
        self._began, self._first = time.monotonic(), completed
        self._progress.stop()
        self._progress = _bar()
        self._progress.start()
        self._task = self._progress.add_task("tuning", total=intervals + 1, completed=completed)

    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None:
        if not err.is_terminal and number:
            seconds = time.monotonic() - self._began
            left = seconds / (number - self._first) * (intervals - number)
            err.print(
                f"tuning {number}/{intervals}  divergence {losses[0]:.4f} -> {losses[-1]:.4f}"
                f"  {seconds:.0f} s, at most about {left:.0f} s left",
                markup=False,
                soft_wrap=True,
            )

    def note(self, message: str) -> None:
        err.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
