"""Codes of 1 to 8 bits times inputs of 1 to 8 bits: the product by bit planes, and every variant of the kernels."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.activations import quantize_groups
from bitwright.codebook import CodebookMatrix, Kind
from bitwright.packing import pack_planes
from bitwright.recipe import ActivationRecipe
from bitwright.reference import level_coefficients, plane_linear, plane_sums, quantized_linear
from bitwright.runtime import ops, tiles
from kernel_twin import kernel_linear

from .backends import needs_native, on_every_variant
from .test_linear import module_of, size
from .test_reference import CODES, PLAIN, M, worked_matrix
from .test_site_products import SPREADS, spread_out
from .twins import examples, gaussian, random_matrix

# Every width that a kind of codebook has in tiles.
FORMS: list[tuple[Kind, int]] = [
    *(("free", bits) for bits in range(1, 5)),
    *(("uniform", bits) for bits in range(1, 9)),
    *(("symmetric", bits) for bits in range(1, 9)),
    *(("shared", bits) for bits in range(1, 5)),
]
every_form = pytest.mark.parametrize(("kind", "bits"), FORMS)


def a_matrix(kind: Kind, bits: int, *sizes: int, seed: int = 0, permuted: bool = True) -> CodebookMatrix:
    rows, columns, outliers, group = sizes
    return random_matrix(rows, columns, group, kind, outliers, seed, permuted, bits)


def multiply(
    x: Tensor,
    matrix: CodebookMatrix,
    input_bits: int,
    bias: Tensor | None = None,
    clip: float = 1.0,
    symmetric: bool = False,
) -> Tensor:
    order = None if matrix.permutation is None else matrix.permutation.to(torch.int32)
    form = (matrix.bits, tiles.has_table(matrix.bits, matrix.kind))
    sizes = (matrix.rows, matrix.outlier_columns, matrix.group)
    y: Tensor = ops.site_linear(x, tiles.pack(matrix), order, bias, *sizes, clip, symmetric, input_bits, *form)
    return y


# --- by bit planes ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.data())
@examples(40)
def test_levels_are_sums_over_sets_of_bits(bits: int, data: st.DataObject) -> None:
    levels = data.draw(st.lists(st.integers(-128, 127), min_size=2**bits, max_size=2**bits))
    found = level_coefficients(torch.tensor(levels, dtype=torch.int8)).tolist()
    for code, level in enumerate(levels):
        assert sum(found[subset] for subset in range(2**bits) if subset & ~code == 0) == level


@pytest.mark.parametrize("bits", range(1, 9))
def test_equally_spaced_levels_need_no_products_of_planes(bits: int) -> None:
    """Then the sum over planes i and j of 2^(i + j) popcount(W_i AND X_j), less zero times the sum of the inputs."""
    found = level_coefficients(torch.arange(2**bits) - 5).tolist()
    assert found == [-5] + [subset if subset & (subset - 1) == 0 else 0 for subset in range(1, 2**bits)]


def test_worked_sums() -> None:
    """The example of BWA in quarters: I = 4.375 / 0.1 = 43.75, S = 6.5, y = 0.1 (43.75 - 6 * 6.5) = 0.475."""
    matrix = worked_matrix(M)
    coefficients = level_coefficients(matrix.integer_levels())
    assert coefficients.tolist() == [[[-1, 2, 5, 6]]]  # beta_0, alpha_0, beta_1 - beta_0, alpha_1 - alpha_0
    planes = torch.tensor([[[[code >> bit & 1 for code in matrix.codes()[0].tolist()]]] for bit in range(2)]).bool()
    assert plane_sums(planes, coefficients, torch.tensor([CODES]), 4).tolist() == [[175]]
    assert plane_sums(planes, coefficients, torch.ones(1, 8, dtype=torch.int64), 1).tolist() == [[26]]


def test_both_zero_points() -> None:
    """(X - zx)(W - zw) = X W - zx sum W - zw sum X + K zx zw, by hand."""
    w, x, zw, zx = [0, 5, 7, 3], [9, 2, 0, 15], 4, 6
    by_hand = sum(a * b for a, b in zip(w, x, strict=True)) - zx * sum(w) - zw * sum(x) + 4 * zw * zx
    assert by_hand == sum((a - zw) * (b - zx) for a, b in zip(w, x, strict=True)) == -43
    planes = torch.tensor([[[[code >> bit & 1 for code in w]]] for bit in range(3)]).bool()
    coefficients = level_coefficients((torch.arange(8) - zw).expand(1, 1, 8))
    sums = [int(plane_sums(planes, coefficients, torch.tensor([codes]), 4)) for codes in (x, [1] * 4)]
    assert sums[0] - zx * sums[1] == by_hand


@given(
    form=st.sampled_from(FORMS),
    input_bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    normal=st.integers(1, 40),
    group=st.sampled_from([8, 16, 24]),
    outliers=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
@examples(80)
def test_planes_are_the_dequantized_product(
    form: tuple[Kind, int], input_bits: int, rows: int, normal: int, group: int, outliers: int, seed: int
) -> None:
    matrix = a_matrix(*form, rows, normal + outliers, outliers, group, seed=seed)
    assert matrix.permutation is not None
    recipe = ActivationRecipe(bits=input_bits, balance="none")
    x = gaussian(3, normal + outliers, seed=seed + 1) * 3
    bias = gaussian(rows, seed=seed + 2)
    found = plane_linear(x, matrix, recipe, bias)
    quantized = quantize_groups(x[:, matrix.permutation][:, :normal], group, recipe)
    inputs = (quantized.step.double() * (quantized.codes.double() - quantized.zero.double())).flatten(1)[:, :normal]
    weights = matrix.dequantize_site_order().double()
    expected = inputs @ weights[:, :normal].T + bias.double()
    if outliers:
        alone = plane_linear(x.index_fill(1, matrix.permutation[:normal], 0.0), matrix, recipe)
        torch.testing.assert_close(found, expected + alone, rtol=1e-9, atol=1e-9 * float(found.abs().max()))
    else:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(found.abs().max()))
    if matrix.bits == 2:
        same = quantized_linear(x, matrix, recipe, bias)
        torch.testing.assert_close(found, same, rtol=1e-9, atol=1e-9 * float(found.abs().max()))


def test_free_plane_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="balance = 'support'"):
        plane_linear(torch.zeros(1, 8), worked_matrix(M), ActivationRecipe())
    assert float(plane_linear(torch.zeros(1, 8), worked_matrix(M), PLAIN)) == 0


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 256, 32, 128), (33, 301, 17, 24)])
@every_form
def test_packing_keeps_every_bit(backend: str, kind: Kind, bits: int, shape: tuple[int, ...]) -> None:
    matrix = a_matrix(kind, bits, *shape)
    geometry, packed = tiles.geometry_of(matrix), tiles.pack(matrix)
    assert torch.equal(packed, tiles.pack_reference(matrix, geometry, torch.zeros_like(packed)))
    found, expected = tiles.unpack(packed, geometry, kind), matrix.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    rows, columns, *sizes = shape
    weights = ops.dequantize(packed, rows, columns, *sizes, bits, geometry.table)
    assert torch.equal(weights, matrix.dequantize_site_order())


def test_what_tiles_do_not_hold_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="up to 4 bits with a table, of 3 to 8 without; found 6 with levels"):
        tiles.pack(a_matrix("shared", 6, 4, 40, 0, 8))
    packed, x = tiles.pack(a_matrix("uniform", 4, 20, 100, 4, 32)), gaussian(2, 100)
    with pytest.raises(ValueError, match="found 2 with zero points"):
        ops.site_linear(x, packed, None, None, 20, 4, 32, 1.0, False, 4, 2, False)
    with pytest.raises(ValueError, match="packed weights of"):
        ops.site_linear(x, packed, None, None, 20, 4, 32, 1.0, False, 4, 4, True)
    for input_bits in (0, 9):
        with pytest.raises(ValueError, match=f"inputs have 1 to 8 bits; found {input_bits}"):
            ops.site_linear(x, packed, None, None, 20, 4, 32, 1.0, False, input_bits, 4, False)


# --- the kernels ------------------------------------------------------------------------------------------------------


@needs_native
@given(
    form=st.sampled_from(FORMS),
    input_bits=st.integers(1, 8),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 16, 24, 64, 128, 136]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 0, 1, 3, 16, 33]),
    tokens=st.integers(1, 40),
    clip=st.sampled_from([1.0, 0.85]),
    symmetric=st.booleans(),
    spread=SPREADS,
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(200)
def test_all_variants_agree_to_the_last_bit(
    form: tuple[Kind, int],
    input_bits: int,
    rows: int,
    groups: int,
    group: int,
    ragged: int,
    outliers: int,
    tokens: int,
    clip: float,
    symmetric: bool,
    spread: str,
    threads: int,
    seed: int,
) -> None:
    normal = max(1, groups * group - ragged)
    matrix = a_matrix(*form, rows, normal + outliers, outliers, group, seed=seed)
    x = spread_out(gaussian(tokens, matrix.columns, seed=seed), spread)
    recipe = ActivationRecipe(bits=input_bits, balance="none", clip=clip, symmetric=symmetric and input_bits > 1)
    rest: tuple[Any, ...] = (matrix, input_bits, None, clip, recipe.symmetric)
    results = on_every_variant(lambda: (multiply(x, *rest), multiply(x[-1:], *rest)), threads)
    for name, (found, alone) in results.items():
        assert torch.equal(alone[0], found[-1]), "a token's result depends on its neighbours"
        assert torch.equal(found, results["scalar"][0]), name
    if spread in ("normal", "positive", "negative"):
        twin = kernel_linear(x, matrix, recipe, None)
        torch.testing.assert_close(found, twin, rtol=1e-6, atol=1e-6 * float(twin.abs().max()))


@needs_native
@every_form
def test_integer_sums_are_exact_at_their_bounds(kind: Kind, bits: int) -> None:
    """Largest levels, largest inputs of either sign: nothing saturates. All scales are 1, all sums below 2^24."""
    rows, columns = 40, 192
    made = a_matrix(kind, bits, rows, columns, 0, 64, permuted=False)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    parts: dict[str, Any] = {"planes": pack_planes(codes, bits)}
    if made.scales is not None:
        parts["scales"] = torch.ones_like(made.scales)
    if made.levels is not None:
        parts["levels"] = made.levels.sign() * 127 - (made.levels < 0).to(torch.int8)  # -128, 0 and 127
    if made.zeros is not None:
        parts["zeros"] = (made.zeros % 2) * (2**bits - 1)
    if made.table is not None:
        parts["table"] = made.table / torch.tensor(0.0173).half().float()
    matrix = CodebookMatrix(**{**vars(made), **parts})
    for input_bits, tokens in itertools.product(range(1, 9), (1, 3, 40)):
        top = 2.0**input_bits - 1
        x = torch.randint(0, 2, (tokens, columns), generator=torch.Generator().manual_seed(2)) * top
        x[0] = top
        x[:, ::64], x[:, 1::64] = 0.0, top  # steps of 1
        x[tokens // 2 :] *= -1
        expected = x.double() @ matrix.dequantize().double().T
        assert float(expected.abs().max()) < 2**24
        for name, found in on_every_variant(partial(multiply, x, matrix, input_bits)).items():
            assert torch.equal(found.double(), expected), (name, input_bits, tokens)


@pytest.mark.parametrize("input_bits", [1, 4, 5, 8])
@every_form
def test_linear_is_the_product_by_planes(backend: str, kind: Kind, bits: int, input_bits: int) -> None:
    matrix = a_matrix(kind, bits, 39, 150, 6, 64)
    x, bias = gaussian(3, 150, seed=1) * 3, gaussian(39, seed=2)
    expected = plane_linear(x, matrix, ActivationRecipe(bits=input_bits, balance="none", clip=0.9), bias)
    found = multiply(x, matrix, input_bits, bias, 0.9)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("input_bits", [2, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(backend: str, value: float, input_bits: int) -> None:
    x = gaussian(3, 150, seed=3)
    x[1, 7] = value
    found = multiply(x, a_matrix("uniform", 8, 40, 150, 6, 64), input_bits)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_bits", [3, 8])
@every_form
def test_a_linear_packs_and_unpacks(backend: str, kind: Kind, bits: int, input_bits: int) -> None:
    recipe = ActivationRecipe(bits=input_bits, balance="none")
    matrix = a_matrix(kind, bits, 39, 150, 6, 64)
    x, bias = gaussian(5, 150, seed=3), gaussian(39, seed=2)
    module = module_of(matrix, recipe, bias)
    before, plain = {name: part.clone() for name, part in module.state_dict().items()}, module(x)
    assert module.packable == (backend != "reference")
    if module.packable:
        module.pack()
        assert module.packed is not None
        assert not hasattr(module, "codes") or module.codes is None
    assert (module(x) - plain).abs().max() <= 1e-5 * size(x, matrix)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], part) for name, part in before.items())


def test_what_stays_on_torch() -> None:
    """More levels than a byte shuffle finds, free plane scales without 2-bit codes, inputs that are not quantized."""
    eight = ActivationRecipe(bits=8, balance="none")
    assert not module_of(a_matrix("shared", 6, 8, 64, 0, 32), eight).packable
    assert not module_of(a_matrix("uniform", 4, 8, 64, 0, 32), ActivationRecipe(balance="support")).packable
    assert not module_of(a_matrix("uniform", 4, 8, 64, 0, 32)).packable
