"""Which calls the lean path takes: those that it answers as transformers does, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright import native
from bitwright.integrations.transformers import quantized_cache, recipe_of
from lean import counted, without_lean_path

pytestmark = pytest.mark.skipif(native.find() is None, reason="built without native kernels")

IDS = torch.arange(3, 13).view(1, -1)


@pytest.fixture
def model(artifact: Callable[..., Path]) -> Any:
    return bitwright.load(artifact("llama", "bwa"))


def call(model: Any, **more: Any) -> Any:
    cache = quantized_cache(model, recipe_of(model))
    with torch.inference_mode():
        return model(IDS, past_key_values=cache, use_cache=True, **more)


@pytest.mark.parametrize("odd", [[0] * 9 + [9], [0, *range(2, 9), 1, 9], [*range(1, 11)], [0] * 10])
def test_positions_that_do_not_follow_each_other(model: Any, odd: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = call(model).logits
    with counted(model, monkeypatch) as calls:
        found = call(model, position_ids=torch.tensor([odd])).logits
        assert calls == []
        for dtype in (torch.int64, torch.int32):
            assert torch.equal(call(model, position_ids=torch.arange(10, dtype=dtype).view(1, -1)).logits, usual)
    assert calls == [10, 10]
    assert not torch.equal(found, usual)
    with without_lean_path(model):
        assert torch.equal(call(model, position_ids=torch.tensor([odd])).logits, found)
