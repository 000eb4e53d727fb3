from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bitwright.artifact.shards import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    file_bytes,
    header_bytes,
    shape_bytes,
    sync_directory,
    write_shard,
    write_text,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
layouts = st.dictionaries(
    names.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(sorted(DTYPE_NAMES, key=str)), shapes)
)


def fill(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Arbitrary bytes, NaNs and all."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(layouts, st.integers(0, 1000))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_library_reads_back_what_was_written(tmp_path: Path, layout: dict[str, Any], seed: int) -> None:
    tensors = {name: fill(shape, dtype, seed + i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    path = tmp_path / "shard.safetensors"
    written = write_shard(path, tensors)
    data = path.read_bytes()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(found[name]) == raw_bytes(tensor)
        assert written.tensors[name] == hashlib.sha256(raw_bytes(tensor)).hexdigest()
    assert len(data) == written.bytes == file_bytes(layout)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@given(layouts)
@settings(max_examples=40, deadline=None)
def test_header(layout: dict[str, Any]) -> None:
    """Aligned to 8; tensors by falling element size, then by name, without gaps, each aligned to its element."""
    data = header_bytes(layout)
    length = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + length
    assert length % 8 == 0
    text = data[8:].rstrip(b" ").decode()
    assert text.startswith('{"__metadata__":{"format":"pt"}')
    assert ": " not in text.replace('": "', "") or any(": " in name for name in layout)
    entries = json.loads(text)
    del entries["__metadata__"]
    offset, before = 0, None
    for name, entry in entries.items():
        dtype, shape = layout[name]
        key = (-dtype.itemsize, name)
        assert before is None or before < key
        before = key
        assert entry["dtype"] == DTYPE_NAMES[dtype]
        assert entry["shape"] == list(shape)
        assert entry["data_offsets"] == [offset, offset + shape_bytes((dtype, shape))]
        assert offset % dtype.itemsize == 0
        offset = entry["data_offsets"][1]
    assert len(entries) == len(layout)


def test_equal_tensors_in_another_order_give_equal_bytes(tmp_path: Path) -> None:
    a, b = torch.ones(3, 2).half(), torch.arange(5, dtype=torch.int8)
    first = write_shard(tmp_path / "1", {"a": a, "b": b})
    # Not contiguous, and named in another order.
    second = write_shard(tmp_path / "2", {"b": b.flip(0).flip(0), "a": a.T.contiguous().T})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert first == second


def test_dtype_names_are_a_bijection() -> None:
    assert {name: dtype for dtype, name in DTYPE_NAMES.items()} == TORCH_DTYPES
    assert len(TORCH_DTYPES) == len(DTYPE_NAMES)


def test_an_unsupported_dtype_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_shard(tmp_path / "shard", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("exception", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, exception: BaseException
) -> None:
    path = tmp_path / "shard"
    write_shard(path, {"a": torch.zeros(4)})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise exception

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(exception)):
            write_shard(path, {"a": torch.ones(4)})
    assert os.listdir(tmp_path) == ["shard"]
    assert path.read_bytes() == before
    write_shard(path, {"a": torch.ones(4)})
    assert torch.equal(load_file(path)["a"], torch.ones(4))


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_shard(tmp_path / "nowhere" / "shard", {"a": torch.ones(1)})


def test_text_is_utf8_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "long ago, long ago\n")
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert os.listdir(tmp_path) == ["text"]


def test_sync_of_a_directory_that_is_gone(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    sync_directory(tmp_path / "gone")
