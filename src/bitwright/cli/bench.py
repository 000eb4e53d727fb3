"""bitwright bench: how fast the kernels and a model run on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from bitwright.cli import console, options

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.command("kernels")
def kernels(
    shape: list[str] = typer.Option(["llama-2-7b"], "--shape", help="llama-2-7b, llama-3-8b, qwen2.5-7b; repeatable"),
    tokens: str = typer.Option("1,4,16,128", help="numbers of tokens, comma-separated"),
    weights: int = typer.Option(2, min=1, max=8, help="bits of a weight's code; above 2 with a zero point a group"),
    activations: int = typer.Option(4, min=1, max=8, help="bits of an input channel"),
    threads: options.Threads = None,
    peers: bool = typer.Option(True, help="beside torch's bfloat16 and int8 products"),
    seconds: float = typer.Option(1.5, min=0.0, help="time for each measurement"),
    as_json: options.AsJson = False,
) -> None:
    """The product of each site, activation quantization included, beside a plain read of its bytes and torch."""
    import torch

    from bitwright.errors import BitwrightError
    from bitwright.evaluation.shapes import SHAPES, sites
    from bitwright.evaluation.speed import kernel_speed

    if unknown := [name for name in shape if name not in SHAPES]:
        raise BitwrightError(f"there is no shape {unknown[0]!r}; the shapes are {', '.join(SHAPES)}")
    try:
        counts = [int(word) for word in tokens.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise BitwrightError(f"--tokens {tokens!r} is no list of numbers such as 1,4,16")
    if threads:
        torch.set_num_threads(threads)
    work = [(name, site, size, count) for name in shape for site, size in sites(name).items() for count in counts]
    rows: list[dict[str, Any]] = []
    with console.counting("measuring", len(work)) as update:
        for done, (name, site, (height, width), count) in enumerate(work):
            sizes, widths = (height, width, count), (weights, activations)
            found = kernel_speed(*sizes, *widths, peers=peers, seconds=seconds)
            rows.append({"shape": name, "site": site, **found.to_dict()})
            update(done + 1)
    if as_json:
        print(json.dumps(rows))
        return
    names = sorted({peer for row in rows for peer in row["peer_ratios"]})
    table = Table(box=None)
    figures = ("tokens", "us", "GB/s", "over read", "GFLOP-eq/s", "of peak", *names)
    for heading in ("shape", "site", "rows x columns", *figures):
        table.add_column(heading, justify="left" if heading in ("shape", "site") else "right")
    for row in rows:
        ratios = [f"{row['peer_ratios'][name]:.1f} x" if name in row["peer_ratios"] else "" for name in names]
        table.add_row(
            row["shape"],
            row["site"],
            f"{row['rows']} x {row['columns']}",
            str(row["tokens"]),
            f"{row['seconds'] * 1e6:,.0f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['over_read']:.2f}",
            f"{row['gigaflops']:,.0f}",
            f"{row['of_peak']:.0%}" if row["of_peak"] else "",
            *ratios,
        )
    console.out.print(table)
    console.out.print(
        f"{weights}-bit codes, {activations}-bit inputs; {rows[0]['variant']}, {rows[0]['threads']} threads; medians of"
        " interleaved runs, activation quantization included. over read: time over reading the same bytes; of peak: of"
        " the multiply-adds of 2-bit codes and 4-bit inputs that the processor does on registers alone at that moment;"
        " torch columns: their time over ours."
    )


@app.command("model")
def model(
    which: str = typer.Argument(..., metavar="SHAPE|DIR", help="llama-2-7b, llama-3-8b, qwen2.5-7b, or an artifact"),
    prompt: int = typer.Option(128, min=1, help="tokens of the prompt"),
    tokens: int = typer.Option(32, min=1, help="tokens to decode"),
    layers: int | None = typer.Option(None, min=1, help="build only so many blocks of a shape"),
    embedding: int = typer.Option(16, help="bits of a shape's embedding: 16, 8 or 4"),
    head: int = typer.Option(16, help="bits of a shape's output head: 16, 8 or 4"),
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Prefill and decode speed of a whole model. A shape by name is built with random packed weights."""
    import torch

    from bitwright.errors import BitwrightError
    from bitwright.evaluation import load
    from bitwright.evaluation.shapes import SHAPES, random_model
    from bitwright.evaluation.speed import model_speed
    from bitwright.recipe import preset
    from bitwright.runtime.decoder import Decoder

    if threads:
        torch.set_num_threads(threads)
    recipe = preset("bwa").with_options(
        {"activations.balance": "none", "outer.embedding": embedding, "outer.head": head}
    )
    if which in SHAPES:
        with console.err.status(f"building {which} with random weights"):
            built = random_model(which, recipe, layers)
    elif Path(which).is_dir():
        if embedding != 16 or head != 16 or layers is not None:
            raise BitwrightError(f"--embedding, --head and --layers are for shapes; {which} is measured as it is")
        built = load(which)
        if reason := Decoder.why_not(built):
            raise BitwrightError(f"{which} does not run on the lean path: {reason}")
    else:
        raise BitwrightError(f"{which!r} is neither a directory nor one of the shapes {', '.join(SHAPES)}")
    with console.counting("decoding", tokens) as update:
        found = model_speed(built, which, prompt, tokens, update)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console.out.print(f"prefill      {found.prefill_tokens_per_second:,.1f} tokens/s ({prompt} tokens)")
    console.out.print(f"first token  after {found.first_token_seconds:.2f} s")
    console.out.print(f"decode       {found.decode_tokens_per_second:,.2f} tokens/s (median of {tokens})")
    console.out.print(
        f"generate()   {found.generate_tokens_per_second:,.2f} tokens/s through transformers,"
        f" {found.generate_over_decode:.2f} x the time of a decode step"
    )
    console.out.print(
        f"memory       {found.decode_gigabytes_per_second:.1f} GB/s moved,"
        f" {found.read_gigabytes_per_second:.1f} GB/s readable: {found.of_read_rate:.0%};"
        f" {console.size(found.bytes_per_token)} of weights a token"
    )
    console.out.print(f"resident     {console.size(found.resident_bytes)} at most")
    console.out.print(f"{found.variant}, {found.threads} threads")
