"""bitwright quantize: a model directory in, an artifact out."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import typer

from bitwright.cli import console, options

if TYPE_CHECKING:
    from bitwright.pipeline import Quantized


def command(
    model: str = typer.Argument(..., help="Hugging Face model directory"),
    output: str = typer.Argument(..., help="directory to write; must not exist"),
    more: list[str] = typer.Argument(None, metavar="FILE", help="further files for --calib"),
    calib: list[str] = typer.Option(..., "--calib", help="calibration text: .txt, .txt.xz or .jsonl; one or several"),
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    set_: options.Set = [],  # noqa: B006
    outliers: options.Outliers = None,
    target_bits: options.TargetBits = None,
    tune: bool = typer.Option(
        False, "--tune", help="tune levels, scales and norms by the original's logits afterwards"
    ),
    sequences: int | None = typer.Option(None, min=1, help="calibration segments"),
    length: int | None = typer.Option(None, min=8, help="tokens a segment"),
    seed: int | None = typer.Option(None, min=0, help="seed of the segments"),
    eval_text: list[str] = typer.Option([], "--eval-text", help="text to measure both models on, for the card"),
    eval_windows: int = typer.Option(32, min=1, help="windows of it"),
    threads: options.Threads = None,
    restart: bool = typer.Option(False, help="drop an unfinished run on this output"),
    log: str | None = typer.Option(None, help="JSON lines, one a linear; default OUTPUT.log.jsonl"),
    as_json: options.AsJson = False,
) -> None:
    """Quantize block by block. Killed at any moment, the same command goes on and ends with the same bytes."""
    from bitwright.calibration import read_text
    from bitwright.pipeline import quantize

    asked = console.recipe_from(
        preset,
        recipe,
        set_,
        tune=tune,
        target_bits=target_bits,
        weights__outliers=console.outliers_option(outliers),
        calibration__sequences=sequences,
        calibration__length=length,
        calibration__seed=seed,
    )
    reporter = console.RunReporter()
    began = time.monotonic()
    try:
        result = quantize(
            model,
            output,
            asked,
            read_text([*calib, *(more or [])]),
            evaluation=read_text(list(eval_text)) if eval_text else None,
            evaluation_windows=eval_windows,
            threads=threads,
            restart=restart,
            log_file=log,
            reporter=reporter,
        )
    finally:
        reporter.close()
    seconds = time.monotonic() - began
    if as_json:
        print(json.dumps(summary(result) | {"seconds": seconds}))
    else:
        show(result, seconds)


def summary(result: Quantized) -> dict[str, Any]:
    plan = result.plan
    return {
        "output": str(result.directory),
        "linear_bits": plan.linear_bits,
        "model_bits": plan.model_bits,
        "total_bytes": plan.total_bytes,
        "original_bytes": plan.original_bytes,
        "measured": result.measured,
        **({"tuning": result.tuning} if result.tuning else {}),
    }


def show(result: Quantized, seconds: float) -> None:
    plan = result.plan
    console.out.print(f"wrote {result.directory} in {seconds:.0f} s", markup=False, soft_wrap=True)
    console.out.print(
        f"linears {plan.linear_bits:.4f} bits a weight, whole model {plan.model_bits:.4f} bits a parameter;"
        f" {plan.original_bytes:,} -> {plan.total_bytes:,} bytes"
    )
    if result.tuning:
        console.out.print(
            f"tuned for {result.tuning['steps']} steps: divergence of the logits on calibration text held back"
            f" {result.tuning['before']:.4f} -> {result.tuning['after']:.4f}"
        )
    for part, row in result.measured.items():
        console.out.print(
            f"perplexity on the {part} text: {math.exp(row['loss_original']):.4f} ->"
            f" {math.exp(row['loss_quantized']):.4f}, excess {row['excess']:.4f}"
            f" ({row['windows']} windows of {row['length']})"
        )
