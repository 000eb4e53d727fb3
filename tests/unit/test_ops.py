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


def site(
    rows: tuple[int, ...], columns: int, outliers: int, group: int, kind: Any = "free", seed: int = 0
) -> tuple[list[CodebookMatrix], tiles.Geometry]:
    matrices = [random_matrix(r, columns, group, kind, outliers, seed + i, True) for i, r in enumerate(rows)]
    return matrices, tiles.geometry_of(matrices)


def call(x: Tensor, packed: Tensor, order: Tensor | None, bias: Tensor | None, g: tiles.Geometry) -> Tensor:
    order32 = None if order is None else order.to(torch.int32)
    return ops.site_linear(x, packed, order32, bias, g.rows, g.outliers, g.group, 1.0)


SITES = [
    # rows of the linears, columns, outliers, group
    ((64,), 256, 32, 128),
    ((33, 5, 1), 300, 17, 64),
    ((1,), 40, 3, 24),
    ((40, 40), 264, 8, 256),
    ((100,), 1000, 100, 128),
    ((7,), 9, 8, 8),
    ((32,), 129, 1, 128),
]


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_packing_keeps_every_bit(backend: str, shape: Any, kind: Any) -> None:
    matrices, g = site(*shape, kind=kind)
    packed = tiles.pack(matrices)
    assert torch.equal(packed, tiles.pack_reference(matrices))
    row = 0
    for matrix in matrices:
        found = tiles.unpack(packed, g, row, row + matrix.rows, kind)
        expected = matrix.tensors()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        row += matrix.rows
    weights = ops.dequantize(packed, g.rows, g.columns, g.outliers, g.group)
    assert torch.equal(weights, torch.cat([matrix.dequantize_site_order() for matrix in matrices]))


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("tokens", [1, 3, 14])
def test_linear_is_the_readable_twin(backend: str, shape: Any, tokens: int) -> None:
    matrices, g = site(*shape)
    order = matrices[0].permutation
    matrices = [CodebookMatrix(**{**vars(m), "permutation": order}) for m in matrices]
    x, bias = gaussian(tokens, g.columns, seed=1) * 3, gaussian(g.rows, seed=2)
    recipe = ActivationRecipe(balance="none")
    expected = torch.cat([quantized_linear(x, matrix, recipe) for matrix in matrices], dim=1) + bias
    found = call(x, tiles.pack(matrices), order, bias, g)
    assert found.shape == (tokens, g.rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@needs_native
@given(
    rows=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    groups=st.integers(1, 4),
    group=st.sampled_from([8, 16, 24, 64, 128]),
    ragged=st.integers(0, 7),
    outliers=st.sampled_from([0, 0, 1, 3, 16, 33]),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 12, 17, 97, 110]),
    kind=st.sampled_from(["free", "uniform"]),
    spread=st.sampled_from(["normal", "positive", "negative", "huge", "tiny", "equal", "mixed"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@examples(60)
def test_all_variants_agree_to_the_last_bit(
    rows: list[int],
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
    matrices, g = site(tuple(rows), normal + outliers, outliers, group, kind, seed)
    x = gaussian(tokens, g.columns, seed=seed)
    scaled = {
        "normal": x,
        "positive": x.abs() + 5,
        "negative": -x.abs() * 0.01 - 3,
        "huge": x * 1e30,
        "tiny": x * 1e-30,
        "equal": torch.full_like(x, 2.5),
        "mixed": x * torch.logspace(-6, 6, tokens).unsqueeze(1),
    }[spread]
    packed = tiles.pack(matrices)
    results = {}
    before = torch.get_num_threads()
    try:
        for name in VARIANTS:
            module.choose(name)
            torch.set_num_threads(threads if name != "scalar" else 1)
            results[name] = call(scaled, packed, matrices[0].permutation, None, g)
            alone = call(scaled[-1:], packed, matrices[0].permutation, None, g)
            assert torch.equal(alone[0], results[name][-1]), "a token's result depends on its neighbours"
    finally:
        torch.set_num_threads(before)
        restore()
    for name, found in results.items():
        assert torch.equal(found, results["scalar"]), name


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_inputs(backend: str, name: str) -> None:
    matrices, g = site((40,), 150, 6, 64)
    x = EXTREMES[name](gaussian(4, g.columns, seed=8))
    recipe = ActivationRecipe(balance="none")
    matrix = CodebookMatrix(**{**vars(matrices[0]), "permutation": None})
    expected = quantized_linear(x, matrix, recipe)
    found = call(x, tiles.pack([matrix]), None, None, g).double()
    size = float(x.double().abs().max() * g.columns * matrix.dequantize().abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", [0, 149])
def test_what_is_not_finite_stays_visible(backend: str, value: float, channel: int) -> None:
    matrices, g = site((40,), 150, 6, 64)
    x = gaussian(3, g.columns, seed=3)
    x[1, channel] = value
    found = call(x, tiles.pack(matrices), None, None, g)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


def test_the_ops_pass_opcheck(backend: str) -> None:
    matrices, _ = site((20, 12), 100, 4, 32)
    packed, order = tiles.pack(matrices), matrices[0].permutation
    assert order is not None
    for tokens in (1, 5):
        arguments = (gaussian(tokens, 100), packed, order.to(torch.int32), gaussian(32), 32, 4, 32, 1.0)
        torch.library.opcheck(ops.site_linear, arguments)
    torch.library.opcheck(ops.dequantize, (packed, 32, 100, 4, 32))


def test_compile_and_export(backend: str) -> None:
    matrices, _ = site((20, 12), 100, 4, 32)
    packed = tiles.pack(matrices)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = ops.site_linear(torch.tanh(x), packed, None, None, 32, 4, 32, 0.9)
            return y.relu()

    x = gaussian(2, 3, 100)
    expected = Layer()(x)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), expected)


def test_what_does_not_fit_is_refused(backend: str) -> None:
    matrices, _ = site((20,), 100, 4, 32)
    packed, x = tiles.pack(matrices), gaussian(2, 100)
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
        tiles.pack([three])


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
