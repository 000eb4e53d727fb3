"""bitwright eval: perplexity with its protocol."""

from __future__ import annotations

import json

import typer

from bitwright.cli import console, options


def command(
    path: options.ModelOrArtifact,
    text: list[str] = typer.Option(..., "--text", help="evaluation text: .txt, .txt.xz or .jsonl; may be repeated"),
    join: str = typer.Option("none", help="join the text's lines first: none, space (the papers' PTB), blank-line"),
    window: int | None = typer.Option(None, min=2, help="tokens a window; default 2048 or the model's context"),
    windows: int | None = typer.Option(None, "--windows", min=1, help="at most so many windows"),
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Token perplexity in the papers' protocol, activation and cache quantizers at work."""
    from bitwright.calibration.text import JOINS, read_text
    from bitwright.errors import TextError
    from bitwright.evaluation import evaluate

    if join not in JOINS:
        raise TextError(f"--join {join!r} is not one of {', '.join(JOINS)}")
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
