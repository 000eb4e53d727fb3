"""Both products of a site, from byte tiles and from bit planes: every variant of this build against the others, the
format and the readable twin."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe
from bitwright.reference import quantized_linear
from bitwright.runtime import ops, plane_ops, planes, tiles

from .backends import needs_native, on_every_variant
from .test_reference import EXTREMES
from .twins import examples, gaussian, random_matrix


@dataclass(frozen=True)
class Product:
    """One of the two ops for one way of balancing."""

    tiles: ModuleType
    balance: Any

    symmetric: bool = False

    def multiply(self, x: Tensor, packed: Tensor, order: Any, bias: Any, *sizes: int, clip: float = 1.0) -> Tensor:
        if self.tiles is tiles:
            return ops.site_linear(x, packed, order, bias, *sizes, clip, self.symmetric)
        return plane_ops.site_planes(x, packed, order, bias, *sizes, clip, self.balance)

    def __call__(self, x: Tensor, matrix: CodebookMatrix, bias: Tensor | None = None, clip: float = 1.0) -> Tensor:
        order = None if matrix.permutation is None else matrix.permutation.to(torch.int32)
        sizes = (matrix.rows, matrix.outlier_columns, matrix.group)
        return self.multiply(x, self.tiles.pack(matrix), order, bias, *sizes, clip=clip)

    def recipe(self, clip: float = 1.0) -> ActivationRecipe:
        return ActivationRecipe(balance=self.balance, clip=clip, symmetric=self.symmetric)

    def __str__(self) -> str:
        return f"{self.tiles.__name__.rpartition('.')[2]}-{self.balance}{'-symmetric' * self.symmetric}"


PRODUCTS = [
    Product(tiles, "none"),
    Product(tiles, "none", True),
    *(Product(planes, balance) for balance in plane_ops.BALANCES),
]
every_product = pytest.mark.parametrize("product", PRODUCTS, ids=str)

SITES = [
    # rows, columns, outliers, group
    (64, 256, 32, 128),
    (39, 300, 17, 64),
    (1, 40, 3, 24),
    (80, 264, 8, 256),
    (80, 600, 8, 256),
    (3, 1300, 0, 1024),
    (100, 1000, 100, 128),
    (7, 9, 8, 8),
    (32, 129, 1, 128),
    (33, 64, 0, 16),
]


def a_matrix(rows: int, columns: int, outliers: int, group: int, kind: Any = "free", seed: int = 0) -> CodebookMatrix:
    return random_matrix(rows, columns, group, kind, outliers, seed, True)


def unpermuted(*sizes: int) -> CodebookMatrix:
    return CodebookMatrix(**{**vars(a_matrix(*sizes)), "permutation": None})


def spread_out(x: Tensor, spread: str) -> Tensor:
    return {
        "normal": x,
        "positive": x.abs() + 5,
        "negative": -x.abs() * 0.01 - 3,
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "equal": torch.full_like(x, 2.5),
        "mixed": x * torch.logspace(-6, 6, len(x)).unsqueeze(1),
    }[spread]


SPREADS = st.sampled_from(["normal", "positive", "negative", "huge", "tiny", "equal", "mixed"])


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("kind", ["free", "uniform", "shared"])
@pytest.mark.parametrize("packing", [tiles, planes])
def test_packing_keeps_every_bit(backend: str, packing: Any, shape: Any, kind: Any) -> None:
    matrix = a_matrix(*shape, kind=kind)
    geometry, packed = packing.geometry_of(matrix), packing.pack(matrix)
    assert torch.equal(packed, packing.pack_reference(matrix, geometry, torch.zeros_like(packed)))
    found, expected = packing.unpack(packed, geometry, kind), matrix.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@every_product
@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize(("tokens", "clip"), [(1, 1.0), (3, 0.95), (14, 0.9)])
def test_linear_is_the_readable_twin(backend: str, product: Product, shape: Any, tokens: int, clip: float) -> None:
    matrix = a_matrix(*shape)
    x, bias = gaussian(tokens, matrix.columns, seed=1) * 3, gaussian(matrix.rows, seed=2)
    expected = quantized_linear(x, matrix, product.recipe(clip), bias)
    found = product(x, matrix, bias, clip)
    assert found.shape == (tokens, matrix.rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@needs_native
@given(
    product=st.sampled_from(PRODUCTS),
    rows=st.integers(1, 140),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 24, 64, 128, 136, 264]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 0, 1, 3, 16, 33]),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 12, 17, 97, 110]),
    kind=st.sampled_from(["free", "uniform", "shared"]),
    clip=st.sampled_from([1.0, 0.85]),
    spread=SPREADS,
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(120)
def test_all_variants_agree_to_the_last_bit(
    product: Product,
    rows: int,
    groups: int,
    group: int,
    ragged: int,
    outliers: int,
    tokens: int,
    kind: Any,
    clip: float,
    spread: str,
    threads: int,
    seed: int,
) -> None:
    normal = max(1, groups * group - ragged)
    matrix = a_matrix(rows, normal + outliers, outliers, group, kind, seed)
    x = spread_out(gaussian(tokens, matrix.columns, seed=seed), spread)
    results = on_every_variant(
        lambda: (product(x, matrix, clip=clip), product(x[-1:], matrix, clip=clip)),
        threads,
    )
    for name, (found, alone) in results.items():
        assert torch.equal(alone[0], found[-1]), "a token's result depends on its neighbours"
        assert torch.equal(found, results["scalar"][0]), name


@every_product
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_inputs(backend: str, product: Product, name: str) -> None:
    matrix = unpermuted(40, 150, 6, 64)
    x = EXTREMES[name](gaussian(4, 150, seed=8))
    expected = quantized_linear(x, matrix, product.recipe())
    size = float(x.double().abs().max() * 150 * matrix.dequantize().abs().max()) + 1e-12
    torch.testing.assert_close(product(x, matrix).double(), expected, rtol=1e-3, atol=1e-6 * size)


@every_product
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", [0, 149])
def test_what_is_not_finite_stays_visible(backend: str, product: Product, value: float, channel: int) -> None:
    x = gaussian(3, 150, seed=3)
    x[1, channel] = value
    found = product(x, unpermuted(40, 150, 6, 64))
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


@every_product
def test_linears_of_a_site_in_one_call(backend: str, product: Product) -> None:
    """Packed one behind the other, each from a tile of its own on: the same numbers as one by one."""
    first = a_matrix(33, 100, 4, 32, seed=1)
    assert first.permutation is not None
    matrices = [first, *(a_matrix(rows, 100, 4, 32, seed=rows) for rows in (8, 64))]
    matrices = [CodebookMatrix(**{**vars(m), "permutation": first.permutation}) for m in matrices]
    packed = torch.cat([product.tiles.pack(matrix) for matrix in matrices])
    x = gaussian(3, 100, seed=5)
    found = product.multiply(x, packed, first.permutation.to(torch.int32), None, 64 + 32 + 64, 4, 32)
    for matrix, at in zip(matrices, (0, 64, 96), strict=True):
        alone = product(x, matrix)
        assert torch.allclose(found[:, at : at + matrix.rows], alone, rtol=1e-5, atol=1e-3)
        assert backend == "reference" or torch.equal(found[:, at : at + matrix.rows], alone)


@every_product
def test_what_does_not_fit_is_refused(backend: str, product: Product) -> None:
    packed, x = product.tiles.pack(a_matrix(20, 100, 4, 32)), gaussian(2, 100)

    def run(x: Tensor, packed: Tensor, order: Any = None, bias: Any = None) -> None:
        product.multiply(x, packed, order, bias, 20, 4, 32)

    with pytest.raises(ValueError, match="packed weights"):
        run(x, packed[:-1])
    with pytest.raises(ValueError, match="packed weights"):
        run(x[:, :-40], packed)
    with pytest.raises(ValueError, match="64 divides"):
        run(x, torch.cat([packed, packed])[1 : 1 + len(packed)])
    with pytest.raises(ValueError, match="order must be"):
        run(x, packed, order=torch.arange(100))
    with pytest.raises(ValueError, match="bias must be"):
        run(x, packed, bias=gaussian(21))
    with pytest.raises(ValueError, match="float32"):
        run(x.double(), packed)
    with pytest.raises(ValueError, match="2-bit"):
        product.tiles.pack(random_matrix(4, 100, 32, "free", 4, 0, True, bits=3))
