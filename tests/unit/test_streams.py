from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.calibration import Stream

from .twins import gaussian

SHAPE = (4, 5, 3)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "hidden"
    stream = Stream.create(path, SHAPE)
    hidden = gaussian(*SHAPE) * torch.logspace(-30, 30, 5).view(5, 1)
    for index in (2, 0, 3, 1):
        stream.write(index, hidden[index : index + 1])
    assert torch.equal(stream.read(1), hidden[1:2])
    stream.finish()
    assert path.stat().st_size == 4 * 5 * 3 * 4
    assert np.array_equal(np.fromfile(path, dtype="<f4").reshape(SHAPE), hidden.numpy())
    again = Stream.open(path, SHAPE)
    for index in range(4):
        assert torch.equal(again.read(index), hidden[index : index + 1])


def test_a_new_file_is_allocated_whole(tmp_path: Path) -> None:
    stream = Stream.create(tmp_path / "hidden", (8, 1024, 16))
    status = (tmp_path / "hidden").stat()
    assert status.st_size == 8 * 1024 * 16 * 4
    assert status.st_blocks * 512 >= status.st_size
    assert not stream.read(7).any()


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    stream = Stream.create(tmp_path / "hidden", SHAPE)
    stream.write(0, torch.ones(1, 5, 3))
    stream.read(0).fill_(7)
    assert torch.equal(stream.read(0), torch.ones(1, 5, 3))


def test_reading_only_does_not_write(tmp_path: Path) -> None:
    Stream.create(tmp_path / "hidden", SHAPE).finish()
    stream = Stream.open(tmp_path / "hidden", SHAPE)
    with pytest.raises(ValueError, match="read-only"):
        stream.write(0, torch.ones(1, 5, 3))


def test_a_file_too_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "hidden").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="length"):
        Stream.open(tmp_path / "hidden", SHAPE)


def test_a_full_disk_is_an_error_at_once(tmp_path: Path) -> None:
    """More than any file may hold: the error names the file, nothing is left to crash later."""
    with pytest.raises(OSError, match="hidden"):
        Stream.create(tmp_path / "hidden", (1 << 30, 1 << 20, 1 << 10))
