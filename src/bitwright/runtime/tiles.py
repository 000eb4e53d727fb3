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
STEP = 64  # channels that groups are filled up to a multiple of
_ZEROS = 64  # bytes of a group's zero points, half of them unused


@dataclass(frozen=True)
class Geometry:
    """Sizes of packed weights: of one linear, or of all linears of a site, each filled up to whole tiles.

    `table`: the tiles hold the levels of every code, 2**stored of them, and not a zero point. Codes of one or two bits
    always have a table; those of more than four never have.
    """

    rows: int
    columns: int
    outliers: int
    group: int
    bits: int = 2
    table: bool = True

    @property
    def stored(self) -> int:
        """Bits that a code takes in a tile."""
        return 2 if self.bits <= 2 else 4 if self.bits <= 4 else 8

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
    def scales_at(self) -> int:
        return TILE_ROWS << self.stored if self.table else _ZEROS

    @property
    def codes_at(self) -> int:
        return self.scales_at + TILE_ROWS * 2

    @property
    def group_bytes(self) -> int:
        return self.codes_at + self.width * self.stored // 8 * TILE_ROWS

    @property
    def tile_bytes(self) -> int:
        return self.groups * self.group_bytes + -(-self.outliers // 4) * 128 + TILE_ROWS * 4

    @property
    def shifts(self) -> range:
        """Of the codes that share a byte, the lower channel first."""
        return range(0, 8, self.stored)

    def packed_bytes(self) -> int:
        return self._packed_bytes

    @cached_property
    def _packed_bytes(self) -> int:  # asked at every call of an op
        return -(-self.rows // TILE_ROWS) * self.tile_bytes


@cache
def geometry_of_sizes(
    rows: int, columns: int, outliers: int, group: int, bits: int = 2, table: bool = True
) -> Geometry:
    """The one Geometry of these sizes: a call of an op on few tokens would spend a tenth of its time on making one.

    Raises ValueError for codes that tiles do not hold.
    """
    if not 1 <= bits <= 8 or (bits <= 2 and not table) or (bits > 4 and table):
        what = "levels of their own" if table else "zero points"
        raise ValueError(f"tiles hold codes of up to 4 bits with a table, of 3 to 8 without; found {bits} with {what}")
    return Geometry(rows, columns, outliers, group, bits, table)


def has_table(bits: int, kind: Kind) -> bool:
    """Whether tiles of such codes hold levels, and not zero points."""
    return bits <= 2 or kind in ("free", "shared")


def serves(bits: int, kind: Kind) -> bool:
    """Whether tiles hold such codes: a byte shuffle looks up sixteen levels at most, and a group has one codebook."""
    return kind != "salient" and (bits <= 4 or not has_table(bits, kind))


def geometry_of(matrix: CodebookMatrix) -> Geometry:
    """Raises ValueError for a matrix that tiles do not hold."""
    sizes = matrix.rows, matrix.columns, matrix.outlier_columns, matrix.group
    return geometry_of_sizes(*sizes, matrix.bits, has_table(matrix.bits, matrix.kind))


def pack(matrix: CodebookMatrix, out: Tensor | None = None) -> Tensor:
    """A matrix -> its tiles, uint8 [packed bytes], in `out` (zeros) where that is given.

    Raises ValueError for free levels of more than 4 bits, and for a shared table that is not on the int8 grid.
    """
    geometry = geometry_of(matrix)
    matrix = matrix.expanded()
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8) if out is None else out
    module = native()
    if module is None:
        return pack_reference(matrix, geometry, packed)
    form = (geometry.bits, geometry.table)
    module.pack(*addresses(matrix), *form, packed.data_ptr(), torch.get_num_threads())
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
    tiles = len(view.outlier_scales)
    if geometry.table:
        levels = matrix.integer_levels().to(torch.int16) + 128
        levels = torch.nn.functional.pad(levels, (0, 2**geometry.stored - 2**geometry.bits))
        view.levels.copy_(in_tiles(levels, tiles).unflatten(1, (2, 4, 4)).movedim(4, 1))
    else:
        assert matrix.zeros is not None
        view.zeros.copy_(in_tiles(matrix.zeros, tiles).transpose(1, 2))
    view.scales.copy_(in_tiles(matrix.scales, tiles).transpose(1, 2))
    codes = in_tiles(matrix.codes(), tiles)
    # Fill up the ragged last group, then groups that are no whole number of steps.
    codes = torch.nn.functional.pad(codes, (0, geometry.groups * geometry.group - geometry.normal))
    codes = codes.unflatten(-1, (geometry.groups, geometry.group))
    codes = torch.nn.functional.pad(codes, (0, geometry.width - geometry.group))
    shifts = torch.tensor(geometry.shifts, dtype=torch.uint8).unsqueeze(-1)
    codes = (codes.unflatten(-1, (-1, len(shifts), 16)) << shifts).sum(dim=-2)  # [tiles, rows, groups, lines, byte]
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

    def by_row(tensor: Tensor) -> Tensor:  # [tiles, groups, row] -> [rows, groups]
        return tensor.transpose(1, 2).flatten(0, 1)[: geometry.rows].contiguous()

    codes = torch.stack([(view.codes >> shift) & (2**geometry.stored - 1) for shift in geometry.shifts], dim=-2)
    codes = rows(codes).flatten(2)[..., : geometry.group].flatten(1)[..., : geometry.normal]
    parts = {"codes": pack_planes(codes, geometry.bits)}
    if geometry.table:
        levels = rows((view.levels[..., : 2**geometry.bits].to(torch.int16) - 128).to(torch.int8))
        parts |= codebook(levels, by_row(view.scales), kind)
    else:
        parts |= {"scales": by_row(view.scales)} | ({"zeros": by_row(view.zeros)} if kind == "uniform" else {})
    return parts | unpack_outliers(geometry, view.outliers, view.outlier_scales)


def codebook(levels: Tensor, scales: Tensor, kind: Kind) -> dict[str, Tensor]:
    """int8 [rows, groups, 2**bits], fp16 [rows, groups] as tiles hold them -> what a codebook of that kind stores."""
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
        first = groups[..., : geometry.scales_at]
        if geometry.table:
            # Rows stand in slots, 4 x 4 transposed inside each sixteen: [.., sixteen, 4, 4, code] in row order.
            self.levels = first.unflatten(-1, (2, 4, 4, -1)).transpose(3, 4)  # [tiles, groups, sixteen, 4, 4, code]
        else:
            self.zeros = first[..., :TILE_ROWS]  # [tiles, groups, rows]
        self.scales = groups[..., geometry.scales_at : geometry.codes_at].view(torch.float16)  # [tiles, groups, rows]
        lines = groups[..., geometry.codes_at :].unflatten(-1, (2, 4, -1, 4, 16))
        self.codes = lines.permute(0, 1, 2, 5, 3, 4, 6)  # [tiles, groups, sixteen, 4, 4, lines, byte] in row order
        self.outliers = tail[:, : -TILE_ROWS * 4].unflatten(-1, (-1, TILE_ROWS, 4))  # [tiles, quads, rows, byte]
        self.outlier_scales = tail[:, -TILE_ROWS * 4 :].view(torch.float32)  # [tiles, rows]
