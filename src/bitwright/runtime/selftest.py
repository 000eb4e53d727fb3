"""Every kernel of this build, on this processor, against its scalar twin: what `bitwright doctor` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.native import find
from bitwright.outer import quantize_outer
from bitwright.packing import pack_planes
from bitwright.runtime import (
    activation_ops,
    attention_ops,
    block_ops,
    hadamard_ops,
    ops,
    plane_ops,
    planes,
    solver_ops,
    tiles,
)
from bitwright.runtime.kv_cache import encode
from bitwright.solvers.hessian import upper_factor_reference

SCALAR = "scalar"


@dataclass(frozen=True)
class Check:
    """One kernel of one variant. `difference` is the largest from the scalar twin, relative to the largest output."""

    op: str
    variant: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


def variants() -> list[tuple[str, bool]]:
    """(name, whether this processor runs it) of all variants in this build, best first; empty without kernels."""
    module: Any = find()
    return list(module.variants()) if module is not None else []


def self_test() -> list[Check]:
    """Run each op on each variant that runs here. The chosen variant is as before afterwards."""
    module: Any = find()
    if module is None:
        return []
    chosen = module.chosen()
    found = []
    try:
        for op, compute, allowed in [*_products(), *_inputs(), *_attention(), *_solver()]:
            module.choose(SCALAR)
            expected = compute()
            for variant, runs in variants():
                if runs and variant != SCALAR:
                    module.choose(variant)
                    error = float((compute() - expected).abs().max() / expected.abs().max())
                    found.append(Check(op, variant, error, allowed))
    finally:
        module.choose(chosen)
    return found


# An op, a computation, and how far it may be from the scalar twin.
_Case = tuple[str, Callable[[], Tensor], float]


def _products() -> list[_Case]:
    """Odd sizes, one token and many, a clamped zero point."""
    matrix = _matrix(rows=77, columns=300, outliers=13, group=64)
    packed, counted = tiles.pack(matrix), planes.pack(matrix)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(101, 300, generator=generator)
    x[3] += 50.0
    order = torch.randperm(300, generator=generator).to(torch.int32)
    weight = torch.randn(50, 300, generator=generator).to(torch.bfloat16)

    heads = {bits: quantize_outer(torch.randn(50, 300, generator=generator), bits, 64) for bits in (8, 4)}

    def head(bits: int, tokens: int) -> Tensor:
        y: Tensor = ops.head_linear(x[:tokens], heads[bits].codes, heads[bits].scales, 64)
        return y

    def linear(tokens: int) -> Tensor:
        y: Tensor = ops.site_linear(x[:tokens], packed, order, None, matrix.rows, 13, 64, 1.0)
        return y

    def boolean(tokens: int) -> Tensor:
        y: Tensor = plane_ops.site_planes(x[:tokens], counted, order, None, matrix.rows, 13, 64, 1.0, "support")
        return y

    return [
        ("site_linear, 1 token", lambda: linear(1), 0.0),
        ("site_linear, 5 tokens", lambda: linear(5), 0.0),
        ("site_linear, 101 tokens", lambda: linear(101), 0.0),
        ("site_planes, 1 token", lambda: boolean(1), 0.0),
        ("site_planes, 101 tokens", lambda: boolean(101), 0.0),
        ("head_linear, 8 bits", lambda: head(8, 1), 0.0),
        ("head_linear, 4 bits", lambda: head(4, 7), 0.0),
        ("dense_linear", lambda: ops.dense_linear(x[:2], weight), 1e-5),
    ]


def _inputs() -> list[_Case]:
    """What happens to states between the products."""
    generator = torch.Generator().manual_seed(2)
    x, scale = torch.randn(5, 448, generator=generator) * 3, torch.rand(448, generator=generator)
    order = torch.randperm(448, generator=generator).to(torch.int32)
    angles = torch.rand(5, 64, generator=generator) * 6
    heads = x.unflatten(1, (7, 64))

    def quantized() -> Tensor:
        parts = activation_ops.quantize_site(x, order, 13, 64, 0.95)
        return torch.cat([part.float().flatten() for part in parts])

    return [
        ("quantize_site", quantized, 0.0),
        ("hadamard, 448", lambda: hadamard_ops.hadamard(x, 448), 0.0),
        ("hadamard, 64", lambda: hadamard_ops.hadamard(x, 64), 0.0),
        ("rms_norm", lambda: block_ops.rms_norm(x, scale, 1e-6), 1e-6),
        ("add_rms_norm", lambda: torch.stack(block_ops.add_rms_norm(x, x.flip(0), scale, 1e-6)), 1e-6),
        ("rope", lambda: block_ops.rope(heads, angles.cos(), angles.sin()), 1e-6),
        ("gated", lambda: block_ops.gated(x, 224, 224), 1e-6),
    ]


def _attention() -> list[_Case]:
    generator = torch.Generator().manual_seed(3)
    states, queries = torch.randn(2, 70, 72, generator=generator), torch.randn(6, 3, 72, generator=generator)
    records = encode(states, 4)

    def appended() -> Tensor:
        empty = torch.zeros_like(records)
        attention_ops.kv_append(empty, states, 0, 4)
        return empty.float()

    def attended() -> Tensor:
        y: Tensor = attention_ops.kv_attention(queries, records, records, 70, 0.2, 40, 4)
        return y

    def step() -> Tensor:
        keys, values = records.clone(), records.clone()
        x, angles = queries.transpose(0, 1).reshape(3, -1), states[0, :3]
        y: Tensor = attention_ops.attention_step(
            x, angles.cos(), angles.sin(), keys, values, 60, 2, 144, 288, 0.2, 40, 4
        )
        return torch.cat([y.flatten(), keys.float().flatten(), values.float().flatten()])

    return [("kv_append", appended, 0.0), ("kv_attention", attended, 1e-4), ("attention_step", step, 1e-4)]


def _solver() -> list[_Case]:
    generator = torch.Generator().manual_seed(4)
    weights, inputs = torch.randn(9, 150, generator=generator), torch.randn(300, 150, generator=generator)
    hessian = inputs.T @ inputs / 300 + 0.1 * torch.eye(150)
    importance = torch.rand(150, generator=generator) + 0.5
    factor = upper_factor_reference(hessian, 0.0, torch.float64)
    assert factor is not None

    def levels(search: str) -> Tensor:
        integers, scale = solver_ops.find_levels(weights, importance, search, 2, 20)
        return torch.cat([integers.float().flatten(), scale.float()])

    def loss() -> Tensor:
        """Of the solved rows: a weight on the middle of two levels may get either, which the loss hardly notices."""
        dead = torch.zeros(150, dtype=torch.bool)
        solved = solver_ops.solve_rows(weights, factor, importance, dead, 13, 64, 2, "dp", 20, "column", True)
        codes, scales, by_code, _, outliers, outlier_scales = solved
        matrix = CodebookMatrix(
            rows=9,
            columns=150,
            bits=2,
            group=64,
            kind="free",
            planes=codes,
            scales=scales,
            levels=by_code,
            outliers=outliers,
            outlier_scales=outlier_scales,
        )
        error = weights - matrix.dequantize_site_order()
        return ((error @ hessian) * error).sum()

    return [
        ("find_levels, em", lambda: levels("em"), 0.0),
        ("find_levels, dp", lambda: levels("dp"), 0.0),
        ("solve_rows, its loss", loss, 0.01),
    ]


def _matrix(rows: int, columns: int, outliers: int, group: int) -> CodebookMatrix:
    generator = torch.Generator().manual_seed(0)
    normal = columns - outliers
    groups = -(-normal // group)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    return CodebookMatrix(
        rows=rows,
        columns=columns,
        bits=2,
        group=group,
        kind="free",
        planes=pack_planes(integers(0, 4, rows, normal).to(torch.uint8), 2),
        scales=(torch.rand(rows, groups, generator=generator) + 0.01).half(),
        levels=integers(-127, 128, rows, groups, 4).to(torch.int8),
        outliers=integers(-127, 128, rows, outliers).to(torch.int8),
        outlier_scales=(torch.rand(rows, generator=generator) + 0.01).half(),
    )
