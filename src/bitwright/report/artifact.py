"""The page of one artifact, from its manifest, its config and the headers of its weight files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bitwright.artifact.layout import bits_word
from bitwright.artifact.manifest import read_manifest
from bitwright.errors import ArtifactError
from bitwright.models.checkpoint import read_header, read_json
from bitwright.report.page import Page, bits_section, common_provenance, error_section, recipe_setting
from bitwright.report.tables import Column, Row, Table, perplexity_word


def artifact_page(directory: Path) -> Page:
    """Sizes, measured perplexities, errors, recipe and provenance. Raises ArtifactError where it is no artifact."""
    manifest = read_manifest(directory)
    config = read_json(directory / "config.json", ArtifactError)
    layers = manifest["layers"]
    recipe = manifest["recipe"]
    stored = config["quantization_config"]
    mixed = [("", layers)] if stored["recipe"].get("sites") else []
    weight_bits = bits_word(spec["bits"] for spec in stored["layers"].values())
    return Page(
        title=f"{manifest['model']['name']}, quantized with recipe {recipe['name']}",
        subtitle=f"{config['architectures'][0]}; every figure is from the artifact's manifest and headers."
        " `bitwright verify` checks every byte.",
        tables=[
            _sizes(directory, manifest, config),
            _quality(manifest, weight_bits),
        ],
        sections=[*bits_section(mixed), error_section([("", layers)])],
        settings=[recipe_setting(f"recipe {recipe['name']}", recipe, layers)],
        provenance=common_provenance(manifest),
    )


def _sizes(directory: Path, manifest: dict[str, Any], config: dict[str, Any]) -> Table:
    names = set(config["quantization_config"]["layers"])
    shards = [name for name in manifest["files"] if name.endswith(".safetensors")]
    kept = kept_bytes = 0
    for shard in shards:
        for tensor, entry in read_header(directory / shard, ArtifactError).items():
            owner, _, part = tensor.rpartition(".")
            if owner in names and part != "bias":
                continue
            kept += math.prod(entry["shape"])
            kept_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
    weights = sum(math.prod(layer["shape"]) for layer in manifest["layers"])
    # Honest bytes of a linear are whole numbers; the manifest holds them as bits a weight.
    linear_bytes = sum(round(layer["bits"] * math.prod(layer["shape"]) / 8) for layer in manifest["layers"])
    total = sum(manifest["files"][shard]["bytes"] for shard in shards)
    rows = [
        ("quantized linears, all counted", weights, linear_bytes),
        ("kept as they are: embeddings, norms, head, biases", kept, kept_bytes),
        ("whole model, headers included", weights + kept, total),
    ]
    return Table(
        "Size, all bits counted",
        [Column("", left=True), Column("parameters"), Column("bytes"), Column("bits each")],
        [
            Row([name, f"{count:,}", f"{size:,}", f"{size * 8 / count:.4f}" if count else ""])
            for name, count, size in rows
        ],
        ["Counted are codes, levels, scales, outliers and permutations."],
    )


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
