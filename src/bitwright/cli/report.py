"""bitwright report: a page of one artifact."""

from __future__ import annotations

from pathlib import Path

import typer

from bitwright.cli import console, options


def command(
    artifact: str = typer.Argument(..., help="artifact directory"),
    out: str | None = typer.Option(None, "--out", help="HTML file to write; default ARTIFACT.html beside it"),
    text: list[str] = typer.Option(
        [], "--text", help="measure perplexity on this text now; repeatable, each by itself"
    ),
    model: str | None = typer.Option(None, "--model", help="the original, measured beside the artifact"),
    calib: list[str] = typer.Option([], "--calib", help="text for activations before and after; needs --model"),
    join: options.Join = "none",
    window: options.Window = None,
    windows: options.Windows = None,
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
) -> None:
    """Write one self-contained HTML page: sizes, perplexities, error by layer and site, recipe and provenance; with
    --model and --calib activations before and after."""
    from bitwright.artifact.shards import write_text
    from bitwright.calibration.text import check_join, read_text
    from bitwright.report import figures, fresh, page
    from bitwright.report.artifact import artifact_page
    from bitwright.report.compare import Measuring

    figures.require_matplotlib()
    check_join(join)
    directory = Path(artifact).absolute()
    measured = fresh.measure(
        directory,
        Measuring([read_text([path], join) for path in text], window, windows, dtype, threads),
        None if model is None else Path(model).absolute(),
        read_text(list(calib)) if calib else None,
        lambda words: console.err.print(words, markup=False, soft_wrap=True),
    )
    target = Path(out) if out else directory.with_name(directory.name + ".html")
    write_text(target, page.render(artifact_page(directory, measured)))
    console.out.print(f"wrote {target}", markup=False, soft_wrap=True)
