"""The page of one artifact, from its manifest, its config and the headers of its weight files, and what was measured
for the page (report.fresh)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bitwright.artifact.layout import bits_word
from bitwright.artifact.manifest import read_manifest
from bitwright.errors import ArtifactError
from bitwright.models.checkpoint import read_json
from bitwright.report.fresh import Fresh
from bitwright.report.page import (
    Page,
    Section,
    Setting,
    activations_section,
    bits_section,
    common_provenance,
    error_section,
    recipe_setting,
)
from bitwright.report.tables import Column, Row, Table, perplexity_word


def artifact_page(directory: Path, fresh: Fresh | None = None) -> Page:
    """Sizes, perplexities, errors, activations where they were measured, recipe and provenance.

    Raises ArtifactError where it is no artifact.
    """
    fresh = fresh or Fresh()
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
    measured = [_measured_now(fresh, manifest)] if fresh.quantized else []
    activations = [_activations(fresh)] if fresh.before else []
    from_files = "every figure is from the artifact's manifest and headers"
    if measured or activations:
        from_files += ", but for what is said to be measured for this page"
    return Page(
        title=f"{manifest['model']['name']}, quantized with recipe {recipe['name']}",
        subtitle=f"{config['architectures'][0]}; {from_files}. `bitwright verify` checks every byte.",
        tables=[
            _sizes(manifest["sizes"]),
            _quality(manifest, weight_bits),
            *measured,
        ],
        sections=[*bits_section(mixed), error_section([("", layers)]), *activations],
        settings=[recipe_setting(f"recipe {recipe['name']}", recipe, layers), *_clip_ratios(manifest)],
        provenance=[*_protocols(fresh), *common_provenance(manifest)],
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
        name = _named(manifest[part]["name"], part == "calibration")
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


def _named(text: str, calibrated: bool) -> str:
    return f"{text} (calibrated on: flatters)" if calibrated else text


def _measured_now(fresh: Fresh, manifest: dict[str, Any]) -> Table:
    """A row a text; what needs the original is left out where it was not at hand."""
    beside = bool(fresh.original)
    columns = [Column("text", left=True), Column("windows")]
    columns += [Column("original"), Column("quantized"), Column("excess")] if beside else [Column("quantized")]
    rows = []
    for index, found in enumerate(fresh.quantized):
        cells = [
            _named(found.text, found.text_sha256 == manifest["calibration"]["sha256"]),
            f"{found.windows} × {found.tokens // found.windows}",
        ]
        if beside:
            before = fresh.original[index]
            cells += [_perplexity(before.loss), _perplexity(found.loss), f"{found.loss - before.loss:.4f}"]
        else:
            cells.append(_perplexity(found.loss))
        rows.append(Row(cells))
    notes = ["Perplexity a token, by `bitwright eval`'s protocol, which stands under Provenance."]
    if beside:
        notes.append("Excess = ln(quantized / original).")
    return Table("Quality, measured for this page", columns, rows, notes)


def _activations(fresh: Fresh) -> Section:
    on = f"{fresh.on}, measured for this page"
    if fresh.after:
        return activations_section(fresh.before, on, [(fresh.after, "As quantized by this artifact.")], "")
    lacking = "The artifact keeps these channels as they are, or activations in 16 bits: it has no curves of its own."
    return activations_section(fresh.before, on, [], lacking)


def _protocols(fresh: Fresh) -> list[tuple[str, str]]:
    return [row for found in fresh.quantized for row in (
        (f"protocol, {found.text}", found.protocol), (f"text {found.text}", f"sha256 {found.text_sha256}")
    )]  # fmt: skip


def _clip_ratios(manifest: dict[str, Any]) -> list[Setting]:
    """Those that a search found, by inputs or cache; nothing where none was asked for."""
    found = manifest.get("search")
    if not found:
        return []
    options = [
        (
            entry["target"],
            f"{entry['ratio']:.5g}, after {len(entry['tried']) + len(entry.get('errors', ()))} evaluations",
        )
        for entry in found
    ]
    return [Setting("clip ratios", f"searched by {manifest['recipe']['search']['method']}", options, [])]


def _perplexity(loss: float) -> str:
    return perplexity_word(math.exp(loss) if loss < 700 else None)
