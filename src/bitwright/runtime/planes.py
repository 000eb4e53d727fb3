"""Packed weights of the boolean product: tiles of 32 rows of bit planes (csrc/planes/planes.h), made and turned back.

The byte tiles of `tiles.py` serve inputs that are a step times an integer. These serve the free plane scales of BWA
(appendix A), where the value of bit plane a of a token and group is a number of its own. The native module packs in
parallel; `pack_reference` is the same in torch, readable, and the second opinion of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, Kind
from bitwright.native import native
from bitwright.packing import pack_planes, unpack_plane
from bitwright.runtime import tiles
from bitwright.runtime.tiles import TILE_ROWS

_SCALES, _SUMS = 128, 192
_PART = 128  # channels whose levels have one stored sum
# Byte p of a line is this row of the tile.
_ROW_OF_BYTE = torch.tensor([8 * (p // 4 % 4) + 4 * (p // 16) + p % 4 for p in range(TILE_ROWS)])


@dataclass(frozen=True)
class PlaneGeometry(tiles.Geometry):
    """Sizes of packed weights as bit planes; `group` is a multiple of 8."""

    @property
    def parts(self) -> int:
        """Stored sums of levels a row and group."""
        return -(-self.group // _PART)

    @property
    def codes_at(self) -> int:
        return _SUMS + self.parts * TILE_ROWS * 2

    @property
    def group_bytes(self) -> int:
        return self.codes_at + self.group // 8 * 2 * TILE_ROWS


def geometry_of(matrix: CodebookMatrix) -> PlaneGeometry:
    return PlaneGeometry(matrix.rows, matrix.columns, matrix.outlier_columns, matrix.group)


def pack(matrix: CodebookMatrix, out: Tensor | None = None) -> Tensor:
    """A matrix of two-bit codes -> its tiles, uint8 [packed bytes], in `out` (zeros) where that is given."""
    geometry = geometry_of(matrix)
    if matrix.bits != 2:
        raise ValueError(f"tiles of bit planes hold 2-bit codes; found {matrix.bits}")
    matrix = matrix.expanded()
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8) if out is None else out
    module = native()
    if module is None:
        return pack_reference(matrix, geometry, packed)
    module.pack_planes(*tiles.addresses(matrix), packed.data_ptr(), torch.get_num_threads())
    return packed


def pack_reference(matrix: CodebookMatrix, geometry: PlaneGeometry, packed: Tensor) -> Tensor:
    """As `pack`, in torch."""
    matrix = matrix.expanded()
    assert matrix.scales is not None
    view = _Views(packed, geometry)
    count = view.levels.shape[0]
    levels = tiles.in_tiles(matrix.integer_levels(), count)
    view.levels.copy_(levels.transpose(1, 2))
    view.scales.copy_(tiles.in_tiles(matrix.scales, count).transpose(1, 2))

    codes = _grouped(tiles.in_tiles(matrix.codes(), count), geometry)  # [tiles, rows, groups, group]
    inside = _grouped(torch.ones(geometry.normal, dtype=torch.bool), geometry)
    weights = torch.gather(levels, -1, codes.to(torch.int64)).to(torch.int16) * inside
    weights = torch.nn.functional.pad(weights, (0, geometry.parts * _PART - geometry.group)).unflatten(-1, (-1, _PART))
    view.sums.copy_(weights.sum(dim=-1).permute(0, 2, 3, 1))

    for plane in range(2):
        bits = (codes >> plane) & 1
        lines = pack_planes(bits.flatten(0, 2), 1)[0].unflatten(0, bits.shape[:3])  # [tiles, rows, groups, lines]
        view.planes[..., plane, :].copy_(lines[:, _ROW_OF_BYTE].permute(0, 2, 3, 1))
    tiles.pack_outliers(matrix, view.outliers, view.outlier_scales)
    return packed


def _grouped(channels: Tensor, geometry: PlaneGeometry) -> Tensor:
    """[..., normal] -> [..., groups, group], the ragged last group filled with zeros."""
    filled = torch.nn.functional.pad(channels, (0, geometry.groups * geometry.group - geometry.normal))
    return filled.unflatten(-1, (geometry.groups, geometry.group))


def unpack(packed: Tensor, geometry: PlaneGeometry, kind: Kind) -> dict[str, Tensor]:
    """The stored tensors (docs/format.md) but the permutation, bit for bit what was packed."""
    view = _Views(packed, geometry)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[: geometry.rows]

    codes = torch.zeros((geometry.rows, geometry.normal), dtype=torch.uint8)
    for plane in range(2):
        lines = view.planes[..., plane, :][..., torch.argsort(_ROW_OF_BYTE)]  # [tiles, groups, lines, rows]
        lines = rows(lines.permute(0, 3, 1, 2)).flatten(1).contiguous()
        codes |= unpack_plane(lines, geometry.groups * geometry.group)[:, : geometry.normal] << plane
    levels = rows(view.levels.transpose(1, 2))
    parts = {"codes": pack_planes(codes, 2)} | tiles.codebook(levels, rows(view.scales.transpose(1, 2)), kind)
    return parts | tiles.unpack_outliers(geometry, view.outliers, view.outlier_scales)


class _Views:
    """The parts of packed weights as strided tensors on the same memory."""

    def __init__(self, packed: Tensor, geometry: PlaneGeometry) -> None:
        every = packed.view(-1, geometry.tile_bytes)
        groups = every[:, : geometry.groups * geometry.group_bytes].unflatten(1, (geometry.groups, -1))
        tail = every[:, geometry.groups * geometry.group_bytes :]
        levels = groups[..., :_SCALES].view(torch.int8)
        self.levels = levels.unflatten(-1, (TILE_ROWS, 4))  # [tiles, groups, rows, code]
        self.scales = groups[..., _SCALES:_SUMS].view(torch.float16)  # [tiles, groups, rows]
        sums = groups[..., _SUMS : geometry.codes_at].view(torch.int16)
        self.sums = sums.unflatten(-1, (-1, TILE_ROWS))  # [tiles, groups, parts, rows]
        self.planes = groups[..., geometry.codes_at :].unflatten(-1, (-1, 2, TILE_ROWS))  # [.., lines, plane, byte]
        self.outliers = tail[:, : -TILE_ROWS * 4].unflatten(-1, (-1, TILE_ROWS, 4))  # [tiles, quads, rows, byte]
        self.outlier_scales = tail[:, -TILE_ROWS * 4 :].view(torch.float32)  # [tiles, rows]
