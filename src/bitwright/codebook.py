"""CodebookMatrix: what every scalar post-training method produces, a codebook a group and a code a weight.

A matrix of `rows` outputs and `columns` inputs is kept in *site order*: input channels permuted so that the normal
ones come first, in groups of `group` (the last group may be shorter), and the outlier channels last. There is one
dequantizer and one bit counter, here, whatever the method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitwright.packing import plane_bytes, unpack_plane, unpack_planes

Kind = Literal["free", "uniform", "symmetric", "shared", "salient"]
KINDS: tuple[Kind, ...] = ("free", "uniform", "symmetric", "shared", "salient")


def group_count(columns: int, group: int) -> int:
    """Groups that `columns` normal channels fill; the last one may be ragged."""
    return (columns + group - 1) // group


def code_of_rank(bits: int) -> Tensor:
    """uint8 [2**bits]: the code of the level of each rank, lowest level first, in a *free* codebook.

    For two bits the planes are the paper's: plane 0 is the sign q (1: the larger of a pair), plane 1 the membership m
    (1: the outer pair), so the ranks 0..3 have the codes q + 2 m = 2, 0, 1, 3 (BWA, eq. 6 and 9; erratum E11).
    """
    return torch.tensor([2, 0, 1, 3] if bits == 2 else list(range(2**bits)), dtype=torch.uint8)


def symmetric_levels(bits: int) -> Tensor:
    """int8 [2**bits]: the levels of a *symmetric* codebook by code, in units of the scale; they need not be stored.

    code - 2**(bits - 1), as a uniform codebook with that zero point (GPTQ's symmetric grid); with one bit -1 and 1,
    where the same rule would give -1 and 0.
    """
    if bits == 1:
        return torch.tensor([-1, 1], dtype=torch.int8)
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)


def honest_bits(
    columns: int,
    outliers: int,
    group: int = 128,
    code_bits: int = 2,
    parameter_bits: int = 48,
    rows: int | None = None,
    outlier_bits: int = 8,
    row_scale_bits: int = 16,
    permutation_bits: int = 16,
) -> float:
    """Bits a weight of a linear with `columns` inputs, all counted, before padding of planes to whole bytes.

    `parameter_bits` a group: 48 here (four int8 levels, one fp16 scale), 64 in the paper (four fp16 numbers). With
    `rows` the permutation is counted, as if this linear had its site for itself. Spec: BWA section 2.6.
    """
    normal = columns - outliers
    bits: float = normal * code_bits + group_count(normal, group) * parameter_bits
    if outliers:
        bits += outliers * outlier_bits + row_scale_bits
    if rows is not None:
        bits += columns * permutation_bits / rows
    return bits / columns


@dataclass(frozen=True)
class CodebookMatrix:
    """One quantized weight matrix.

    planes          uint8 [bits, rows, ceil(normal / 8)], the code planes
    scales          fp16 [rows, groups] (all kinds but `shared`), else None
    levels          int8 [rows, groups, 2**bits] by code (kinds `free` and `salient`), else None
    zeros           uint8 [rows, groups] (kind `uniform`: level(code) = code - zero), else None
    table           fp32 [2**bits] by code (kind `shared`: the weights themselves, the same for all rows), else None
    salient         uint8 [ceil(normal / 8)], a bit a normal channel (kind `salient`): 1 where the codes of the channel
                    mean `salient_levels` int8 [rows, groups, 2**bits] times `salient_scales` fp16 [rows, groups]
    outliers        int8 [rows, outlier count] or None; weight = outliers * outlier_scales
    outlier_scales  fp16 [rows] or None
    permutation     int64 [columns] or None: site channel i is input channel permutation[i]
    """

    rows: int
    columns: int
    bits: int
    group: int
    kind: Kind
    planes: Tensor
    scales: Tensor | None
    levels: Tensor | None = None
    zeros: Tensor | None = None
    table: Tensor | None = None
    salient: Tensor | None = None
    salient_levels: Tensor | None = None
    salient_scales: Tensor | None = None
    outliers: Tensor | None = None
    outlier_scales: Tensor | None = None
    permutation: Tensor | None = None

    @property
    def outlier_columns(self) -> int:
        return 0 if self.outliers is None else self.outliers.shape[1]

    @property
    def normal_columns(self) -> int:
        return self.columns - self.outlier_columns

    def codes(self) -> Tensor:
        """uint8 [rows, normal columns]."""
        return unpack_planes(self.planes, self.normal_columns)

    def salient_channels(self) -> Tensor:
        """bool [normal columns]: the channels whose codes mean the levels of salient ones; none but in that kind."""
        if self.salient is None:
            return torch.zeros(self.normal_columns, dtype=torch.bool, device=self.planes.device)
        return unpack_plane(self.salient.unsqueeze(0), self.normal_columns)[0].bool()

    def integer_levels(self) -> Tensor:
        """int8 [rows, groups, 2**bits]: the level of each code in units of the group's scale.

        int16 where a zero point meets codes of 8 bits: -255 .. 255. For every kind; of a shared table and of salient
        columns as `expanded` makes them, with its ValueError.
        """
        if self.kind in ("shared", "salient"):
            return self.expanded().integer_levels()
        if self.levels is not None:
            return self.levels
        if self.kind == "symmetric":
            assert self.scales is not None
            return symmetric_levels(self.bits).to(self.scales.device).expand(*self.scales.shape, -1).contiguous()
        assert self.zeros is not None
        codes = torch.arange(2**self.bits, dtype=torch.int16, device=self.zeros.device)
        levels = codes - self.zeros.to(torch.int16).unsqueeze(-1)
        return levels if self.bits == 8 else levels.to(torch.int8)

    def expanded(self) -> CodebookMatrix:
        """The same weights with a codebook for each row and group: what row by row code, such as the kernels', reads.

        A shared table becomes int8 levels times one fp16 scale; a symmetric codebook gets its zero points, with one bit
        its levels. Raises ValueError where a table holds no such products, and of salient columns, whose groups have
        two codebooks.
        """
        if self.kind == "salient":
            raise ValueError("salient columns have levels of their own: a group has two codebooks, not one")
        if self.kind == "symmetric":
            if self.bits == 1:
                return replace(self, kind="free", levels=self.integer_levels())
            assert self.scales is not None
            zeros = torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.scales.device)
            return replace(self, kind="uniform", zeros=zeros)
        if self.table is None:
            return self
        grid = on_grid(self.table)
        if grid is None:
            raise ValueError("the shared table's numbers are no int8 multiples of one fp16 number")
        integers, scale = grid
        groups = group_count(self.normal_columns, self.group)
        levels = integers.expand(self.rows, groups, -1).contiguous()
        scales = scale.expand(self.rows, groups).contiguous()
        return replace(self, kind="free", table=None, levels=levels, scales=scales)

    def dequantize_site_order(self) -> Tensor:
        """fp32 [rows, columns] in site order. Exact: an int8 times an fp16 number fits fp32 without rounding."""
        weights = self._normal_weights()
        if self.outliers is None:
            return weights.contiguous()
        assert self.outlier_scales is not None
        scaled = self.outliers.to(torch.float32) * self.outlier_scales.to(torch.float32).unsqueeze(-1)
        return torch.cat([weights, scaled], dim=1)

    def _normal_weights(self) -> Tensor:
        codes = self.codes()
        if self.table is not None:
            return self.table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
        assert self.scales is not None
        padding = self.scales.shape[1] * self.group - self.normal_columns
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding))
        codes = codes.view(self.rows, -1, self.group)
        if self.zeros is not None or (self.kind == "symmetric" and self.bits > 1):
            # Computed, not looked up: 2**bits may be 256.
            zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.float32).unsqueeze(-1)
            weights = (codes.to(torch.float32) - zeros) * self.scales.to(torch.float32).unsqueeze(-1)
            return weights.view(self.rows, -1)[:, : self.normal_columns]
        integers = self.levels if self.kind == "salient" else self.integer_levels()
        assert integers is not None
        weights = select_levels(_products(integers, self.scales), codes).view(self.rows, -1)[:, : self.normal_columns]
        if self.salient_levels is None or self.salient_scales is None:
            return weights
        salient = select_levels(_products(self.salient_levels, self.salient_scales), codes)
        salient = salient.view(self.rows, -1)[:, : self.normal_columns]
        return torch.where(self.salient_channels(), salient, weights)

    def dequantize(self) -> Tensor:
        """fp32 [rows, columns] in the order of the model's input channels."""
        weights = self.dequantize_site_order()
        if self.permutation is None:
            return weights
        original = torch.empty_like(weights)
        original[:, self.permutation] = weights
        return original

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by its name in the format, the permutation of the site excepted."""
        parts = {
            "codes": self.planes,
            "levels": self.levels,
            "zeros": self.zeros,
            "scales": self.scales,
            "table": self.table,
            "salient": self.salient,
            "salient_levels": self.salient_levels,
            "salient_scales": self.salient_scales,
            "outliers": self.outliers,
            "outlier_scales": self.outlier_scales,
        }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def stored_bits(self) -> int:
        """All bits on disk of this matrix, padding included, the permutation of the site excluded (it is shared)."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.tensors().values())


def on_grid(table: Tensor) -> tuple[Tensor, Tensor] | None:
    """fp32 [k] -> (int8 [k], fp16 scale) whose products are exactly these numbers; None where there are none.

    The largest is 127 times the scale.
    """
    scale = (table.abs().max() / 127.0).to(torch.float16)
    integers = torch.round(table / scale.to(torch.float32)).nan_to_num().clamp(-127, 127).to(torch.int8)
    return (integers, scale) if torch.equal(integers.to(torch.float32) * scale.to(torch.float32), table) else None


def _products(integers: Tensor, scales: Tensor) -> Tensor:
    """int8 [rows, groups, k] times fp16 [rows, groups] -> fp32, exact."""
    return integers.to(torch.float32) * scales.to(torch.float32).unsqueeze(-1)


def select_levels(table: Tensor, codes: Tensor) -> Tensor:
    """table [rows, groups, 2**bits], codes [rows, groups, group] -> table at codes, without 64-bit indices."""
    chosen = torch.where(codes == 1, table[..., 1:2], table[..., 0:1])
    for code in range(2, table.shape[-1]):
        chosen = torch.where(codes == code, table[..., code : code + 1], chosen)
    return chosen


def matrix_shapes(
    rows: int, columns: int, bits: int, group: int, kind: Kind, outliers: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every stored tensor of such a matrix: the contract of the format, the plan and the loader."""
    normal = columns - outliers
    groups = group_count(normal, group)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (bits, rows, plane_bytes(normal))),
    }
    if kind == "shared":
        shapes["table"] = (torch.float32, (2**bits,))
    else:
        shapes["scales"] = (torch.float16, (rows, groups))
    if kind in ("free", "salient"):
        shapes["levels"] = (torch.int8, (rows, groups, 2**bits))
    elif kind == "uniform":
        shapes["zeros"] = (torch.uint8, (rows, groups))
    if kind == "salient":
        shapes["salient"] = (torch.uint8, (plane_bytes(normal),))
        shapes["salient_levels"] = (torch.int8, (rows, groups, 2**bits))
        shapes["salient_scales"] = (torch.float16, (rows, groups))
    if outliers:
        shapes["outliers"] = (torch.int8, (rows, outliers))
        shapes["outlier_scales"] = (torch.float16, (rows,))
    return shapes
