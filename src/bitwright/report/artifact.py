"""The page of one artifact, from its manifest, its config and the headers of its weight files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bitwright.artifact.layout import bits_word
from bitwright.artifact.manifest import read_manifest
from bitwright.errors import ArtifactError
from bitwright.models.checkpoint import read_json
from bitwright.report.page import Page, bits_section, common_provenance, error_section, recipe_setting
from bitwright.report.tables import Column, Row, Table, perplexity_word


def artifact_page(directory: Path) -> Page:
    """Sizes, measured perplexities, errors, recipe and provenance. Raises ArtifactError where it is no artifact."""
    manifest = read_manifest(directory)
    config = read_json(directory / "config.json", ArtifactError)
    layers = manifest["layers"]
    recipe = manifest["recipe"]
    stored = config["quantization_config"]
    if "sizes" not in manifest:
        raise ArtifactError(
            f"{directory} was quantized by an earlier version of bitwright: quantize it again for a page"
        )
    mixed = [("", layers)] if stored["recipe"].get("sites") else []
    weight_bits = bits_word(spec["bits"] for spec in stored["layers"].values())
    return Page(
        title=f"{manifest['model']['name']}, quantized with recipe {recipe['name']}",
        subtitle=f"{config['architectures'][0]}; every figure is from the artifact's manifest and headers."
        " `bitwright verify` checks every byte.",
        tables=[
            _sizes(manifest["sizes"]),
            _quality(manifest, weight_bits),
        ],
        sections=[*bits_section(mixed), error_section([("", layers)])],
        settings=[recipe_setting(f"recipe {recipe['name']}", recipe, layers)],
        provenance=common_provenance(manifest),
    )


def _sizes(sizes: dict[str, Any]) -> Table:
    """Parameters are those of the original: what a method adds (a head of its own, zeros) counts as bytes alone."""
    outer = sizes["outer"]
    kept = "norms, biases, an embedding or head not named above" if outer else "embeddings, norms, head, biases"
    rows = [
        ("quantized linears, all counted", sizes["linears"]),
        *((f"{name} in integers", entry) for name, entry in outer.items()),
        (f"kept: {kept}", sizes["kept"]),
        ("whole model, headers included", sizes["model"]),
    ]
    notes = ["Counted are codes, levels, scales, outliers and permutations; parameters are those of the original."]
    if sizes["unties"]:
        notes.append("The head, which shared its weights with the embedding, is stored by itself.")
    return Table(
        "Size, all bits counted",
        [Column("", left=True), Column("parameters"), Column("bytes"), Column("bits each")],
        [Row([name, f"{entry['parameters']:,}", f"{entry['bytes']:,}", _each(entry)]) for name, entry in rows],
        notes,
    )


def _each(entry: dict[str, int]) -> str:
    return f"{entry['bytes'] * 8 / entry['parameters']:.4f}" if entry["parameters"] else ""


def _quality(manifest: dict[str, Any], weight_bits: str) -> Table:
    activations, cache = ((manifest["recipe"][part] or {"bits": 16})["bits"] for part in ("activations", "kv"))
    bits = f"weights {weight_bits}-bit, activations {activations}-bit, key-value cache {cache}-bit"
    rows = []
    for part, row in manifest["measured"].items():
        name = f"{manifest[part]['name']}{' (calibrated on: flatters)' if part == 'calibration' else ''}"
        before, after = (_perplexity(row[key]) for key in ("loss_original", "loss_quantized"))
        rows.append(Row([name, f"{row['windows']} × {row['length']}", before, after, f"{row['excess']:.4f}"]))
    return Table(
        "Quality, measured while quantizing",
        [
            Column("text", left=True),
            Column("windows"),
            Column("original"),
            Column("quantized"),
            Column("excess"),
        ],
        rows,
        [
            f"Perplexity a token: mean loss over the targets of each window, windows averaged; {bits}."
            " Excess = ln(quantized / original)."
        ],
    )


def _perplexity(loss: float) -> str:
    return perplexity_word(math.exp(loss) if loss < 700 else None)
