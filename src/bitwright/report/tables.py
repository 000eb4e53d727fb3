"""The table of a comparison, the same for terminal, page and spreadsheet: a row a method, as in the papers' tables."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from bitwright.report.figures import pareto_front


@dataclass(frozen=True)
class Column:
    """A heading; `left` for words."""

    name: str
    left: bool = False


@dataclass(frozen=True)
class Row:
    """Cells as printed; `marked`: columns of the texts on whose Pareto front the method is."""

    cells: list[str]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]


def text_names(results: dict[str, Any]) -> list[str]:
    """Names of the texts, told apart where files of one name differ."""
    names = [text["name"] for text in results["texts"]]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def perplexity_word(value: float | None) -> str:
    """Perplexities of broken models are large: a number of three decimals, none, or an exponent; None is infinite."""
    if value is None:
        return "infinite"
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def widths(row: dict[str, Any]) -> str:
    """Bits of weights, activations and cache, as `2/4/4`, or `2 to 3/4/4` where sites have bits of their own; nothing
    where no artifact was made."""
    recipe = row["recipe"]
    if recipe is None:
        return f"{row['linear_bits']:.0f}/16/16"
    if row["weight_bits"] is None:
        return ""
    return "/".join(
        [row["weight_bits"], *(str((recipe[part] or {"bits": 16})["bits"]) for part in ("activations", "kv"))]
    )


def points(results: dict[str, Any], text: int) -> list[tuple[int, float, float]]:
    """(number in the table, honest bits of the linears, perplexity) of the quantized models where it is finite."""
    found = []
    for number, row in enumerate(results["methods"], 1):
        measured = row["measured"][text]
        if row["recipe"] is not None and measured and measured["perplexity"] is not None:
            found.append((number, row["linear_bits"], measured["perplexity"]))
    return found


def comparison_table(results: dict[str, Any]) -> Table:
    """Number, method, widths, int8 channels, honest bits, then perplexity and excess of each text, and seconds."""
    names, methods = text_names(results), results["methods"]
    claimed = any(row["claimed_bits"] is not None for row in methods)
    with_excess = any(row["recipe"] is None for row in methods)
    columns = [Column("method", left=True), Column("W/A/KV bits"), Column("int8 channels")]
    columns += [Column("bits a weight"), Column("bits a parameter")]
    if claimed:
        columns.append(Column("claimed bits"))
    for name in names:
        columns.append(Column(f"perplexity, {name}"))
        if with_excess:
            columns.append(Column(f"excess, {name}"))
    columns.append(Column("seconds"))
    fronts = []
    for text in range(len(names)):
        drawn = points(results, text)
        fronts.append({drawn[index][0] for index in pareto_front([point[1:] for point in drawn])})
    rows = []
    for number, row in enumerate(methods, 1):
        low, high = row["outliers"] or (None, None)
        failed = f" (failed: {row['failed']})" if row["failed"] else ""
        cells = [f"{number}. {row['label']}{failed}", widths(row)]
        cells.append("" if low is None else str(low) if low == high else f"{low} to {high}")
        kinds = ["linear_bits", "model_bits", *(["claimed_bits"] if claimed else [])]
        cells += ["" if row[kind] is None else f"{row[kind]:.4f}" for kind in kinds]
        marked = set()
        for measured, front in zip(row["measured"], fronts, strict=True):
            if number in front:
                marked.add(len(cells))
            cells.append(perplexity_word(measured["perplexity"]) if measured else "failed")
            if with_excess:
                excess = measured and measured["excess"]
                cells.append("" if row["recipe"] is None or excess is None else f"{excess:.4f}")
        cells.append("" if row["quantize_seconds"] is None else f"{row['quantize_seconds']:.0f}")
        rows.append(Row(cells, frozenset(marked)))
    notes = [
        "Bits a weight: everything on disk that the quantized linears need, over their weights; bits a parameter: the"
        " whole model's weight files, embeddings and head included. Seconds: of quantizing, without measuring."
    ]
    if any(row.marked for row in rows):
        notes.append(
            "Marked perplexities are on the Pareto front: no other method is better with as many bits or less,"
            " or as good with less."
        )
    if skipped := results["skipped"]:
        notes.append(f"Left out, because they are no presets or do not fit the model: {', '.join(skipped)}.")
    if unfinished := results["unfinished"]:
        notes.append(f"Not measured yet: {', '.join(unfinished)}; the same command goes on.")
    if with_excess:
        notes.append("Excess = ln(perplexity / perplexity of the original), on the same text and protocol.")
    if claimed:
        notes.append("Claimed bits: as the method's authors count, where that is less than what must be stored.")
    return Table("; ".join(results["titles"]) or "Methods", columns, rows, notes)


CSV_COLUMNS = (
    "label", "method", "text", "text_sha256", "perplexity", "excess", "bits_per_byte", "loss", "tokens", "windows",
    "linear_bits", "claimed_bits", "model_bits", "bytes", "quantize_seconds", "evaluate_seconds", "protocol",
    "failed",
)  # fmt: skip


def to_csv(results: dict[str, Any]) -> str:
    """A line for each method and text, all figures in full; `failed` says why a method has none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in results["methods"]:
        for text, measured in zip(results["texts"], row["measured"], strict=True):
            found = measured or {"text": text["name"], "text_sha256": text["sha256"]}
            writer.writerow(row | found | {"evaluate_seconds": found.get("seconds")})
    return out.getvalue()
