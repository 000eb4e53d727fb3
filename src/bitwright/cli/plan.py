"""bitwright plan: every layer, exact bytes and bits, memory and disk, from headers alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from bitwright.cli import console, options

if TYPE_CHECKING:
    from bitwright.pipeline import Plan


def command(
    model: str = typer.Argument(..., help="Hugging Face model directory"),
    preset: options.Preset = None,
    recipe: options.RecipeFile = None,
    set_: options.Set = [],  # noqa: B006
    outliers: options.Outliers = None,
    target_bits: options.TargetBits = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Print what `quantize` will write and need without reading a weight: exact to the byte, or where it chooses bits
    (allocate) at most."""
    from bitwright.pipeline import plan

    made = plan(
        model,
        console.recipe_from(
            preset, recipe, set_, target_bits=target_bits, weights__outliers=console.outliers_option(outliers)
        ),
        threads=threads,
    )
    if as_json:
        print(json.dumps(made.to_dict()))
    else:
        show(made)


def show(plan: Plan) -> None:
    """Tables for people."""
    from rich.table import Table

    before = ", before bits are chosen" if plan.recipe.allocate else ""
    layers = Table(title=f"{plan.model} ({plan.architecture}), recipe {plan.recipe.name}{before}")
    for column in ("linear", "site", "shape", "outliers", "bytes", "bits a weight"):
        layers.add_column(column, justify="left" if column in ("linear", "site") else "right")
    for layer in plan.layers:
        layers.add_row(
            layer.name,
            layer.site,
            f"{layer.spec.rows} x {layer.spec.columns}",
            str(layer.spec.outliers),
            f"{layer.bytes:,}",
            f"{layer.bits_per_weight:.4f}",
        )
    console.out.print(layers)
    totals = Table(show_header=False)
    most = "at most " if plan.recipe.allocate else ""
    linear_bits = plan.bound * 8 / plan.linear_weights
    totals.add_row("quantized linears", f"{plan.linear_weights:,} weights, {most}{plan.bound:,} bytes")
    totals.add_row("", f"{most}{linear_bits:.4f} bits a weight, all counted")
    if plan.claimed_bits is not None:
        totals.add_row(
            "", f"{plan.claimed_bits:.4f} by the method's own formula, which leaves out the group of a weight"
        )
    whole, most = plan.total_bound, "at most about " if most else ""  # headers have numbers of bits in them, too
    totals.add_row("whole model", f"{plan.parameters:,} parameters, {most}{whole:,} bytes of weight files")
    bits = whole * 8 / plan.parameters
    totals.add_row("", f"{most}{bits:.4f} bits a parameter, embeddings and head included")
    ratio = plan.original_bytes / whole
    totals.add_row("original", f"{plan.original_bytes:,} bytes, {'about ' if most else ''}{ratio:.2f} times as large")
    for name in plan.outer:
        totals.add_row(name, f"{plan.outer_bits(name):.4f} bits a weight, {plan.outer_bytes(name):,} bytes")
    kept = "norms, and an embedding or head not named above" if plan.outer else "embeddings, norms, head"
    totals.add_row("kept as they are", f"{len(plan.kept)} tensors ({kept})")
    for note in plan.notes:
        totals.add_row("note", note)
    if plan.ignored:
        totals.add_row(
            "not in the model", f"{len(plan.ignored)} tensors of the files are left out: {plan.ignored[0]}, ..."
        )
    totals.add_row("the run needs", f"at most about {console.size(plan.peak_memory)} of memory")
    totals.add_row("", f"at most {console.size(plan.work_disk)} of disk, the output included")
    console.out.print(totals)
