"""The manifest: every file of an artifact with its size and sha256, and every tensor with the sha256 of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.artifact.layout import FORMAT_VERSION, INDEX_NAME, MANIFEST_NAME, QUANT_METHOD
from bitwright.artifact.shards import write_text
from bitwright.errors import ArtifactError, BitwrightError
from bitwright.models.checkpoint import read_header, read_json, sha256_file

# What from_pretrained may read beside the files of an artifact: weights, configurations, code, templates, vocabularies.
READ_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".json", ".jinja", ".py"}
    | {".model", ".tiktoken"}
)
READ_NAMES = frozenset({"vocab.txt", "merges.txt"})
TEMPLATES = "additional_chat_templates"  # the one folder that tokenizers look into


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _rendered(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def write_manifest(directory: Path, shards: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the manifest of all files in `directory`; `shards` holds what is known of the weight files already.

    The manifest also holds the sha256 of its own content, so that damage to it is told from damage to the files.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name == MANIFEST_NAME:
            continue
        known = shards.get(path.name)
        files[path.name] = {
            "bytes": path.stat().st_size,
            "sha256": known["sha256"] if known else sha256_file(path),
        }
    content = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        **facts,
        "files": files,
        "tensors": {name: digest for entry in shards.values() for name, digest in entry["tensors"].items()},
    }
    content["sha256"] = hashlib.sha256(_canonical(content).encode()).hexdigest()
    write_text(directory / MANIFEST_NAME, _rendered(content))


def write_index(directory: Path, shards: dict[str, dict[str, Any]], total: int) -> None:
    """model.safetensors.index.json: which shard holds which tensor, for transformers."""
    weight_map = {name: shard for shard, entry in shards.items() for name in entry["tensors"]}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX_NAME, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an artifact, checked against its own sha256. Raises ArtifactError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"there is no artifact directory {directory}")
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise ArtifactError(
            f"{directory} has no {MANIFEST_NAME}: it is no bitwright artifact, or its manifest is missing"
        )
    content = read_json(path, ArtifactError)
    expected = content.get("sha256")
    rest = {key: value for key, value in content.items() if key != "sha256"}
    whole = hashlib.sha256(_canonical(rest).encode()).hexdigest() == expected and isinstance(content.get("files"), dict)
    # A flipped bit may leave the content as it is (1e-05 and 1E-05): the bytes must be those that were written, too.
    if not whole or path.read_bytes() != _rendered(content).encode():
        raise ArtifactError(f"{path} has changed since it was written: its content does not match its own sha256")
    return content


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`."""

    file: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


def verify(directory: str | Path, on_bytes: Callable[[int], None] | None = None) -> list[Problem]:
    """Compare every file with the manifest; an empty list means that the artifact is whole.

    Finds missing, truncated, grown and changed files; for a changed shard, names the tensors whose bytes differ. Finds
    files that the manifest does not know, of a kind that transformers reads: they may be read in place of others.
    Raises ArtifactError where there is no readable manifest to compare with.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    problems = []
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(Problem(name, "missing", f"{entry['bytes']} bytes were written"))
            continue
        size = path.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "grown"
            problems.append(Problem(name, kind, f"{size} bytes, {entry['bytes']} were written"))
        elif sha256_file(path, on_bytes) != entry["sha256"]:
            problems.append(Problem(name, "changed", _what_changed(path, manifest["tensors"])))
    for name in sorted(_read_by_transformers(directory) - manifest["files"].keys() - {MANIFEST_NAME}):
        problems.append(Problem(name, "unknown", "it was not written with the artifact, and may be read in its place"))
    return problems


def _read_by_transformers(directory: Path) -> set[str]:
    """Files of a directory that from_pretrained of a model or tokenizer may read, by their names."""
    found = [path for place in (directory, directory / TEMPLATES) if place.is_dir() for path in place.iterdir()]
    return {
        path.relative_to(directory).as_posix()
        for path in found
        if path.is_file() and (path.suffix in READ_SUFFIXES or path.name in READ_NAMES)
    }


def _what_changed(path: Path, digests: dict[str, str]) -> str:
    """Names of the tensors of a shard whose bytes are not those that were written."""
    if path.suffix != ".safetensors":
        return "its sha256 differs from the manifest"
    try:
        header = read_header(path, ArtifactError)
    except BitwrightError:
        return "its header differs"
    changed = []
    with path.open("rb") as file:
        base = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(base + begin)
            if hashlib.sha256(file.read(end - begin)).hexdigest() != digests.get(name):
                changed.append(name)
    return f"bytes differ in {', '.join(sorted(changed))}" if changed else "its header differs"
