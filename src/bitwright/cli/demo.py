"""bitwright demo: the main job on a model that ships with the package, offline, in under two minutes."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from bitwright.cli import console, options


def command(
    out: str | None = typer.Option(None, help="keep the artifact in this directory (default: a temporary one)"),
    preset: options.Preset = None,
    set_: options.Set = [],  # noqa: B006
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize the demo model, measure both, and let both speak."""
    from bitwright.demo.run import SEQUENCES, run_demo

    recipe = console.recipe_from(preset, None, [f"calibration.sequences={SEQUENCES}", *set_])
    began = time.monotonic()
    reporter = console.RunReporter()
    with tempfile.TemporaryDirectory(prefix="bitwright-demo-") as scratch:
        try:
            result = run_demo(Path(out) if out else Path(scratch) / "artifact", recipe, threads, reporter)
        finally:
            reporter.close()
    result |= {"seconds": time.monotonic() - began, "kept": out}
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"demo model, recipe {result['recipe']}")
    for column in ("", "original", "quantized"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = result["original"], result["quantized"]
    table.add_row("perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}")
    table.add_row("bits per byte of text", f"{before['bits_per_byte']:.4f}", f"{after['bits_per_byte']:.4f}")
    table.add_row("linears, bits a weight", f"{result['original_bits']:.4f}", f"{result['linear_bits']:.4f}")
    table.add_row("whole model, bits a parameter", f"{result['original_bits']:.4f}", f"{result['model_bits']:.4f}")
    table.add_row("weight files", f"{result['original_bytes']:,} bytes", f"{result['total_bytes']:,} bytes")
    console.out.print(table)
    console.out.print(f"excess: ln({after['perplexity']:.3f} / {before['perplexity']:.3f}) = {result['excess']:.4f}")
    console.out.print(f"text: {after['text']}, sha256 {after['text_sha256']}", markup=False, soft_wrap=True)
    console.out.print(f"protocol: {after['protocol']}", markup=False, soft_wrap=True)
    for name in ("original", "quantized"):
        console.out.print(f"\n[bold]{name}[/bold] continues:")
        console.out.print(result["samples"][name], markup=False, soft_wrap=True)
    console.out.print(f"\n{result['seconds']:.0f} s")
    if result["kept"]:
        console.out.print(f"the artifact is in {result['kept']}", markup=False, soft_wrap=True)
