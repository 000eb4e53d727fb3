"""Bit planes: k-bit codes as k arrays of bits, row-major, bit i of byte j holding column 8 j + i.

The layout is neutral: it names no instruction set, and kernels repack it at load. docs/format.md specifies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def plane_bytes(columns: int) -> int:
    """Bytes of one row of one plane."""
    return (columns + 7) // 8


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] below 2**bits -> uint8 planes [bits, rows, ceil(columns / 8)]; padding bits are 0."""
    rows, columns = codes.shape
    padded = torch.zeros(rows, plane_bytes(columns) * 8, dtype=torch.uint8)
    padded[:, :columns] = codes
    planes = [
        (((padded >> bit) & 1).view(rows, -1, 8) * _WEIGHTS).sum(dim=-1, dtype=torch.uint8) for bit in range(bits)
    ]
    return torch.stack(planes)


def unpack_plane(plane: Tensor, columns: int) -> Tensor:
    """One plane, uint8 [rows, bytes] -> its bits as uint8 [rows, columns]."""
    spread = (plane.unsqueeze(-1) & _WEIGHTS.to(plane.device)) != 0
    return spread.view(plane.shape[0], -1)[:, :columns].to(torch.uint8)


def unpack_planes(planes: Tensor, columns: int) -> Tensor:
    """Planes uint8 [bits, rows, bytes] -> codes uint8 [rows, columns]."""
    codes = unpack_plane(planes[0], columns)
    for bit in range(1, planes.shape[0]):
        codes |= unpack_plane(planes[bit], columns) << bit
    return codes
