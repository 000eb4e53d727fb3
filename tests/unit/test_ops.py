"""The ops of the quantized linear: every variant of this build against the others, the format and the readable twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.errors import BitwrightError
from bitwright.recipe import ActivationRecipe
from bitwright.reference import quantized_linear
from bitwright.runtime import native, ops, tiles

from .test_reference import EXTREMES
from .twins import examples, gaussian, random_matrix

module: Any = native.find()
VARIANTS = [name for name, runs in module.variants() if runs] if module else []
needs_native = pytest.mark.skipif(module is None, reason="built without native kernels")


@pytest.fixture(params=[*VARIANTS, native.REFERENCE])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use(request.param, monkeypatch)
    yield request.param
    restore()


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, name)
    native.native.cache_clear()


def restore() -> None:
    native.native.cache_clear()
    if module is not None:
        module.choose(VARIANTS[0])


def a_matrix(rows: int, columns: int, outliers: int, group: int, kind: Any = "free", seed: int = 0) -> CodebookMatrix:
    return random_matrix(rows, columns, group, kind, outliers, seed, True)


def call(x: Tensor, matrix: CodebookMatrix, bias: Tensor | None = None) -> Tensor:
    g, packed = tiles.geometry_of(matrix), tiles.pack(matrix)
    order32 = None if matrix.permutation is None else matrix.permutation.to(torch.int32)
    return ops.site_linear(x, packed, order32, bias, g.rows, g.outliers, g.group, 1.0)


SITES = [
    # rows, columns, outliers, group
    (64, 256, 32, 128),
    (39, 300, 17, 64),
    (1, 40, 3, 24),
    (80, 264, 8, 256),
    (100, 1000, 100, 128),
    (7, 9, 8, 8),
    (32, 129, 1, 128),
    (33, 64, 0, 16),
]


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("kind", ["free", "uniform", "shared"])
def test_packing_keeps_every_bit(backend: str, shape: Any, kind: Any) -> None:
    matrix = a_matrix(*shape, kind=kind)
    g, packed = tiles.geometry_of(matrix), tiles.pack(matrix)
    assert torch.equal(packed, tiles.pack_reference(matrix, g, torch.zeros_like(packed)))
    found, expected = tiles.unpack(packed, g, kind), matrix.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    weights = ops.dequantize(packed, g.rows, g.columns, g.outliers, g.group)
    assert torch.equal(weights, matrix.dequantize_site_order())


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("tokens", [1, 3, 14])
def test_linear_is_the_readable_twin(backend: str, shape: Any, tokens: int) -> None:
    matrix = a_matrix(*shape)
    x, bias = gaussian(tokens, matrix.columns, seed=1) * 3, gaussian(matrix.rows, seed=2)
    expected = quantized_linear(x, matrix, ActivationRecipe(balance="none"), bias)
    found = call(x, matrix, bias)
    assert found.shape == (tokens, matrix.rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_linears_of_a_site_in_one_call(backend: str) -> None:
    """Packed one behind the other, each from a tile of its own on: the same numbers as one by one."""
    first = a_matrix(33, 100, 4, 32, seed=1)
    matrices = [first, *(a_matrix(rows, 100, 4, 32, seed=rows) for rows in (8, 64))]
    matrices = [CodebookMatrix(**{**vars(m), "permutation": first.permutation}) for m in matrices]
    packed = torch.cat([tiles.pack(matrix) for matrix in matrices])
    x = gaussian(3, 100, seed=5)
    assert first.permutation is not None
    found = ops.site_linear(x, packed, first.permutation.to(torch.int32), None, 64 + 32 + 64, 4, 32, 1.0)
    for matrix, at in zip(matrices, (0, 64, 96), strict=True):
        alone = call(x, matrix)
        assert torch.allclose(found[:, at : at + matrix.rows], alone, rtol=1e-5, atol=1e-3)
        assert backend == native.REFERENCE or torch.equal(found[:, at : at + matrix.rows], alone)


@needs_native
@given(
    rows=st.integers(1, 140),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 24, 64, 128]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 0, 1, 3, 16, 33]),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 12, 17, 97, 110]),
    kind=st.sampled_from(["free", "uniform", "shared"]),
    spread=st.sampled_from(["normal", "positive", "negative", "huge", "tiny", "equal", "mixed"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_all_variants_agree_to_the_last_bit(
    rows: int,
    groups: int,
    group: int,
    ragged: int,
    outliers: int,
    tokens: int,
    kind: Any,
    spread: str,
    threads: int,
    seed: int,
) -> None:
    normal = max(1, groups * group - ragged)
    matrix = a_matrix(rows, normal + outliers, outliers, group, kind, seed)
    x = gaussian(tokens, matrix.columns, seed=seed)
    scaled = {
        "normal": x,
        "positive": x.abs() + 5,
        "negative": -x.abs() * 0.01 - 3,
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "equal": torch.full_like(x, 2.5),
        "mixed": x * torch.logspace(-6, 6, tokens).unsqueeze(1),
    }[spread]
    results = {}
    before = torch.get_num_threads()
    try:
        for name in VARIANTS:
            module.choose(name)
            torch.set_num_threads(threads if name != "scalar" else 1)
            results[name] = call(scaled, matrix)
            alone = call(scaled[-1:], matrix)
            assert torch.equal(alone[0], results[name][-1]), "a token's result depends on its neighbours"
    finally:
        torch.set_num_threads(before)
        restore()
    for name, found in results.items():
        assert torch.equal(found, results["scalar"]), name


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_inputs(backend: str, name: str) -> None:
    matrix = CodebookMatrix(**{**vars(a_matrix(40, 150, 6, 64)), "permutation": None})
    x = EXTREMES[name](gaussian(4, 150, seed=8))
    recipe = ActivationRecipe(balance="none")
    expected = quantized_linear(x, matrix, recipe)
    found = call(x, matrix).double()
    size = float(x.double().abs().max() * 150 * matrix.dequantize().abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", [0, 149])
def test_what_is_not_finite_stays_visible(backend: str, value: float, channel: int) -> None:
    matrix = CodebookMatrix(**{**vars(a_matrix(40, 150, 6, 64)), "permutation": None})
    x = gaussian(3, 150, seed=3)
    x[1, channel] = value
    found = call(x, matrix)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("columns", [1, 7, 8, 33, 100, 257])
@pytest.mark.parametrize("tokens", [1, 3])
def test_dense_linear_is_a_matrix_product(backend: str, columns: int, tokens: int) -> None:
    x, weight = gaussian(tokens, columns, seed=1), gaussian(37, columns, seed=2).bfloat16()
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(ops.dense_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(ops.dense_linear, (x, weight))
    with pytest.raises(ValueError, match="weight bfloat16"):
        ops.dense_linear(x, weight.float())


def test_the_ops_pass_opcheck(backend: str) -> None:
    matrix = a_matrix(32, 100, 4, 32)
    packed, order = tiles.pack(matrix), matrix.permutation
    assert order is not None
    for tokens in (1, 5):
        arguments = (gaussian(tokens, 100), packed, order.to(torch.int32), gaussian(32), 32, 4, 32, 1.0)
        torch.library.opcheck(ops.site_linear, arguments)
    torch.library.opcheck(ops.dequantize, (packed, 32, 100, 4, 32))


def test_compile_and_export(backend: str) -> None:
    packed = tiles.pack(a_matrix(32, 100, 4, 32))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = ops.site_linear(torch.tanh(x), packed, None, None, 32, 4, 32, 0.9)
            return y.relu()

    x = gaussian(2, 3, 100)
    expected = Layer()(x)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), expected)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    packed, x = tiles.pack(a_matrix(20, 100, 4, 32)), gaussian(2, 100)
    with pytest.raises(ValueError, match="packed weights"):
        ops.site_linear(x, packed[:-1], None, None, 20, 4, 32, 1.0)
    with pytest.raises(ValueError, match="packed weights"):
        ops.site_linear(x[:, :-1], packed, None, None, 60, 4, 32, 1.0)
    with pytest.raises(ValueError, match="64 divides"):
        ops.site_linear(x, torch.cat([packed, packed])[1 : 1 + len(packed)], None, None, 20, 4, 32, 1.0)
    with pytest.raises(ValueError, match="order must be"):
        ops.site_linear(x, packed, torch.arange(100), None, 20, 4, 32, 1.0)
    with pytest.raises(ValueError, match="bias must be"):
        ops.site_linear(x, packed, None, gaussian(21), 20, 4, 32, 1.0)
    with pytest.raises(ValueError, match="float32"):
        ops.site_linear(x.double(), packed, None, None, 20, 4, 32, 1.0)
    three = random_matrix(4, 100, 32, "free", 4, 0, True, bits=3)
    with pytest.raises(ValueError, match="2-bit"):
        tiles.pack(three)


@needs_native
def test_the_variable_names_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        use("scalar", monkeypatch)
        assert native.native().chosen() == "scalar"
        use("vax", monkeypatch)
        with pytest.raises(BitwrightError, match="BITWRIGHT_ISA=vax is no variant of this build; it has"):
            native.native()
        for name, runs in module.variants():
            if not runs:
                use(name, monkeypatch)
                with pytest.raises(BitwrightError, match="cannot run on this processor"):
                    native.native()
    finally:
        restore()


def test_without_the_module_one_warning_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "find", lambda: None)
    native.native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its native kernels.*pip install"):
            assert native.native() is None
        assert native.native() is None  # once
        use("avx2", monkeypatch)
        with pytest.raises(BitwrightError, match="BITWRIGHT_ISA=avx2 was asked for"):
            native.native()
    finally:
        restore()
