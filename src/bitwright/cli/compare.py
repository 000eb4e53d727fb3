"""bitwright compare: methods beside each other on one model, with a table and a page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from bitwright.cli import console, options

if TYPE_CHECKING:
    from bitwright.pipeline import Plan


def command(
    model: str = typer.Argument(..., help="Hugging Face model directory"),
    methods: list[str] = typer.Option(
        ...,
        "--methods",
        help="comma-separated, repeatable: presets with options (bwa:weights.feedback=column,weights.levels=dp),"
        " 'original', or a grid: presets, paper-table1, paper-table4, paper-table5, paper-table9",
    ),
    calib: list[str] = typer.Option(..., "--calib", help="calibration text, the same for all methods; repeatable"),
    text: list[str] = typer.Option(..., "--text", help="text to measure on; repeatable, each is measured by itself"),
    out: str = typer.Option(..., "--out", help="directory for results.json, results.csv, report.html; resumed"),
    join: options.Join = "none",
    window: options.Window = None,
    windows: options.Windows = None,
    dtype: options.Dtype = "float32",
    sequences: int | None = typer.Option(None, min=1, help="calibration segments"),
    length: int | None = typer.Option(None, min=8, help="tokens a segment"),
    seed: int | None = typer.Option(None, min=0, help="seed of the segments"),
    skip_unknown: bool = typer.Option(False, help="go on without methods that do not exist or do not fit the model"),
    keep_artifacts: bool = typer.Option(False, help="keep each method's artifact in OUT/artifacts"),
    threads: options.Threads = None,
    restart: bool = typer.Option(False, help="drop the results that OUT holds"),
    as_json: options.AsJson = False,
) -> None:
    """Quantize and measure with each method. Killed at any moment, the same command goes on; nothing is done twice."""
    from bitwright.calibration.text import check_join, read_text
    from bitwright.errors import RecipeError, RunError, TextError
    from bitwright.recipe import PRESETS
    from bitwright.report import figures, grid, tables
    from bitwright.report.compare import Comparison, Measuring, failures, narrowest

    figures.require_matplotlib()
    check_join(join)
    shared = {"calibration.sequences": sequences, "calibration.length": length, "calibration.seed": seed}
    common = {key: value for key, value in shared.items() if value is not None}
    chosen, titles, unknown = grid.choose(methods, common, narrowest(model))
    if unknown:
        missing = f"there is no preset or grid {', '.join(repr(name) for name in unknown)}"
        known = f"the presets are {', '.join(sorted(PRESETS))} and original, the grids {', '.join(grid.GRIDS)}"
        if not skip_unknown:
            raise RecipeError(f"{missing}; {known}; --skip-unknown goes on without")
        console.err.print(f"note: {missing}; left out", markup=False, soft_wrap=True)
    texts = [read_text([path], join) for path in text]
    if len({item.sha256 for item in texts}) < len(texts):
        raise TextError("--text names the same text twice; name each once")
    reporter = _Reporter()
    try:
        results = Comparison(
            model,
            out,
            chosen,
            read_text(list(calib)),
            Measuring(texts, window, windows, dtype, threads),
            titles=titles,
            skipped=unknown,
            skip_unfit=skip_unknown,
            keep_artifacts=keep_artifacts,
            restart=restart,
            reporter=reporter,
        ).carry_out()
    finally:
        reporter.close()
    if as_json:
        print(json.dumps(results))
    else:
        show(tables.comparison_table(results))
        console.out.print(f"wrote results.json, results.csv and report.html to {out}", markup=False, soft_wrap=True)
    if failed := failures(results):
        raise RunError(failed)


def show(table: Any) -> None:
    """The table for people; what the page marks is bold."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=table.title, title_justify="left", box=None)
    for column in table.columns:
        heading = escape(column.name.replace(", ", "\n"))
        drawn.add_column(heading, justify="left" if column.left else "right", overflow="fold")
    for row in table.rows:
        words = [escape(cell) for cell in row.cells]
        drawn.add_row(*(f"[bold]{word}[/]" if i in row.marked else word for i, word in enumerate(words)))
    console.out.print(drawn)
    for note in table.notes:
        console.out.print(note, markup=False, soft_wrap=True)


class _Reporter:
    """A progress bar for each method in turn."""

    def __init__(self) -> None:
        self._bar, self._began = console.RunReporter(), False

    def allocating(self, fraction: float) -> None:
        self._renew()
        self._bar.allocating(fraction)

    def begin(self, plan: Plan, completed: int) -> None:
        self._renew()
        self._began = True
        self._bar.begin(plan, completed)

    def _renew(self) -> None:
        """A bar of its own for what follows the last method's."""
        if self._began:
            self.close()
            self._bar, self._began = console.RunReporter(), False

    def advance(self, fraction: float) -> None:
        self._bar.advance(fraction)

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None:
        self._bar.block_done(index, entries)

    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        self._bar.searching(target, done, total, found)

    def begin_tuning(self, intervals: int, completed: int) -> None:
        self._bar.begin_tuning(intervals, completed)

    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None:
        self._bar.interval_done(number, intervals, losses)

    def note(self, message: str) -> None:
        self._bar.note(message)

    def close(self) -> None:
        self._bar.close()
