"""Hidden states of all sequences between two blocks, in one memory-mapped file.

Two streams are carried through the model: the full-precision one, from which channel orders come, and the quantized
one, from which Hessians come. They are kept in fp32, exactly as computed: a resumed run goes on from the same numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitwright.artifact.shards import sync_directory


class Stream:
    """fp32 [sequences, length, width] in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int], mode: str) -> None:
        self.path = path
        self.shape = shape
        self._map = np.memmap(path, dtype=np.float32, mode=mode, shape=shape)  # type: ignore[call-overload]

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int]) -> Stream:
        """A new file of the full size, allocated: a full disk is an error here and not a crash later."""
        size = int(np.prod(shape)) * 4
        with path.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # pragma: no cover - not on Linux
                    file.truncate(size)
            except OSError as error:
                error.filename = str(path)  # a full disk says nothing of where
                raise
        return cls(path, shape, "r+")

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int, int]) -> Stream:
        return cls(path, shape, "r")

    def read(self, index: int) -> Tensor:
        """One sequence, fp32 [1, length, width], a copy."""
        return torch.from_numpy(np.array(self._map[index])).unsqueeze(0)

    def write(self, index: int, hidden: Tensor) -> None:
        self._map[index] = hidden.reshape(self.shape[1:]).numpy()

    def finish(self) -> None:
        """Make what was written durable, and let go of the file."""
        self._map.flush()
        del self._map
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(self.path.parent)
