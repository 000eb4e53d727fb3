"""A Hugging Face directory of safetensors, read tensor by tensor; nothing stays mapped between reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.errors import ModelError

READABLE_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `name` is that in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_json(path: Path, error: type[Exception] = ModelError) -> dict[str, Any]:
    """A JSON object from a file of the model; problems are told by the file's name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(data, dict):
        raise error(f"{path} holds a JSON {type(data).__name__}; an object was expected")
    return data


def read_header(path: Path, error: type[Exception] = ModelError) -> dict[str, Any]:
    """The JSON header of a safetensors file, after checking that the file is as long as the header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(
                    f"{path} is truncated or no safetensors file: {size} bytes, and its header should have {length}"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise error(f"{path} is no safetensors file: its header is not JSON") from None
    try:
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if not isinstance(entry["dtype"], str) or min(begin, end - begin, *entry["shape"], 0) < 0:
                raise ValueError
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise error(
            f"{path} is damaged: its safetensors header has no dtype, shape and offsets for every tensor"
        ) from None
    if size != 8 + length + end:
        raise error(f"{path} is truncated or damaged: {size} bytes, its header asks for {8 + length + end}")
    return header


class Checkpoint:
    """The weights of one model directory: names, shapes and dtypes from headers, values on demand.

    `changes` is what the model's config has in place of what its file says.
    """

    changes: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.exists():
            raise ModelError(
                f"there is no model directory {directory}; give a local Hugging Face directory"
                " (a hub model is fetched with: hf download NAME --local-dir DIR)"
            )
        if not self.directory.is_dir():
            raise ModelError(f"{directory} is a file; give the model directory that holds config.json and the weights")
        self.config = read_json(self.directory / "config.json")
        self.tensors = self._read_headers()

    def _read_headers(self) -> dict[str, TensorInfo]:
        index = self.directory / INDEX_NAME
        expected: dict[str, str] | None = None
        if index.exists():
            expected = read_json(index).get("weight_map")
            if not isinstance(expected, dict) or not expected:
                raise ModelError(f"{index} has no weight_map")
            if not all(isinstance(file, str) for file in expected.values()):
                raise ModelError(f"{index} is damaged: its weight_map must give the name of a file for each tensor")
            files = sorted(set(expected.values()))
        elif (self.directory / SINGLE_NAME).exists():
            files = [SINGLE_NAME]
        else:
            found = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f"; found {found[0]}: convert it to safetensors first" if found else ""
            raise ModelError(f"{self.directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, entry in read_header(self.directory / file).items():
                begin, end = entry["data_offsets"]
                tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, end - begin)
        for name in expected or {}:
            if name not in tensors:
                raise ModelError(f"tensor {name} is named in {index} but is not in {self.directory / expected[name]}")  # type: ignore[index]
        return tensors

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors otherwise than the files do: {name in the files: the name from now on}."""
        self.tensors = {names.get(name, name): info for name, info in self.tensors.items()}

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelError(
                f"tensor {name} is missing from {self.directory}; the checkpoint is incomplete or of another model"
            )
        return self.tensors[name]

    def elements(self, name: str) -> int:
        """Numbers that the files hold of a tensor."""
        return self.info(name).elements

    def load(self, names: list[str], dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """Values of `names`, copied out of the files, in `dtype` or as stored. NaN and infinity are refused."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.info(name).file, []).append(name)
        values: dict[str, Tensor] = {}
        for file, members in by_file.items():
            path = self.directory / file
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in members:
                        self._check_dtype(name)
                        stored = handle.get_tensor(self.tensors[name].name)
                        values[name] = stored.clone() if dtype is None else stored.to(dtype, copy=True)
                        del stored
            except (SafetensorError, OSError) as problem:
                raise ModelError(f"cannot read {path}: {problem}") from None
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise ModelError(
                    f"tensor {name} in {self.directory / self.tensors[name].file} holds {bad} NaN or infinite"
                    f" value{'s' if bad > 1 else ''}; the checkpoint is damaged or its training diverged"
                )
        return values

    def _check_dtype(self, name: str) -> None:
        info = self.tensors[name]
        if info.dtype not in READABLE_DTYPES:
            raise ModelError(
                f"tensor {name} in {self.directory / info.file} has dtype {info.dtype}; expected one of"
                f" {', '.join(READABLE_DTYPES)} (is the model already quantized?)"
            )

    def check_dtypes(self, names: list[str]) -> None:
        for name in names:
            self.info(name)
            self._check_dtype(name)

    def digests(self, on_bytes: Callable[[int], None] | None = None) -> dict[str, str]:
        """sha256 of config.json and of every weight file."""
        names = ["config.json", *self.files]
        return {name: sha256_file(self.directory / name, on_bytes) for name in names}


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 of a file in hex; `on_bytes` is told of each chunk's length."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()
