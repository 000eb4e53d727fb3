"""Packed weights as the kernels read them: tiles of 32 rows (docs/kernels.md), made from the format and turned back.

The native module packs in parallel; the torch code here is the same, readable, and the second opinion of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, Kind, group_count
from bitwright.native import native
from bitwright.packing import pack_planes

# What the native packers read of a matrix, in the order of their arguments.
PACKED = ("codes", "scales", "levels", "zeros", "outliers", "outlier_scales")
# The stored tensors of a linear (docs/format.md) but permutation, bias and sentinel.
STORED = (*PACKED, "table", "salient", "salient_levels", "salient_scales")
TILE_ROWS = 32
STEP = 64  # channels of a row whose codes share 16 bytes
_LEVELS, _SCALES, _CODES = 0, 128, 192


@dataclass(frozen=True)
class Geometry:
    """Sizes of packed weights: of one linear, or of all linears of a site, each filled up to whole tiles."""

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
        return _CODES + self.width // STEP * TILE_ROWS * 16

    @property
    def tile_bytes(self) -> int:
        return self.groups * self.group_bytes + -(-self.outliers // 4) * 128 + TILE_ROWS * 4

    def packed_bytes(self) -> int:
        return self._packed_bytes

    @cached_property
    def _packed_bytes(self) -> int:  # asked at every call of an op
        return -(-self.rows // TILE_ROWS) * self.tile_bytes


@cache
def geometry_of_sizes(rows: int, columns: int, outliers: int, group: int) -> Geometry:
    """The one Geometry of these sizes: a call of an op on few tokens would spend a tenth of its time on making one."""
    return Geometry(rows, columns, outliers, group)


def geometry_of(matrix: CodebookMatrix) -> Geometry:
    return Geometry(matrix.rows, matrix.columns, matrix.outlier_columns, matrix.group)


def pack(matrix: CodebookMatrix, out: Tensor | None = None) -> Tensor:
    """A matrix of two-bit codes -> its tiles, uint8 [packed bytes], in `out` (zeros) where that is given."""
    geometry = geometry_of(matrix)
    if matrix.bits != 2:
        raise ValueError(f"tiles hold 2-bit codes; found {matrix.bits}")
    matrix = matrix.expanded()
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8) if out is None else out
    module = native()
    if module is None:
        return pack_reference(matrix, geometry, packed)
    module.pack(*addresses(matrix), packed.data_ptr(), torch.get_num_threads())
    return packed


def addresses(matrix: CodebookMatrix) -> list[int]:
    """What the native packers want of a matrix: where its stored tensors lie, 0 for one it has not, then its sizes."""
    tensors = matrix.tensors()
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"the matrix's {name} are not contiguous")
    found = [tensors[name].data_ptr() if name in tensors else 0 for name in PACKED]
    return [*found, matrix.rows, matrix.columns, matrix.outlier_columns, matrix.group]


def in_tiles(rows: Tensor, tiles: int) -> Tensor:
    """[rows, ...] -> [tiles, 32, ...]; rows that fill the last tile are zero."""
    filled = torch.cat([rows, rows.new_zeros((tiles * TILE_ROWS - len(rows), *rows.shape[1:]))])
    return filled.unflatten(0, (tiles, TILE_ROWS))


def pack_reference(matrix: CodebookMatrix, geometry: Geometry, packed: Tensor) -> Tensor:
    """As `pack`, in torch."""
    matrix = matrix.expanded()
    assert matrix.scales is not None
    view = Views(packed, geometry)
    tiles = view.levels.shape[0]
    levels = in_tiles(matrix.integer_levels().to(torch.int16) + 128, tiles).unflatten(1, (2, 4, 4))
    view.levels.copy_(levels.movedim(4, 1))
    view.scales.copy_(in_tiles(matrix.scales, tiles).transpose(1, 2))
    codes = in_tiles(matrix.codes(), tiles)
    # Fill up the ragged last group, then groups that are no whole number of steps.
    codes = torch.nn.functional.pad(codes, (0, geometry.groups * geometry.group - geometry.normal))
    codes = codes.unflatten(-1, (geometry.groups, geometry.group))
    codes = torch.nn.functional.pad(codes, (0, geometry.width - geometry.group))
    bits = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    codes = (codes.unflatten(-1, (-1, 4, 16)) << bits).sum(dim=-2)  # [tiles, rows, groups, steps, byte]
    view.codes.copy_(codes.unflatten(1, (2, 4, 4)).movedim(4, 1))
    pack_outliers(matrix, view.outliers, view.outlier_scales)
    return packed


def pack_outliers(matrix: CodebookMatrix, outliers: Tensor, scales: Tensor) -> None:
    """The int8 channels into the views [tiles, quads, rows, byte] and [tiles, rows] of both kinds of tiles."""
    if matrix.outliers is None or matrix.outlier_scales is None:
        return
    stored = in_tiles(matrix.outliers.to(torch.int16) + 128, len(scales))
    stored = torch.nn.functional.pad(stored, (0, -matrix.outlier_columns % 4)).unflatten(-1, (-1, 4))
    outliers.copy_(stored.transpose(1, 2))
    scales.copy_(in_tiles(matrix.outlier_scales.to(torch.float32), len(scales)))


def unpack_outliers(geometry: Geometry, outliers: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Undo `pack_outliers`."""
    if not geometry.outliers:
        return {}
    codes = (outliers.to(torch.int16) - 128).to(torch.int8).transpose(1, 2).flatten(2)[..., : geometry.outliers]
    return {
        "outliers": codes.flatten(0, 1)[: geometry.rows].contiguous(),
        "outlier_scales": scales.flatten(0, 1)[: geometry.rows].to(torch.float16),
    }


