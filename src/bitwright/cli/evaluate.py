"""bitwright eval: perplexity with its protocol."""

from __future__ import annotations

import json

import typer

from bitwright.cli import console, options


def command(
    path: options.ModelOrArtifact,
    text: list[str] = typer.Option(..., "--text", help="evaluation text: .txt, .txt.xz or .jsonl; may be repeated"),
    join: options.Join = "none",
    window: options.Window = None,
    windows: options.Windows = None,
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Token perplexity in the papers' protocol, activation and cache quantizers at work."""
    from bitwright.calibration.text import check_join, read_text
    from bitwright.evaluation import evaluate

    check_join(join)
    read = read_text(list(text), join)
    with console.counting("evaluating", 1) as update:
        result = evaluate(path, read, window=window, limit=windows, dtype=dtype, threads=threads, on_window=update)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    console.out.print(f"perplexity     {result.perplexity:.4f}")
    console.out.print(f"bits per byte  {result.bits_per_byte:.4f}")
    console.out.print(f"text           {result.text}, sha256 {result.text_sha256}", markup=False, soft_wrap=True)
    console.out.print(f"tokens         {result.tokens:,} in {result.windows} windows")
    console.out.print(f"protocol       {result.protocol}", markup=False, soft_wrap=True)
