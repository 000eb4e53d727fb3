"""The small rest of a block: norm, rotary embedding, gated activation; every variant against transformers and torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from bitwright.runtime import block_ops

from .backends import needs_native, threads
from .twins import gaussian


@pytest.mark.parametrize("shape", [(1, 4096), (3, 7), (2, 5, 100), (40, 2048), (0, 8)])
@pytest.mark.parametrize("factor", [1.0, 1e4, 1e-4, 0.0])
def test_rms_norm_is_that_of_llama(backend: str, shape: tuple[int, ...], factor: float) -> None:
    x, norm = gaussian(*shape) * factor, LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight.data = gaussian(shape[-1], seed=1)
    with torch.no_grad():
        expected = norm(x)
    found = block_ops.rms_norm(x, norm.weight.detach(), 1e-5)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 32, 128), (5, 3, 80), (40, 32, 64), (2, 1, 2), (0, 2, 4)])
def test_rope_is_that_of_llama(backend: str, shape: tuple[int, int, int]) -> None:
    tokens, heads, head_dim = shape
    wide = gaussian(tokens, heads + 2, head_dim)
    x = wide[:, 1 : 1 + heads]  # as out of a fused projection
    angles = torch.arange(tokens).unsqueeze(1) * torch.linspace(1, 0.01, head_dim // 2)
    angles = torch.cat([angles, angles], dim=-1)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin(), unsqueeze_dim=1)
    assert torch.equal(block_ops.rope(x, angles.cos(), angles.sin()), expected)


@needs_native
def test_rows_do_not_depend_on_threads_or_neighbours() -> None:
    x, y = gaussian(50, 4096), gaussian(50, 4096, seed=1)
    calls: list[Callable[[int], Tensor]] = [
        lambda rows: block_ops.rms_norm(x[-rows:], y[0], 1e-6),
        lambda rows: block_ops.add_rms_norm(x[-rows:], y[-rows:], y[0], 1e-6)[1],
        lambda rows: block_ops.gated(x[-rows:], 2048, 2048),
        lambda rows: block_ops.rope(x[-rows:].unflatten(1, (-1, 64)), y[-rows:, :64], y[-rows:, 64:128]).flatten(1),
    ]
    for call in calls:
        with threads(1):
            expected = call(50)
        assert torch.equal(call(1)[0], expected[-1])
        for count in (2, 3):
            with threads(count):
                assert torch.equal(call(50), expected)


def test_small_ops_refuse_what_does_not_fit(backend: str) -> None:
    x = gaussian(2, 3, 8)
    with pytest.raises(ValueError, match="weight must be"):
        block_ops.rms_norm(x, gaussian(7), 1e-6)
    with pytest.raises(ValueError, match="x must be float32"):
        block_ops.rms_norm(x.double(), gaussian(8), 1e-6)
    with pytest.raises(ValueError, match="add must be"):
        block_ops.add_rms_norm(x, x[:1], gaussian(8), 1e-6)
    with pytest.raises(ValueError, match="even head_dim"):
        block_ops.rope(x[..., :7], x[:, 0, :7], x[:, 0, :7])
    with pytest.raises(ValueError, match="cos and sin must be"):
        block_ops.rope(x, x[:, 0, :4], x[:, 0])


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 100), (2, 1), (0, 7), (1, 4096)])
def test_residual_and_norm_are_sum_and_norm(backend: str, shape: tuple[int, ...]) -> None:
    x, add, weight = gaussian(*shape), gaussian(*shape, seed=1), gaussian(shape[-1], seed=2)
    total, normed = block_ops.add_rms_norm(x, add, weight, 1e-5)
    assert torch.equal(total, x + add)
    assert torch.equal(normed, block_ops.rms_norm(x + add, weight, 1e-5))


@pytest.mark.parametrize(("size", "up", "columns"), [(8, 8, 16), (11, 20, 40), (1, 1, 2), (5000, 5024, 10050)])
@pytest.mark.parametrize("factor", [1.0, 30.0, 1e4, 1e-4])
def test_gated_is_silu_times_up(backend: str, size: int, up: int, columns: int, factor: float) -> None:
    x = gaussian(3, columns)
    x[:, :size] *= factor
    expected = torch.nn.functional.silu(x[:, :size].double()) * x[:, up : up + size].double()
    torch.testing.assert_close(block_ops.gated(x, up, size).double(), expected, rtol=1e-6, atol=1e-30)


def test_gated_hands_nan_on_and_no_other(backend: str) -> None:
    x = gaussian(1, 40)
    x[0, 3] = float("nan")
    found = block_ops.gated(x, 20, 19)
    assert found.isnan().nonzero().tolist() == [[0, 3]]
    with pytest.raises(ValueError, match="no gate in its first 20 columns"):
        block_ops.gated(x, 21, 20)
