from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.packing import pack_planes, plane_bytes, unpack_plane, unpack_planes

from .twins import examples, planes_of


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    bits = draw(st.integers(1, 4))
    columns = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return draw(st.lists(row, min_size=1, max_size=4)), bits


@given(code_matrices())
@examples(60)
def test_planes_are_the_documented_bytes_and_come_back(case: tuple[list[list[int]], int]) -> None:
    codes, bits = case
    matrix = torch.tensor(codes, dtype=torch.uint8)
    planes = pack_planes(matrix, bits)
    assert planes.dtype == torch.uint8
    assert planes.tolist() == planes_of(codes, bits)
    assert torch.equal(unpack_planes(planes, matrix.shape[1]), matrix)
    for plane in range(bits):
        assert torch.equal(unpack_plane(planes[plane], matrix.shape[1]), (matrix >> plane) & 1)


def test_bit_order_by_hand() -> None:
    # Column 0 is bit 0 of byte 0, column 9 is bit 1 of byte 1; code 3 has both planes, code 2 plane 1 alone.
    codes = torch.zeros(1, 10, dtype=torch.uint8)
    codes[0, 0], codes[0, 7], codes[0, 9] = 3, 1, 2
    assert pack_planes(codes, 2).tolist() == [[[0b1000_0001, 0]], [[0b0000_0001, 0b10]]]


@pytest.mark.parametrize(("columns", "expected"), [(1, 1), (7, 1), (8, 1), (9, 2), (128, 16), (129, 17)])
def test_bytes_of_a_row(columns: int, expected: int) -> None:
    assert plane_bytes(columns) == expected
    assert pack_planes(torch.zeros(2, columns, dtype=torch.uint8), 3).shape == (3, 2, expected)


def test_padding_bits_are_zero() -> None:
    planes = pack_planes(torch.full((2, 11), 15, dtype=torch.uint8), 4)
    assert planes[:, :, 1].eq(0b111).all()
