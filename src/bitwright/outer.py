"""OuterMatrix: an embedding or output head as rows of 8- or 4-bit integers, one fp16 scale a row and group of columns.

Symmetric, rounded to nearest. A scale a row alone would be ruled by the row's largest weight; with groups of 128, as in
the linears, a large weight costs its 128 neighbours their resolution and nobody else, for 1/8 bit a weight. There is no
zero point: the scale carries the sign that puts the group's largest weight on the code -2**(bits - 1). That uses the
one code that a symmetric grid has to spare, so at 4 bits the step is 1/8 of that weight in place of 1/7; a zero point
would gain as much, for 1/16 bit more. Codes lie as they are used (two to a byte at 4 bits), not in planes: the
embedding's rows are looked up in the mapped file, and the head's kernel reads it from end to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.codebook import group_count

ROWS_AT_ONCE = 4096  # in fp32 beside the stored matrix
BITS = (8, 4)

TensorShape = tuple[torch.dtype, tuple[int, ...]]


def outer_matrix_shapes(rows: int, columns: int, bits: int, group: int) -> dict[str, TensorShape]:
    """dtype and shape of the stored tensors of such a matrix."""
    codes: TensorShape = (torch.int8, (rows, columns)) if bits == 8 else (torch.uint8, (rows, (columns + 1) // 2))
    return {"codes": codes, "scales": (torch.float16, (rows, group_count(columns, group)))}


@dataclass(frozen=True)
class OuterMatrix:
    """Weight (r, c) = code (r, c) * scales[r, c // group].

    codes   int8 [rows, columns]; or uint8 [rows, ceil(columns / 2)], two codes to a byte in two's complement, the even
            column in the low nibble
    scales  fp16 [rows, ceil(columns / group)], of either sign
    """

    codes: Tensor
    scales: Tensor
    columns: int
    group: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by its name in the format."""
        return {"codes": self.codes, "scales": self.scales}

    def select(self, rows: Tensor) -> OuterMatrix:
        """These rows, int64 [n], alone."""
        return OuterMatrix(
            self.codes.index_select(0, rows), self.scales.index_select(0, rows), self.columns, self.group
        )

    def dequantize(self) -> Tensor:
        """fp32 [rows, columns]. Exact: an int8 times an fp16 number fits fp32 without rounding."""
        codes = self.codes if self.bits == 8 else _unpack_nibbles(self.codes)[:, : self.columns]
        padding = self.scales.shape[1] * self.group - self.columns
        grouped = torch.nn.functional.pad(codes, (0, padding)).view(self.rows, -1, self.group)
        weights = grouped.to(torch.float32) * self.scales.to(torch.float32).unsqueeze(-1)
        return weights.view(self.rows, -1)[:, : self.columns]


def quantize_outer(weights: Tensor, bits: int, group: int) -> OuterMatrix:
    """Float [rows, columns] -> its nearest OuterMatrix, `bits` 8 or 4.

    Raises ValueError where a weight is NaN or infinite, or so large that its scale is no fp16 number.
    """
    parts = [_quantize_rows(part.to(torch.float32), bits, group) for part in weights.split(ROWS_AT_ONCE)]
    codes = torch.cat([codes for codes, _ in parts])
    return OuterMatrix(codes, torch.cat([scales for _, scales in parts]), weights.shape[1], group)


def _quantize_rows(weights: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = weights.shape
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("it holds NaN or infinite values")
    most = 2 ** (bits - 1)
    padded = torch.nn.functional.pad(weights, (0, group_count(columns, group) * group - columns))
    low, high = torch.aminmax(padded.view(rows, -1, group), dim=-1)
    scales = (torch.where(-low >= high, low, high) / -most).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"its weights reach {float(weights.abs().max()):.3g}, too large for an fp16 scale")
    # Codes are chosen against the scale as it is stored. Where that is 0, so is every weight that it makes.
    step = scales.to(torch.float32).unsqueeze(-1)
    codes = torch.where(step == 0, 0.0, torch.round(padded.view(rows, -1, group) / step)).clamp(-most, most - 1)
    codes = codes.to(torch.int8).view(rows, -1)[:, :columns]
    return codes.contiguous() if bits == 8 else _pack_nibbles(codes), scales


def _pack_nibbles(codes: Tensor) -> Tensor:
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8) & 15
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes] -> int8 [rows, 2 * bytes]."""
    signed = packed.view(torch.int8)
    # Shifted to the top and back, which extends the sign.
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).view(packed.shape[0], -1)
