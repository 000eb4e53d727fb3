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
from bitwright.runtime import ops, plane_ops, planes, tiles

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
        for op, compute, allowed in _cases():
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


def _cases() -> list[tuple[str, Callable[[], Tensor], float]]:
    """(op, a computation, how far it may be from the scalar twin): odd sizes, one token and many, a clamped zero."""
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
