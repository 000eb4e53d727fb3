"""Writing safetensors files, byte for byte predictable: a plan knows their size, and equal tensors give equal files.

The safetensors library reads them; the writer is ours because its order and padding are part of docs/format.md and of
the reproducibility promise: tensors by falling element size, then by name, so that each one is aligned.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bitwright.artifact.layout import Shape

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def shape_bytes(shape: Shape) -> int:
    return math.prod(shape[1]) * shape[0].itemsize


def _order(shapes: Mapping[str, Shape]) -> list[str]:
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def header_bytes(shapes: Mapping[str, Shape]) -> bytes:
    """The whole header, its 8-byte length in front, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _order(shapes):
        dtype, shape = shapes[name]
        end = offset + shape_bytes(shapes[name])
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(shapes: Mapping[str, Shape]) -> int:
    """Size of the file that `write_shard` makes of tensors of these shapes."""
    return len(header_bytes(shapes)) + sum(shape_bytes(shape) for shape in shapes.values())


@dataclass(frozen=True)
class WrittenShard:
    """What the manifest keeps of a shard: its size, its sha256, and the sha256 of the bytes of each tensor."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> WrittenShard:
    """Write, fsync, rename: the file is there whole or not at all."""
    shapes: dict[str, Shape] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    digests: dict[str, str] = {}
    size = 0

    def write(file: BinaryIO) -> None:
        nonlocal size
        header = header_bytes(shapes)
        digest.update(header)
        file.write(header)
        size = len(header)
        for name in _order(shapes):
            raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(raw)
            digests[name] = hashlib.sha256(raw).hexdigest()
            file.write(raw)
            size += raw.nbytes

    write_atomically(path, write)
    return WrittenShard(size, digest.hexdigest(), digests)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, fsync it, rename it into place, fsync the directory."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk says nothing of where
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """As write_atomically, for a whole text in UTF-8."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8"))

    write_atomically(path, write)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # pragma: no cover - directories cannot be opened on some systems
        return
    try:
        os.fsync(handle)
    except OSError:  # pragma: no cover
        pass
    finally:
        os.close(handle)
