"""bitwright report: a page of one artifact."""

from __future__ import annotations

from pathlib import Path

import typer

from bitwright.cli import console


def command(
    artifact: str = typer.Argument(..., help="artifact directory"),
    out: str | None = typer.Option(None, "--out", help="HTML file to write; default ARTIFACT.html beside it"),
) -> None:
    """Write one self-contained HTML page: sizes, perplexities, error by layer and site, recipe and provenance."""
    from bitwright.artifact.shards import write_text
    from bitwright.report import figures, page
    from bitwright.report.artifact import artifact_page

    figures.require_matplotlib()
    directory = Path(artifact).absolute()
    target = Path(out) if out else directory.with_name(directory.name + ".html")
    write_text(target, page.render(artifact_page(directory)))
    console.out.print(f"wrote {target}", markup=False, soft_wrap=True)
