"""WGM: the numbers that its authors and its critics give, and every weight at the nearest level of one table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.codebook import CodebookMatrix, matrix_shapes, on_grid
from bitwright.recipe import ActivationRecipe, WeightRecipe, preset
from bitwright.reference import quantized_linear
from bitwright.runtime import ops, planes, tiles
from bitwright.solvers import SOLVERS, wgm
from bitwright.solvers.grouping import Magnitudes
from bitwright.solvers.hessian import Factor

from .backends import needs_native, restore, use
from .twins import examples, gaussian, planes_of

WGM = preset("wgm").weights


def recipe(**changes: Any) -> WeightRecipe:
    return WGM.model_copy(update=changes)


def no_factor(columns: int) -> Factor:
    """The method reads none: one full of NaN shows it."""
    nothing = torch.full((columns, columns), torch.nan)
    return Factor(nothing, nothing[0], torch.ones(columns, dtype=torch.bool), 0.0, None, nothing[0])


def noise(weights: Tensor, found: Tensor) -> float:
    """Squared error over the squared weights."""
    return float((weights.double() - found.double()).square().sum() / weights.double().square().sum())


# --- the paper's arithmetic -------------------------------------------------------------------------------------------


def test_bits_of_the_paper_and_honest_ones() -> None:
    size = 3072 * 3072
    bits = wgm.honest_bits([size // 32] * 32)
    assert bits.claimed == pytest.approx(1.00005, abs=5e-6)
    assert bits.fixed == pytest.approx(6.00005, abs=5e-6)
    assert bits.entropy == pytest.approx(bits.fixed)  # equal groups
    for groups, claimed, fixed in ((8, 1.0001, 4), (32, 1.0005, 6), (460, 1.0074, 10)):
        found = wgm.honest_bits([10**6 // groups] * (groups - 1) + [10**6 - (groups - 1) * (10**6 // groups)])
        assert found.claimed == pytest.approx(claimed, abs=5e-5)
        assert found.fixed == pytest.approx(fixed + claimed - 1, abs=5e-5)
    # A whole matrix without any loss would cost hardly more than one bit by the paper's formula.
    assert wgm.honest_bits([25 * 10**6 // 2282] * 2282).claimed == pytest.approx(1.0015, abs=5e-5)
    assert wgm.honest_bits([7, 1, 0]).entropy == pytest.approx(1 + 0.543564 + 48 / 8, abs=1e-5)


# Bits, algorithm, window; noise of the group means and entropy of signs and groups, each from and to.
GAUSSIAN = [
    (4, "dp", 1, (9.4e-3, 9.6e-3), (3.75, 3.78)),
    (4, "windowed", 512, (9.8e-3, 1.18e-2), (3.55, 3.9)),
    (4, "windowed", 64, (9.8e-3, 1.18e-2), (3.55, 3.9)),
    (6, "dp", 1, (6.3e-4, 6.5e-4), (5.70, 5.73)),
    (6, "windowed", 512, (7.2e-4, 8.1e-4), (5.6, 5.85)),
]


@pytest.mark.parametrize(("bits", "levels", "window", "error", "entropy"), GAUSSIAN)
def test_gaussian_weights(
    bits: int, levels: Any, window: int, error: tuple[float, float], entropy: tuple[float, float]
) -> None:
    """Noise and entropy of a million Gaussian weights, as a study of the method found them; the nearest level gains."""
    weights = (gaussian(1000, 1000, seed=bits) * 0.02).bfloat16()
    asked = recipe(bits=bits, levels=levels, window=window, penalty=0.75 if levels == "windowed" else 0.0)
    codes, table, found = wgm.quantize(weights, asked)
    of_the_groups = found.cost() / float(weights.double().square().sum())
    assert error[0] <= of_the_groups <= error[1]
    assert entropy[0] <= wgm.honest_bits(found.counts.tolist()).entropy <= entropy[1]
    matrix = CodebookMatrix(1000, 1000, bits, 128, "shared", codes, None, table=table)
    assert noise(weights, matrix.dequantize()) <= of_the_groups * (1 + 1e-6)


def test_a_trained_matrix_has_few_magnitudes() -> None:
    weights = (gaussian(2500, 2520, seed=0) * 0.02).bfloat16()
    assert len(wgm.magnitudes_of(weights).values) == pytest.approx(2282, abs=60)


def test_the_optimum_is_better_than_merging() -> None:
    """By half a decibel at 32 groups; a third of that is won back where each weight takes the nearest level."""
    weights = (gaussian(600, 700, seed=2) * 0.02).bfloat16()
    for bits, least in ((6, 0.25), (4, 0.1)):
        errors = {}
        for levels, penalty in (("dp", 0.0), ("windowed", 0.75)):
            codes, table, _ = wgm.quantize(weights, recipe(bits=bits, levels=levels, penalty=penalty))
            found = CodebookMatrix(600, 700, bits, 128, "shared", codes, None, table=table).dequantize()
            errors[levels] = noise(weights, found)
        assert 10 * torch.tensor(errors["windowed"] / errors["dp"]).log10() > least


# --- codes and tables -------------------------------------------------------------------------------------------------


def decoded(weights: Tensor, table: Tensor) -> list[list[int]]:
    """Codes by trying all entries of the table of the weight's sign; the smaller of two magnitudes as near."""
    result = []
    for row in weights.double().tolist():
        codes = []
        for weight in row:
            sign = 0 if torch.signbit(torch.tensor(weight)) else 1
            # In the order of the magnitudes; min takes the first of equals.
            codes.append(min(range(sign, len(table), 2), key=lambda code: abs(weight - float(table[code]))))
        result.append(codes)
    return result


