from __future__ import annotations

import pytest
import torch

from bitwright.calibration import CrossSum, HessianSum, channel_energy, row_blocks, wave_sequences
from bitwright.calibration.statistics import ROW_BLOCK

from .twins import gaussian


@pytest.mark.parametrize("channels", [1, 7, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 77])
def test_hessian_is_the_mean_of_outer_products(channels: int) -> None:
    """Three sequences of different length, added block by block in any order of the blocks."""
    total = HessianSum(channels)
    sequences = [gaussian(length, channels, seed=length) for length in (5, 1, 9)]
    for x in sequences:
        for start in reversed(row_blocks(channels)):
            total.add_rows(start, x)
        total.sequences += 1
    everything = torch.cat(sequences).double()
    expected = 2 / 3 * everything.T @ everything
    found = total.finish()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_row_blocks_cover_every_row_once() -> None:
    total = HessianSum(2 * ROW_BLOCK + 1)
    assert list(row_blocks(2 * ROW_BLOCK + 1)) == [0, ROW_BLOCK, 2 * ROW_BLOCK]
    x = gaussian(3, 2 * ROW_BLOCK + 1)
    total.add_rows(ROW_BLOCK, x)
    assert not total.total[:ROW_BLOCK].any()
    assert not total.total[2 * ROW_BLOCK :].any()


@pytest.mark.parametrize("rows", [1, ROW_BLOCK, ROW_BLOCK + 3])
def test_cross_sum_is_the_mean_of_products_of_two(rows: int) -> None:
    total, sequences = CrossSum(rows, 5), [(gaussian(n, rows, seed=n), gaussian(n, 5, seed=2 * n)) for n in (4, 7)]
    for y, x in sequences:
        for start in reversed(row_blocks(rows)):
            total.add_rows(start, y, x)
        total.sequences += 1
    y, x = (torch.cat(parts).double() for parts in zip(*sequences, strict=True))
    assert torch.allclose(total.finish().double(), y.T @ x, rtol=1e-5, atol=1e-5)


def test_no_sequences_are_zeros() -> None:
    assert not HessianSum(4).finish().any()
    assert not CrossSum(3, 4).finish().any()


def test_energy_is_the_diagonal() -> None:
    x = gaussian(300, 20) * torch.logspace(-6, 6, 20)
    energy = channel_energy(x)
    assert energy.dtype == torch.float64
    assert torch.allclose(energy, (x.double().T @ x.double()).diagonal(), rtol=1e-12)
    parts = channel_energy(x[:100]) + channel_energy(x[100:])
    assert torch.allclose(parts, energy, rtol=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(8, 1024), (2048, 4), (8192, 1), (100_000, 1), (3000, 2)])
def test_sequences_held_at_a_time(length: int, expected: int) -> None:
    assert wave_sequences(length) == expected
