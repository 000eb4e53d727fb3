"""What holds for every op of `torch.ops.bitwright` on every backend: opcheck, torch.compile, torch.export.

What an op computes is tested where the op is. An op without a line in the table here fails the first test.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.outer import quantize_outer
from bitwright.runtime import planes, schemas, tiles
from bitwright.runtime.kv_cache import encode

from .test_site_products import a_matrix
from .twins import gaussian


def arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Of each op: calls that differ in what a fake kernel or a schema could get wrong."""
    matrix = a_matrix(32, 100, 4, 32)
    assert matrix.permutation is not None
    order, bias, x = matrix.permutation.to(torch.int32), gaussian(32), gaussian(2, 3, 100)
    packed, counted = tiles.pack(matrix), planes.pack(matrix)
    records = torch.cat([encode(gaussian(2, 6, 9), 4), torch.zeros(2, 2, 9, dtype=torch.uint8)], dim=1)
    wide = torch.cat([encode(gaussian(1, 6, 8), 4), torch.zeros(1, 2, 8, dtype=torch.uint8)], dim=1)
    upper, dead = torch.eye(40) + 0.1 * gaussian(40, 40).triu(), torch.arange(40) == 7
    return {
        "site_linear": [(x, packed, order, bias, 32, 4, 32, 1.0), (x[0, :1], packed, None, None, 32, 4, 32, 0.9, True)],
        "site_planes": [
            (x, counted, order, bias, 32, 4, 32, 1.0, "support"),
            (x[0, :1], counted, None, None, 32, 4, 32, 0.9, "none"),
        ],
        "quantize_site": [(x, order, 4, 32, 1.0), (x[0].T.contiguous().T, None, 0, 32, 0.9, True)],
        "dequantize": [(packed, 32, 100, 4, 32)],
        "dense_linear": [(x, gaussian(7, 100).bfloat16())],
        "head_linear": [
            (x, head.codes, head.scales, 32) for head in (quantize_outer(gaussian(7, 100), bits, 32) for bits in (8, 4))
        ],
        "kv_append": [(records, gaussian(2, 2, 9), 6, 4), (records, gaussian(1, 2, 9).transpose(0, 1), 3, 4)],
        "kv_attention": [
            (gaussian(4, 1, 9), records, records, 6, 0.3, 4, 4),
            (gaussian(3, 4, 9).transpose(0, 1), records, records, 6, 0.3, 0, 4),
        ],
        "attention_step": [
            (gaussian(2, 40), gaussian(2, 8), gaussian(2, 8), wide, wide.clone(), 6, 3, 24, 32, 0.3, 4, 4),
            (gaussian(1, 40), gaussian(1, 8), gaussian(1, 8), wide, wide.clone(), 0, 2, 16, 32, 0.3, 0, 4),
        ],
        "hadamard": [(gaussian(2, 3, 64), 16), (gaussian(64, 3).T, 64)],
        "site_hadamard": [(x, order, 32, 1, 96), (x[0, :1], None, 12, 3, 80)],
        "rms_norm": [(gaussian(2, 9), gaussian(9), 1e-6)],
        "add_rms_norm": [(gaussian(2, 9), gaussian(2, 9, seed=5), gaussian(9), 1e-6)],
        "gated": [(gaussian(2, 3, 20), 11, 9)],
        "rope": [(gaussian(2, 3, 8), gaussian(2, 8), gaussian(2, 8))],
        "find_levels": [(gaussian(5, 40), gaussian(40).abs(), search, 2, 20) for search in ("dp", "uniform")],
        "solve_rows": [
            (gaussian(5, 40), upper, torch.ones(40), dead, 4, 16, 2, "em", 20, "column", True),
            (gaussian(5, 40), upper, torch.ones(40), dead, 0, 16, 3, "uniform", 20, "block-diag", False),
        ],
    }


def op_of(name: str) -> Any:
    return getattr(torch.ops.bitwright, name).default


class Call(nn.Module):
    """One call of an op: its tensors are inputs, its numbers are constants."""

    def __init__(self, name: str, call: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.call = op_of(name), call

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(copy.deepcopy(a) for a in self.call if isinstance(a, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        return self.op(*(next(left) if isinstance(a, Tensor) else a for a in self.call))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    return ours is theirs is None or all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_op_is_in_the_table_and_has_its_schema_in_one_place() -> None:
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitwright::")}
    assert defined == {f"bitwright::{name}" for name in schemas.NAMES}
    assert arguments().keys() == set(schemas.NAMES)
    kernels = {name: torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in defined}
    assert all(kernels.values()), kernels
    assert all(f"`{name}`" in (inspect.getdoc(schemas) or "") for name in schemas.NAMES)


@pytest.mark.parametrize("name", schemas.NAMES)
def test_opcheck(backend: str, name: str) -> None:
    for call in arguments()[name]:
        torch.library.opcheck(op_of(name), call)


@pytest.mark.parametrize("name", schemas.NAMES)
def test_compile_and_export(backend: str, name: str) -> None:
    for call in arguments()[name]:
        torch.compiler.reset()
        module = Call(name, call)
        inputs = [module.tensors for _ in range(3)]  # an op may change them
        expected = module(*inputs[0])
        assert same(torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs[1]), expected)
        assert same(torch.export.export(module, module.tensors).module()(*inputs[2]), expected)
        assert same(inputs[0], inputs[1])
        assert same(inputs[0], inputs[2])