def unpack(packed: Tensor, geometry: Geometry, kind: Kind) -> dict[str, Tensor]:
    """The stored tensors (docs/format.md) but the permutation, bit for bit what was packed."""
    view = Views(packed, geometry)

    def rows(tensor: Tensor) -> Tensor:  # [tiles, groups, sixteen, lane, slot, ...] -> [rows, groups, ...]
        return tensor.movedim(1, 4).flatten(0, 3)[: geometry.rows]

    codes = torch.stack([(view.codes >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2)
    codes = rows(codes).flatten(2)[..., : geometry.group].flatten(1)[..., : geometry.normal]
    levels = rows((view.levels.to(torch.int16) - 128).to(torch.int8))
    scales = view.scales.transpose(1, 2).flatten(0, 1)[: geometry.rows]
    parts = {"codes": pack_planes(codes, 2)} | codebook(levels, scales, kind)
    return parts | unpack_outliers(geometry, view.outliers, view.outlier_scales)


def codebook(levels: Tensor, scales: Tensor, kind: Kind) -> dict[str, Tensor]:
    """int8 [rows, groups, 4] and fp16 [rows, groups] as tiles hold them -> what a codebook of that kind stores."""
    if kind == "shared":
        return {"table": levels[0, 0].to(torch.float32) * scales[0, 0].to(torch.float32)}
    parts = {"scales": scales.contiguous()}
    if kind == "free":
        parts["levels"] = levels.contiguous()
    elif kind == "uniform":
        parts["zeros"] = (-levels[..., 0].to(torch.int16)).to(torch.uint8)
    return parts


class Views:
    """The parts of packed weights as strided tensors on the same memory."""

    def __init__(self, packed: Tensor, geometry: Geometry) -> None:
        tiles = packed.view(-1, geometry.tile_bytes)
        groups = tiles[:, : geometry.groups * geometry.group_bytes].unflatten(1, (geometry.groups, -1))
        tail = tiles[:, geometry.groups * geometry.group_bytes :]
        # Rows stand in slots, 4 x 4 transposed inside each sixteen: [tiles, groups, sixteen, 4, 4, code] in row order.
        self.levels = groups[..., _LEVELS:_SCALES].unflatten(-1, (2, 4, 4, 4)).transpose(3, 4)
        self.scales = groups[..., _SCALES:_CODES].view(torch.float16)  # [tiles, groups, rows]
        lines = groups[..., _CODES:].unflatten(-1, (2, 4, -1, 4, 16))
        self.codes = lines.permute(0, 1, 2, 5, 3, 4, 6)  # [tiles, groups, sixteen, 4, 4, steps, byte] in row order
        self.outliers = tail[:, : -TILE_ROWS * 4].unflatten(-1, (-1, TILE_ROWS, 4))  # [tiles, quads, rows, byte]
        self.outlier_scales = tail[:, -TILE_ROWS * 4 :].view(torch.float32)  # [tiles, rows]
