"""Packed weights as the kernels read them: tiles of 32 rows (docs/kernels.md), made from the format and turned back.

The native module packs and unpacks in parallel; the functions named `reference` are the same in torch, readable, and
the second opinion of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, Kind, group_count
from bitwright.packing import pack_planes
from bitwright.runtime.native import native

TILE_ROWS = 32
STEP = 16  # channels of a row in one line of 64 bytes
_LEVELS, _SCALES, _CODES = 0, 128, 192


@dataclass(frozen=True)
class Geometry:
    """Sizes of a site's weights; `rows` counts all its linears."""

    rows: int
    columns: int
    outliers: int
    group: int

    @property
    def normal(self) -> int:
        return self.columns - self.outliers

    @property
    def groups(self) -> int:
        return group_count(self.normal, self.group)

    @property
    def width(self) -> int:
        """Channels of a group as stored."""
        return -(-self.group // STEP) * STEP

    @property
    def group_bytes(self) -> int:
        return _CODES + self.width // STEP * 128

    @property
    def tile_bytes(self) -> int:
        return self.groups * self.group_bytes + -(-self.outliers // 4) * 128 + TILE_ROWS * 4

    def packed_bytes(self) -> int:
        return -(-self.rows // TILE_ROWS) * self.tile_bytes


def geometry_of(matrices: list[CodebookMatrix]) -> Geometry:
    """The geometry of a site; raises ValueError where its linears do not fit together."""
    first = matrices[0]
    same = {(m.columns, m.outlier_columns, m.group, m.bits) for m in matrices}
    if len(same) > 1 or first.bits != 2:
        raise ValueError(f"a site's linears need 2-bit codes and equal columns, outliers and groups; found {same}")
    return Geometry(sum(m.rows for m in matrices), first.columns, first.outlier_columns, first.group)


def pack(matrices: list[CodebookMatrix]) -> Tensor:
    """The matrices of a site, two-bit codes and equal columns, one below the other -> uint8 [packed bytes]."""
    geometry = geometry_of(matrices)
    module = native()
    if module is None:
        return pack_reference(matrices)
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8)
    row = 0
    for matrix in matrices:
        parts = {name: tensor.contiguous() for name, tensor in matrix.tensors().items()}
        names = ("codes", "scales", "levels", "zeros", "outliers", "outlier_scales")
        addresses = [parts[name].data_ptr() if name in parts else 0 for name in names]
        sizes = (geometry.rows, geometry.columns, geometry.outliers, geometry.group)
        module.pack(matrix.rows, *addresses, *sizes, row, packed.data_ptr(), torch.get_num_threads())
        row += matrix.rows
    return packed


def pack_reference(matrices: list[CodebookMatrix]) -> Tensor:
    """As `pack`, in torch."""
    geometry = geometry_of(matrices)
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8)
    view = _Views(packed, geometry)
    tiles = view.levels.shape[0]

    def rows_of(parts: list[Tensor]) -> Tensor:
        """Rows of all linears in tiles: [tiles, 32, ...]; rows that fill the last tile are zero."""
        whole = torch.cat(parts)
        return torch.cat([whole, whole.new_zeros((tiles * TILE_ROWS - len(whole), *whole.shape[1:]))]).unflatten(
            0, (tiles, TILE_ROWS)
        )

    levels = rows_of([m.integer_levels().to(torch.int16) + 128 for m in matrices])
    view.levels.copy_(levels.transpose(1, 2))
    view.scales.copy_(rows_of([m.scales for m in matrices]).transpose(1, 2))
    codes = rows_of([m.codes() for m in matrices])
    # Ragged last group, then groups that are no whole number of steps.
    codes = torch.nn.functional.pad(codes, (0, geometry.groups * geometry.group - geometry.normal))
    codes = codes.unflatten(-1, (geometry.groups, geometry.group))
    codes = torch.nn.functional.pad(codes, (0, geometry.width - geometry.group))
    quads = codes.unflatten(-1, (-1, 4, 4)).permute(0, 2, 3, 1, 5, 4)  # [tiles, groups, steps, rows, byte, code of it]
    view.codes.copy_((quads << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(dim=-1))
    if geometry.outliers:
        stored = rows_of([m.outliers.to(torch.int16) + 128 for m in matrices if m.outliers is not None])
        stored = torch.nn.functional.pad(stored, (0, -geometry.outliers % 4)).unflatten(-1, (-1, 4))
        view.outliers.copy_(stored.transpose(1, 2))
        scales = [m.outlier_scales for m in matrices if m.outlier_scales is not None]
        view.outlier_scales.copy_(rows_of(scales).to(torch.float32))
    return packed


def unpack(packed: Tensor, geometry: Geometry, first: int, last: int, kind: Kind) -> dict[str, Tensor]:
    """The stored tensors (docs/format.md) of rows first..last, bit for bit what was packed."""
    view = _Views(packed, geometry)
    low, high = first // TILE_ROWS, -(-last // TILE_ROWS)
    inside = slice(first - low * TILE_ROWS, last - low * TILE_ROWS)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[inside]

    codes = torch.stack([(view.codes[low:high] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2)
    codes = codes.permute(0, 3, 1, 2, 4, 5).flatten(3)[..., : geometry.group].flatten(2)[..., : geometry.normal]
    codes = rows(codes)
    levels = rows((view.levels[low:high].to(torch.int16) - 128).to(torch.int8).transpose(1, 2))
    parts = {
        "codes": pack_planes(codes, 2),
        "scales": rows(view.scales[low:high].transpose(1, 2)).contiguous(),
    }
    if kind == "free":
        parts["levels"] = levels.contiguous()
    else:
        parts["zeros"] = (-levels[..., 0]).to(torch.uint8)
    if geometry.outliers:
        outliers = (view.outliers[low:high].to(torch.int16) - 128).to(torch.int8).transpose(1, 2)
        parts["outliers"] = rows(outliers.flatten(2)[..., : geometry.outliers]).contiguous()
        parts["outlier_scales"] = rows(view.outlier_scales[low:high]).to(torch.float16)
    return parts


class _Views:
    """The parts of packed weights as strided tensors on the same memory."""

    def __init__(self, packed: Tensor, geometry: Geometry) -> None:
        tiles = packed.view(-1, geometry.tile_bytes)
        groups = tiles[:, : geometry.groups * geometry.group_bytes].unflatten(1, (geometry.groups, -1))
        tail = tiles[:, geometry.groups * geometry.group_bytes :]
        self.levels = groups[..., _LEVELS:_SCALES].unflatten(-1, (TILE_ROWS, 4))  # [tiles, groups, rows, code]
        self.scales = groups[..., _SCALES:_CODES].view(torch.float16)  # [tiles, groups, rows]
        self.codes = groups[..., _CODES:].unflatten(-1, (-1, TILE_ROWS, 4))  # [tiles, groups, steps, rows, byte]
        self.outliers = tail[:, : -TILE_ROWS * 4].unflatten(-1, (-1, TILE_ROWS, 4))  # [tiles, quads, rows, byte]
        self.outlier_scales = tail[:, -TILE_ROWS * 4 :].view(torch.float32)  # [tiles, rows]
