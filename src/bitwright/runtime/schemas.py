"""The ops of `torch.ops.bitwright`: the schema and the fake kernel of each, all in this one place.

A fake kernel says which tensors an op returns without computing them, which is what torch.compile and torch.export
need. What computes them stands beside: for every op a native kernel on the CPU, and a reference kernel in torch on the
same bytes, for machines without a compiler and as a second opinion in the tests.

| module           | ops                                                        |
|------------------|------------------------------------------------------------|
| `ops`            | `site_linear`, `dequantize`, `dense_linear`, `head_linear` |
| `plane_ops`      | `site_planes`                                              |
| `activation_ops` | `quantize_site`                                            |
| `attention_ops`  | `kv_append`, `kv_attention`, `attention_step`              |
| `hadamard_ops`   | `hadamard`, `site_hadamard`                                |
| `block_ops`      | `rms_norm`, `add_rms_norm`, `rope`, `gated`                |
| `solver_ops`     | `find_levels`, `solve_rows`                                |

The kernels check what they are given and raise ValueError; the native code gets addresses and sizes and knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitwright.codebook import Kind, group_count, matrix_shapes

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("bitwright", "DEF")
NAMES: list[str] = []


def _op(schema: str) -> Callable[[_Function], _Function]:
    """Define an op; what is decorated is its fake kernel."""

    def define(fake: _Function) -> _Function:
        name = _library.define(schema)
        torch.library.register_fake(f"bitwright::{name}", fake, lib=_library)
        NAMES.append(name)
        return fake

    return define


def kernel(name: str) -> Callable[[_Function], _Function]:
    """Register the decorated function as what computes the op `name` on the CPU."""

    def register(function: _Function) -> _Function:
        _library.impl(name, function, "CPU")
        return function

    return register


def require_float32(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32; found {tensor.dtype}")


# --- the quantized linear ---------------------------------------------------------------------------------------------


@_op(
    "site_linear(Tensor x, Tensor packed, Tensor? order, Tensor? bias, int rows, int outliers, int group, float clip,"
    " bool symmetric=False) -> Tensor"
)
@_op(
    "site_planes(Tensor x, Tensor packed, Tensor? order, Tensor? bias, int rows, int outliers, int group, float clip,"
    " str balance) -> Tensor"
)
def _rows_of_site(x: Tensor, packed: Tensor, order: Tensor | None, bias: Tensor | None, rows: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@_op(
    "quantize_site(Tensor x, Tensor? order, int outliers, int group, float clip, bool symmetric=False)"
    " -> (Tensor codes, Tensor step, Tensor rest, Tensor outlier_codes, Tensor outlier_step)"
)
def _quantize_site(
    x: Tensor, order: Tensor | None, outliers: int, group: int, clip: float, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *batch, columns = x.shape
    groups = group_count(columns - outliers, group)
    return (
        x.new_empty((*batch, columns - outliers), dtype=torch.int8),
        x.new_empty((*batch, groups)),
        x.new_empty((*batch, groups)),
        x.new_empty((*batch, outliers), dtype=torch.int8),
        x.new_empty(batch),
    )


@_op("dequantize(Tensor packed, int rows, int columns, int outliers, int group) -> Tensor")
def _dequantize(packed: Tensor, rows: int, columns: int, outliers: int, group: int) -> Tensor:
    return packed.new_empty((rows, columns), dtype=torch.float32)


# --- the rest of a decoder block --------------------------------------------------------------------------------------


@_op("head_linear(Tensor x, Tensor codes, Tensor scales, int group) -> Tensor")
@_op("dense_linear(Tensor x, Tensor weight) -> Tensor")
def _dense_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_op("kv_append(Tensor(a!) records, Tensor states, SymInt position, int bits, float clip=1.0) -> ()")
def _nothing(*_: Any) -> None:
    return None


@_op(
    "kv_attention(Tensor queries, Tensor keys, Tensor values, SymInt length, float scale, int window, int bits)"
    " -> Tensor"
)
def _kv_attention(
    queries: Tensor, keys: Tensor, values: Tensor, length: int, scale: float, window: int, bits: int
) -> Tensor:
    heads, tokens, head_dim = queries.shape
    return queries.new_empty((tokens, heads, head_dim))


@_op(
    "attention_step(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, SymInt position,"
    " int query_heads, int key, int value, float scale, int window, int bits, float clip=1.0) -> Tensor"
)
def _attention_step(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, query_heads: int, *_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], query_heads, cos.shape[-1]))


@_op("gated(Tensor x, int up, int size) -> Tensor")
def _gated(x: Tensor, up: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], size))


@_op("add_rms_norm(Tensor x, Tensor add, Tensor weight, float eps) -> (Tensor total, Tensor normed)")
def _add_rms_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_op("hadamard(Tensor x, int block) -> Tensor")
@_op("site_hadamard(Tensor x, Tensor? order, int size, int stride, int normal) -> Tensor")
@_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
@_op("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def _shaped_as_x(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


# --- the solver -------------------------------------------------------------------------------------------------------


@_op(
    "find_levels(Tensor block, Tensor importance, str search, int bits, int iterations)"
    " -> (Tensor integers, Tensor scale)"
)
def _find_levels(block: Tensor, importance: Tensor, search: str, bits: int, iterations: int) -> tuple[Tensor, Tensor]:
    rows = block.shape[0]
    dtype = torch.int16 if bits == 8 else torch.int8
    return block.new_empty((rows, 2**bits), dtype=dtype), block.new_empty(rows, dtype=torch.float16)


# The stored tensors of a matrix in the order in which `solve_rows` returns them, empty where a matrix has not got them.
SOLVED: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "codes": (torch.uint8, (0,)),
    "scales": (torch.float16, (0,)),
    "levels": (torch.int8, (0,)),
    "zeros": (torch.uint8, (0,)),
    "outliers": (torch.int8, (0,)),
    "outlier_scales": (torch.float16, (0,)),
}


@_op(
    "solve_rows(Tensor weights, Tensor upper, Tensor importance, Tensor dead, int outliers, int group, int bits,"
    " str search, int iterations, str feedback, bool feedback_outliers)"
    " -> (Tensor codes, Tensor scales, Tensor levels, Tensor zeros, Tensor outliers, Tensor outlier_scales)"
)
def _solve_rows(
    weights: Tensor,
    upper: Tensor,
    importance: Tensor,
    dead: Tensor,
    outliers: int,
    group: int,
    bits: int,
    search: str,
    *_: Any,
) -> tuple[Tensor, ...]:
    rows, columns = weights.shape
    kind: Kind = "uniform" if search == "uniform" else "free"
    group = group or (columns - outliers + 7) // 8 * 8  # 0: a whole row
    shapes = SOLVED | matrix_shapes(rows, columns, bits, group, kind, outliers)
    return tuple(weights.new_empty(shapes[name][1], dtype=shapes[name][0]) for name in SOLVED)
