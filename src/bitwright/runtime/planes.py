"""Packed weights of the boolean product: tiles of 32 rows of bit planes (csrc/planes/planes.h), made and turned back.

The byte tiles of `tiles.py` serve inputs that are a step times an integer. These serve the free plane scales of BWA
(appendix A), where the value of bit plane a of a token and group is a number of its own. The native module packs in
parallel; `pack_reference` is the same in torch, readable, and the second opinion of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.activations import quantize_site
from bitwright.codebook import CodebookMatrix, Kind
from bitwright.packing import pack_planes, unpack_plane
from bitwright.recipe import ActivationRecipe
from bitwright.runtime import tiles
from bitwright.runtime.native import native
from bitwright.runtime.tiles import TILE_ROWS

_SCALES, _SUMS = 128, 192
_PART = 128  # channels whose levels have one stored sum
# Byte p of a line is this row of the tile.
_ROW_OF_BYTE = torch.tensor([8 * (p // 4 % 4) + 4 * (p // 16) + p % 4 for p in range(TILE_ROWS)])


@dataclass(frozen=True)
class PlaneGeometry(tiles.Geometry):
    """Sizes of a site's weights as bit planes; `rows` counts all its linears, `group` is a multiple of 8."""

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


def geometry_of(matrices: list[CodebookMatrix]) -> PlaneGeometry:
    """The geometry of a site; raises ValueError where its linears do not fit together."""
    found = tiles.geometry_of(matrices)
    return PlaneGeometry(found.rows, found.columns, found.outliers, found.group)


def pack(matrices: list[CodebookMatrix]) -> Tensor:
    """The matrices of a site, two-bit codes and equal columns, one below the other -> uint8 [packed bytes].

    Raises ValueError where the linears do not fit together.
    """
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
        module.pack_planes(matrix.rows, *addresses, *sizes, row, packed.data_ptr(), torch.get_num_threads())
        row += matrix.rows
    return packed


def pack_reference(matrices: list[CodebookMatrix]) -> Tensor:
    """As `pack`, in torch."""
    geometry = geometry_of(matrices)
    packed = torch.zeros(geometry.packed_bytes(), dtype=torch.uint8)
    view = _Views(packed, geometry)
    count = view.levels.shape[0]

    def rows_of(parts: list[Tensor]) -> Tensor:
        """Rows of all linears in tiles: [tiles, 32, ...]; rows that fill the last tile are zero."""
        whole = torch.cat(parts)
        return torch.cat([whole, whole.new_zeros((count * TILE_ROWS - len(whole), *whole.shape[1:]))]).unflatten(
            0, (count, TILE_ROWS)
        )

    levels = rows_of([m.integer_levels() for m in matrices])
    view.levels.copy_(levels.transpose(1, 2))
    view.scales.copy_(rows_of([m.scales for m in matrices]).transpose(1, 2))

    codes = _grouped(rows_of([m.codes() for m in matrices]), geometry)  # [tiles, rows, groups, group]
    inside = _grouped(torch.ones(geometry.normal, dtype=torch.bool), geometry)
    weights = torch.gather(levels, -1, codes.to(torch.int64)).to(torch.int16) * inside
    weights = torch.nn.functional.pad(weights, (0, geometry.parts * _PART - geometry.group)).unflatten(-1, (-1, _PART))
    view.sums.copy_(weights.sum(dim=-1).permute(0, 2, 3, 1))

    for plane in range(2):
        bits = (codes >> plane) & 1
        lines = pack_planes(bits.flatten(0, 2), 1)[0].unflatten(0, bits.shape[:3])  # [tiles, rows, groups, lines]
        view.planes[..., plane, :].copy_(lines[:, _ROW_OF_BYTE].permute(0, 2, 3, 1))
    if geometry.outliers:
        stored = rows_of([m.outliers.to(torch.int16) + 128 for m in matrices if m.outliers is not None])
        stored = torch.nn.functional.pad(stored, (0, -geometry.outliers % 4)).unflatten(-1, (-1, 4))
        view.outliers.copy_(stored.transpose(1, 2))
        scales = [m.outlier_scales for m in matrices if m.outlier_scales is not None]
        view.outlier_scales.copy_(rows_of(scales).to(torch.float32))
    return packed


def _grouped(channels: Tensor, geometry: PlaneGeometry) -> Tensor:
    """[..., normal] -> [..., groups, group], the ragged last group filled with zeros."""
    filled = torch.nn.functional.pad(channels, (0, geometry.groups * geometry.group - geometry.normal))
    return filled.unflatten(-1, (geometry.groups, geometry.group))


def unpack(packed: Tensor, geometry: PlaneGeometry, first: int, last: int, kind: Kind) -> dict[str, Tensor]:
    """The stored tensors (docs/format.md) of rows first..last, bit for bit what was packed."""
    view = _Views(packed, geometry)
    low, high = first // TILE_ROWS, -(-last // TILE_ROWS)
    inside = slice(first - low * TILE_ROWS, last - low * TILE_ROWS)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[inside]

    codes = None
    for plane in range(2):
        lines = view.planes[low:high, ..., plane, :][..., torch.argsort(_ROW_OF_BYTE)]  # [tiles, groups, lines, rows]
        lines = rows(lines.permute(0, 3, 1, 2)).flatten(1)
        bits = unpack_plane(lines.contiguous(), geometry.groups * geometry.group)[:, : geometry.normal]
        codes = bits if codes is None else codes | bits << 1
    assert codes is not None
    levels = rows(view.levels[low:high].transpose(1, 2))
    parts = {
        "codes": pack_planes(codes, 2),
        "scales": rows(view.scales[low:high].transpose(1, 2)).contiguous(),
    }
    if kind == "free":
        parts["levels"] = levels.contiguous()
    else:
        parts["zeros"] = (-levels[..., 0].to(torch.int16)).to(torch.uint8)
    if geometry.outliers:
        outliers = (view.outliers[low:high].to(torch.int16) - 128).to(torch.int8).transpose(1, 2)
        parts["outliers"] = rows(outliers.flatten(2)[..., : geometry.outliers]).contiguous()
        parts["outlier_scales"] = rows(view.outlier_scales[low:high]).to(torch.float16)
    return parts


def dequantize(packed: Tensor, geometry: PlaneGeometry) -> Tensor:
    """Packed weights of a site -> fp32 [rows, columns] in site order, exact; in torch."""
    parts = unpack(packed, geometry, 0, geometry.rows, "free")
    matrix = CodebookMatrix(
        rows=geometry.rows,
        columns=geometry.columns,
        bits=2,
        group=geometry.group,
        kind="free",
        planes=parts["codes"],
        scales=parts["scales"],
        levels=parts["levels"],
        outliers=parts.get("outliers"),
        outlier_scales=parts.get("outlier_scales"),
    )
    return matrix.dequantize_site_order()


def site_planes_reference(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    geometry: PlaneGeometry,
    recipe: ActivationRecipe,
) -> Tensor:
    """The op in torch: x fp32 [..., columns] in the model's order -> fp32 [..., rows], a dense product."""
    flat = x.reshape(-1, geometry.columns)
    if order is not None:
        flat = flat.index_select(1, order.to(torch.int64))
    flat = quantize_site(flat, geometry.outliers, geometry.group, recipe)
    y = torch.nn.functional.linear(flat, dequantize(packed, geometry), bias)
    return y.reshape(*x.shape[:-1], geometry.rows)


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
