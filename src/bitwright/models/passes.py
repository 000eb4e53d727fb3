"""Passes through the model's own forward with its blocks exchanged: what stands before and after them, as written.

So masks, positions, embedding scales and final norms are those of the architecture, whatever it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError

if TYPE_CHECKING:
    from bitwright.models.skeleton import Skeleton

Call = tuple[Tensor, dict[str, Any]]


def first_line(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0]


class _Stop(Exception):
    """Raised by the last recorder: the rest of the model is not needed."""


class _Recorder(nn.Module):
    """Stands in for a block, keeps what it is called with, and returns its input."""

    def __init__(self, block: nn.Module, calls: list[Call], last: bool) -> None:
        super().__init__()
        self._calls, self._last = calls, last
        # Models read attributes of their blocks, such as attention_type, to choose a mask.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ModelError(
                "the model passes positional arguments to its decoder blocks; this architecture is not supported"
            )
        self._calls.append((hidden_states, kwargs))
        if self._last:
            raise _Stop
        return hidden_states


class materialized:
    """Parameters outside the blocks for the time of a with: given values, else zeros that no page of memory backs."""

    def __init__(self, skeleton: Skeleton, values: dict[str, Tensor]) -> None:
        self.skeleton, self.values = skeleton, values
        self.saved: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        inside = f"{self.skeleton.prefix}."
        shared: dict[int, nn.Parameter] = {}
        tied = self.skeleton.tied_names()
        embedding = self.skeleton.embedding.weight
        for name, parameter in list(self.skeleton.model.named_parameters(remove_duplicate=False)):
            if name.startswith(inside) or not parameter.is_meta:
                continue
            path, _, leaf = name.rpartition(".")
            module = self.skeleton.model.get_submodule(path)
            self.saved.append((module, leaf, parameter))
            key = id(embedding) if name in tied and name not in self.values else id(parameter)
            if key not in shared:
                value = self.values.get(name)
                shared[key] = nn.Parameter(
                    torch.zeros(1).expand(parameter.shape) if value is None else value, requires_grad=False
                )
            module._parameters[leaf] = shared[key]

    def __exit__(self, *_: object) -> None:
        for module, leaf, parameter in self.saved:
            module._parameters[leaf] = parameter


def record_calls(skeleton: Skeleton, **inputs: Tensor) -> list[Call]:
    """Run the model's own forward up to its blocks and return (hidden states, keyword arguments) for each block."""
    calls: list[Call] = []
    container = skeleton.model.get_submodule(skeleton.prefix)
    last = len(skeleton.blocks) - 1
    try:
        for index, block in enumerate(skeleton.blocks):
            container[index] = _Recorder(block, calls, index == last)  # type: ignore[operator, index]
        with torch.inference_mode():
            skeleton.model(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        for index, block in enumerate(skeleton.blocks):
            container[index] = block  # type: ignore[operator, index]
    if len(calls) != len(skeleton.blocks):
        raise ModelError(
            f"{type(skeleton.model).__name__} is not supported: it did not call each of its decoder blocks once"
        )
    return calls


def embed(skeleton: Skeleton, values: dict[str, Tensor], input_ids: Tensor) -> list[Call]:
    """As record_calls, for real tokens int64 [1, length] and the real values of the parameters outside the blocks."""
    with materialized(skeleton, values):
        return record_calls(skeleton, input_ids=input_ids)


class _Feed(nn.Module):
    """Stands in for a block and returns the hidden states that this thread has laid out."""

    def __init__(self, local: threading.local, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_local"], self.__dict__["_block"] = local, block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.__dict__["_local"].hidden


@contextmanager
def head(skeleton: Skeleton, values: dict[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The part of the model after its blocks: a function from hidden states [1, length, width] to logits.

    The model's own forward runs, with blocks that hand on the given states, so whatever stands between the last block
    and the logits is what the architecture says. The function may be called by several threads.
    """
    local = threading.local()
    container = skeleton.model.get_submodule(skeleton.prefix)

    def logits(hidden: Tensor) -> Tensor:
        local.hidden = hidden
        return skeleton.model(inputs_embeds=hidden, use_cache=False).logits

    with materialized(skeleton, values):
        for index, block in enumerate(skeleton.blocks):
            container[index] = _Feed(local, block)  # type: ignore[operator, index]
        try:
            yield logits
        finally:
            for index, block in enumerate(skeleton.blocks):
                container[index] = block  # type: ignore[operator, index]


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Hidden states after `block`; blocks of some models return them in a tuple."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output