@given(
    st.integers(1, 6),
    st.integers(1, 21),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["windowed", "greedy", "dp"]),
    st.integers(0, 10**6),
)
@examples(80)
def test_every_weight_gets_the_nearest_level(
    rows: int, columns: int, bits: int, dtype: torch.dtype, levels: Any, seed: int
) -> None:
    weights = gaussian(rows, columns, seed=seed).to(dtype)
    weights[0, 0] = 0.0
    weights[-1, -1] = -0.0
    codes, table, found = wgm.quantize(weights, recipe(bits=bits, levels=levels, window=2))
    assert table.shape == (2**bits,)
    assert codes.tolist() == planes_of(decoded(weights, table), bits)
    assert torch.equal(table[0::2], -table[1::2])
    assert bool((table[1::2].diff() >= 0).all())
    if bits != 2:  # a table of four is rounded for the kernels
        levels_found = torch.from_numpy(found.levels).float()
        assert torch.equal(table[1::2][: len(levels_found)], levels_found)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 6, 8])
def test_native_is_the_reference(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of slices, as the columns beside the outliers are."""
    weights = gaussian(37, 90, seed=bits).to(dtype)[:, 3:80]
    for part in (weights, weights.T):
        ours = wgm.quantize(part, recipe(bits=bits))
        use("reference", monkeypatch)
        plain = wgm.quantize(part, recipe(bits=bits))
        monkeypatch.undo()
        restore()
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_in_32(dtype: torch.dtype, backend: str) -> None:
    weights = gaussian(40, 50, seed=1).to(dtype)
    narrow, wide = wgm.quantize(weights, WGM), wgm.quantize(weights.float(), WGM)
    assert torch.equal(wgm.compact(weights.float()), weights)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])
    full = gaussian(4, 5)
    assert wgm.compact(full) is full or torch.equal(wgm.compact(full), full)
    assert wgm.compact(full).dtype == torch.float32


def test_magnitudes_are_counted(backend: str) -> None:
    weights = torch.tensor([[1.0, -1.0, 0.5], [0.0, -0.0, 1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = wgm.magnitudes_of(weights.to(dtype))
        assert (found.values.tolist(), found.counts.tolist()) == ([0.0, 0.5, 1.0], [2, 1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(dtype: torch.dtype, bad: float) -> None:
    weights = gaussian(3, 8).to(dtype)
    weights[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        wgm.quantize(weights, WGM)


# --- more magnitudes than a search bears ------------------------------------------------------------------------------


def of_all(weights: Tensor) -> Magnitudes:
    return Magnitudes.of(weights.flatten().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_of_many_magnitudes(dtype: torch.dtype) -> None:
    """Neighbours in order, cut where leading bits change, each bin by its number of weights and their mean."""
    weights = gaussian(300, 400, seed=3).to(dtype) * torch.logspace(-9, 9, 400, dtype=dtype)
    everything, found = of_all(weights), wgm.magnitudes_of(weights)
    assert len(everything.values) > wgm.MOST_DISTINCT >= len(found.values) > wgm.MOST_DISTINCT // 3
    assert found.entries == everything.entries == weights.numel()
    ends = found.counts.cumsum()
    assert everything.counts.max() < 4
    ordered = np.sort(weights.abs().double().flatten().numpy())
    starts = ends - found.counts
    np.testing.assert_allclose(found.values, np.add.reduceat(ordered, starts) / found.counts, rtol=1e-12)
    assert (np.diff(found.values) > 0).all()
    assert (ordered[ends - 1] / ordered[starts] - 1).max() < 2**-8


@needs_native
@pytest.mark.parametrize(
    ("levels", "bits", "penalty", "close"),
    [("dp", 6, 0.0, 1e-4), ("dp", 8, 0.0, 1e-4), ("dp", 4, 0.75, 1e-4), ("windowed", 6, 0.75, 0.02)],
)
def test_a_search_over_bins_is_as_good(levels: Any, bits: int, penalty: float, close: float) -> None:
    weights = gaussian(270, 400, seed=bits) * 0.02
    asked = recipe(bits=bits, levels=levels, penalty=penalty)
    codes, table, found = wgm.quantize(weights, asked)
    assert len(wgm.magnitudes_of(weights).values) <= wgm.MOST_DISTINCT
    exact = wgm.table_of(wgm.group(of_all(weights), asked).levels, bits)
    losses = []
    for planes_found, one in ((codes, table), (wgm.encode(weights, exact), exact)):
        losses.append(
            noise(weights, CodebookMatrix(270, 400, bits, 128, "shared", planes_found, None, table=one).dequantize())
        )
    assert losses[0] <= losses[1] * (1 + close)
    # A level is the mean of the weights of its group, and not of what stands for them.
    ordered = np.sort(weights.abs().double().flatten().numpy())
    np.testing.assert_allclose(found.levels, np.add.reduceat(ordered, found.begins) / found.counts, rtol=1e-4)


@needs_native
def test_greedy_merging_of_bins() -> None:
    """From 65,536 windows at most, and no worse than from single entries."""
    weights = gaussian(270, 400, seed=1) * 0.02
    found = wgm.quantize(weights, recipe(levels="greedy"))[2]
    assert set(found.begins) <= set(wgm.magnitudes_of(weights).counts.cumsum()) | {0}
    assert found.cost() < wgm.group(of_all(weights), recipe(levels="greedy")).cost()


@pytest.mark.parametrize("seed", [0, 1])
def test_few_magnitudes_of_many_weights_are_not_binned(seed: int) -> None:
    """Also where they are no numbers of 16 bits: counted as they are."""
    few = gaussian(1, 900, seed=seed)[0]
    weights = few[torch.randint(0, 900, (600, 300), generator=torch.Generator().manual_seed(seed))]
    assert wgm.compact(weights).dtype == torch.float32
    found, everything = wgm.magnitudes_of(weights), of_all(weights)
    assert not found.binned
    assert found.values.tolist() == everything.values.tolist()
    assert found.counts.tolist() == everything.counts.tolist()


def test_memory_does_not_grow_with_distinct_magnitudes() -> None:
    """11008 x 4096, 8 bits: 23 GB where every weight was a magnitude of its own. Greedy is told of, not bounded."""
    sizes = 11008, 4096
    assert wgm.working_bytes(*sizes, recipe(bits=8, levels="dp")) < 350e6
    assert wgm.working_bytes(*sizes, recipe(bits=6)) < 350e6
    assert wgm.working_bytes(*sizes, recipe(bits=6, levels="greedy")) > 100 * 11008 * 4096


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("bits", [1, 2, 6])
def test_constant_matrices(value: float, bits: int) -> None:
    matrix = wgm.solve(torch.full((4, 16), value), no_factor(16), 0, recipe(bits=bits))
    torch.testing.assert_close(matrix.dequantize(), torch.full((4, 16), value), rtol=1e-3, atol=0.0)


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "outliers"), itertools.product((1, 2, 5, 6, 8), (0, 7)))
def test_solve(bits: int, outliers: int) -> None:
    weights = gaussian(5, 45, seed=bits)
    matrix = SOLVERS["wgm"](weights, no_factor(45), outliers, recipe(bits=bits, window=4))
    produced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in matrix.tensors().items()}
    assert produced == matrix_shapes(5, 45, bits, 128, "shared", outliers)
    assert matrix.stored_bits() == 8 * bits * 5 * -(-(45 - outliers) // 8) + 32 * 2**bits + (
        5 * (8 * outliers + 16) if outliers else 0
    )
    normal = weights[:, : 45 - outliers]
    site = matrix.dequantize_site_order()
    assert matrix.table is not None
    codes = decoded(normal, matrix.table)
    assert site[:, : 45 - outliers].tolist() == [[float(matrix.table[code]) for code in row] for row in codes]
    if outliers:
        step = float(weights[:, 45 - outliers :].abs().max()) / 127
        assert float((site - weights)[:, 45 - outliers :].abs().max()) <= step * 0.51


@pytest.mark.parametrize("kernels", [tiles, planes])
def test_two_bits_fit_the_kernels(kernels: Any, backend: str) -> None:
    """As free levels for every row and group, exactly; and back, to the table."""
    weights = gaussian(70, 150, seed=3)
    matrix = wgm.solve(weights, no_factor(150), 10, recipe(bits=2, group=64))
    free = matrix.expanded()
    assert free.kind == "free"
    assert torch.equal(free.dequantize(), matrix.dequantize())
    geometry = (planes.PlaneGeometry if kernels is planes else tiles.Geometry)(70, 150, 10, 64)
    packed = kernels.pack(matrix)
    assert torch.equal(packed, kernels.pack(free))
    back = kernels.unpack(packed, geometry, "shared")
    stored = matrix.tensors()
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in back)


def test_the_linear_of_a_shared_table(backend: str) -> None:
    inputs = ActivationRecipe(balance="none")
    matrix = wgm.solve(gaussian(40, 96, seed=4), no_factor(96), 8, recipe(bits=2, group=32))
    x = gaussian(3, 96, seed=5)
    y = ops.site_linear(x, tiles.pack(matrix), None, None, 40, 8, 32, 1.0)
    torch.testing.assert_close(y.double(), quantized_linear(x, matrix, inputs), rtol=1e-5, atol=1e-5)


def test_tables_that_are_no_grid() -> None:
    matrix = wgm.solve(gaussian(4, 32), no_factor(32), 0, recipe(bits=3))
    assert on_grid(torch.tensor([-1.27, -0.1, 0.1, 1.27])) is None
    with pytest.raises(ValueError, match="no int8 multiples"):
        matrix.expanded()
    with pytest.raises(ValueError, match="no int8 multiples"):
        tiles.pack(matrix)
