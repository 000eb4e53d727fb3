"""The lean path from outside: whether it is taken, and the same model without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.integrations.transformers import quantized_cache, recipe_of
from bitwright.runtime import QuantizedKVCache
from bitwright.runtime.decoder import Decoder


class Logits(torch.nn.Module):
    """A model as what is compiled and exported: token ids in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@contextmanager
def without_lean_path(model: Any) -> Iterator[None]:
    lean = model.model.__dict__.pop("forward")
    try:
        yield
    finally:
        model.model.forward = lean


@contextmanager
def block_by_block(model: Any) -> Iterator[None]:
    """Without the native call for all blocks at once."""
    decoder = model.model._bitwright_lean.current()
    assert decoder.served
    decoder.served = False
    try:
        yield
    finally:
        decoder.served = True


@contextmanager
def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the lean path had."""
    calls: list[int] = []
    original = Decoder.__call__

    def counting(self: Decoder, ids: Tensor, cache: QuantizedKVCache) -> Tensor:
        calls.append(len(ids))
        return original(self, ids, cache)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", counting)
        yield calls


def steps(model: Any, ids: Tensor, sizes: list[int]) -> list[Tensor]:
    """Logits of the pieces of `ids`, one after the other into one cache."""
    cache = quantized_cache(model, recipe_of(model))
    with torch.inference_mode():
        return [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(sizes, dim=1)]
