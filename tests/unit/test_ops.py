"""The dense head, the dequantizer, and how a backend is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitwright import native
from bitwright.errors import BitwrightError
from bitwright.runtime import ops, tiles

from .backends import module, needs_native, restore, use
from .test_site_products import SITES, a_matrix
from .twins import gaussian


@pytest.mark.parametrize("shape", SITES)
@pytest.mark.parametrize("kind", ["free", "uniform"])
def test_dequantize_is_exact(backend: str, shape: Any, kind: Any) -> None:
    matrix = a_matrix(*shape, kind=kind)
    rows, *sizes = shape
    weights = ops.dequantize(tiles.pack(matrix), rows, *sizes)
    assert torch.equal(weights, matrix.dequantize_site_order())


@pytest.mark.parametrize("columns", [1, 7, 8, 33, 100, 257])
@pytest.mark.parametrize("tokens", [1, 3])
def test_dense_linear_is_a_matrix_product(backend: str, columns: int, tokens: int) -> None:
    x, weight = gaussian(tokens, columns, seed=1), gaussian(37, columns, seed=2).bfloat16()
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(ops.dense_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="weight bfloat16"):
        ops.dense_linear(x, weight.float())


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
