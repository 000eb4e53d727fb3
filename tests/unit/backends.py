"""Running something on every backend: the variants of this build that this processor runs, and the torch reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch

from bitwright import native

T = TypeVar("T")

module: Any = native.find()
VARIANTS = [name for name, runs in module.variants() if runs] if module else []
needs_native = pytest.mark.skipif(module is None, reason="built without native kernels")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, name)
    native.native.cache_clear()


def restore() -> None:
    native.native.cache_clear()
    if module is not None:
        module.choose(VARIANTS[0])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_every_variant(compute: Callable[[], T], count: int = 1) -> dict[str, T]:
    """What `compute` gives on each native variant; on all but the scalar one, with `count` threads."""
    found = {}
    try:
        for name in VARIANTS:
            module.choose(name)
            with threads(1 if name == "scalar" else count):
                found[name] = compute()
    finally:
        restore()
    return found
