from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.transforms import channel_order

from .twins import correlated, examples, gaussian


@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=20),
    st.data(),
    st.sampled_from(["ascending", "descending", "none"]),
)
@examples(100)
def test_order(energy: list[float], data: st.DataObject, order: Any) -> None:
    """Many ties: outliers are the largest, the last among equals, and come last; the rest is sorted as asked."""
    outliers = data.draw(st.integers(0, len(energy) - 1))
    found = channel_order(torch.tensor(energy, dtype=torch.float64), outliers, order)
    assert found.dtype == torch.int64
    by_energy = sorted(range(len(energy)), key=lambda i: (energy[i], i))
    normal, last = by_energy[: len(energy) - outliers], by_energy[len(energy) - outliers :]
    expected = {
        "ascending": normal + last,
        "descending": normal[::-1] + last,
        "none": sorted(normal) + sorted(last),
    }
    assert found.tolist() == expected[order]


@pytest.mark.parametrize("order", ["ascending", "descending", "none"])
def test_reordering_both_sides_changes_nothing(order: Any) -> None:
    """Without quantization a reordered site gives the same outputs."""
    x, weights = correlated(37, seed=1), gaussian(11, 37, seed=2)
    permutation = channel_order(x.double().square().sum(dim=0), 5, order)
    assert sorted(permutation.tolist()) == list(range(37))
    assert torch.allclose(x @ weights.T, x[:, permutation] @ weights[:, permutation].T, atol=1e-4)
    hessian = x.T @ x
    moved = x[:, permutation]
    assert torch.allclose(moved.T @ moved, hessian[permutation][:, permutation], rtol=1e-4, atol=1e-3)
