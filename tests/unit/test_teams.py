"""Results where OpenMP gives other teams than were asked for: of every op, and of what else is parallel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.outer import quantize_outer
from bitwright.runtime import planes, schemas, tiles
from bitwright.runtime.kv_cache import encode
from bitwright.solvers import native as solver
from bitwright.solvers.levels import GridLevels

from .backends import needs_native, threads
from .test_site_products import a_matrix
from .twins import correlated, gaussian

THREADS = 4


def calls() -> dict[str, Callable[[], Any]]:
    """Of each op and of each function that is none: a call with work for THREADS threads."""
    ops = torch.ops.bitwright
    matrix = a_matrix(177, 300, 8, 64)
    assert matrix.permutation is not None
    order, x = matrix.permutation.to(torch.int32), gaussian(101, 300)
    head = quantize_outer(gaussian(300, 96), 4, 32)
    packed, counted = tiles.pack(matrix), planes.pack(matrix)
    states, cos, sin = gaussian(4, 700, 96), gaussian(300, 96), gaussian(300, 96, seed=2)
    records = torch.cat([encode(states, 4), torch.zeros(4, 300, 52, dtype=torch.uint8)], dim=1)
    wide, dead = gaussian(400, 1024), torch.arange(160) == 7
    weights, upper = gaussian(400, 160), torch.eye(160) + 0.1 * gaussian(160, 160).triu()
    square = (lambda x: x.T @ x)(correlated(160, 3))
    grid = GridLevels(
        torch.tensor([[-90, -20, 30, 127]], dtype=torch.int8).repeat(400, 1), torch.full((400,), 0.02).half()
    )

    def appended() -> Tensor:
        ops.kv_append(buffer := records.clone(), gaussian(4, 300, 96, seed=3), 700, 4)
        return buffer

    def stepped() -> tuple[Tensor, ...]:
        keys, values = records.clone(), records.clone()
        y = ops.attention_step(gaussian(300, 1536), cos, sin, keys, values, 700, 8, 768, 1152, 0.1, 0, 4)
        return y, keys, values

    return {
        "site_linear": lambda: ops.site_linear(x, packed, order, gaussian(177), 177, 8, 64, 1.0),
        "site_planes": lambda: ops.site_planes(x, counted, order, None, 177, 8, 64, 1.0, "support"),
        "quantize_site": lambda: ops.quantize_site(x, order, 8, 64, 1.0),
        "dequantize": lambda: ops.dequantize(packed, 177, 300, 8, 64),
        "dense_linear": lambda: ops.dense_linear(x, gaussian(177, 300).bfloat16()),
        "head_linear": lambda: ops.head_linear(gaussian(9, 96), head.codes, head.scales, 32),
        "kv_append": appended,
        "kv_attention": lambda: ops.kv_attention(gaussian(8, 300, 96), records, records, 1000, 0.1, 0, 4),
        "kv_attention of one": lambda: ops.kv_attention(gaussian(8, 1, 96), records, records, 1000, 0.1, 0, 4),
        "attention_step": stepped,
        "hadamard": lambda: ops.hadamard(wide, 64),
        "hadamard of 12": lambda: ops.hadamard(gaussian(900, 384), 384),
        "site_hadamard": lambda: ops.site_hadamard(wide, None, 256, 1, 1024),
        "rms_norm": lambda: ops.rms_norm(wide, gaussian(1024), 1e-6),
        "add_rms_norm": lambda: ops.add_rms_norm(wide, wide.flip(0), gaussian(1024), 1e-6),
        "gated": lambda: ops.gated(wide, 512, 500),
        "rope": lambda: ops.rope(gaussian(300, 12, 96), cos, sin),
        "find_levels": lambda: ops.find_levels(weights, torch.ones(160), "em", 2, 20),
        "solve_rows": lambda: ops.solve_rows(weights, upper, torch.ones(160), dead, 8, 64, 2, "em", 20, "column", True),
        "upper_factor": lambda: solver.upper_factor(square, 1.0),
        "refine_block": lambda: _refined(weights, square, grid),
        "pack": lambda: (tiles.pack(matrix), planes.pack(matrix)),
    }


def _refined(weights: Tensor, square: Tensor, grid: GridLevels) -> list[Tensor]:
    refined, ranks = solver.refine_block(weights, square, grid, torch.full(weights.shape, 1))
    return [refined.integers, refined.scale, ranks]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def differing() -> list[str]:
    """The calls that THREADS threads answer otherwise than one."""
    made = calls()
    # The team first: what is never written would hold one thread's results already, from the call before.
    with threads(THREADS):
        assert torch.get_num_threads() == THREADS
        found = {name: call() for name, call in made.items()}
    with threads(1):
        return [name for name, call in made.items() if not same(found[name], call())]


def test_every_op_is_called() -> None:
    assert set(schemas.NAMES) <= calls().keys()


@needs_native
@pytest.mark.parametrize(
    "limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}], ids=str
)
def test_a_smaller_team_computes_the_same(limit: dict[str, str]) -> None:
    code = "from unit import test_teams; print(test_teams.differing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | limit,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
