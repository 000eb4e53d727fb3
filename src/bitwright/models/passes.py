"""Passes through the model's own forward with its blocks exchanged: what stands before and after them, as written.

So masks, positions, embedding scales and final norms are those of the architecture, whatever it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bitwright.errors import ModelError
from bitwright.models.frame import Frame

Call = tuple[Tensor, dict[str, Any]]


def first_line(problem: BaseException) -> str:
    """What a problem of another library says first; a line that ends with a colon is told with its next one."""
    lines = (str(problem).strip() or type(problem).__name__).splitlines()
    count = next((i for i, line in enumerate(lines, 1) if not line.rstrip().endswith(":")), len(lines))
    return " ".join(line.strip() for line in lines[:count])


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

    def __init__(self, frame: Frame, values: dict[str, Tensor]) -> None:
        self.frame, self.values = frame, values
        self.saved: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        inside = f"{self.frame.prefix}."
        shared: dict[int, nn.Parameter] = {}
        tied = self.frame.tied_names()
        embedding = self.frame.embedding.weight
        for name, parameter in list(self.frame.model.named_parameters(remove_duplicate=False)):
            if name.startswith(inside) or not parameter.is_meta:
                continue
            path, _, leaf = name.rpartition(".")
            module = self.frame.model.get_submodule(path)
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


def record_calls(frame: Frame, **inputs: Tensor) -> list[Call]:
    """Run the model's own forward up to its blocks and return (hidden states, keyword arguments) for each block."""
    calls: list[Call] = []
    container = frame.model.get_submodule(frame.prefix)
    last = len(frame.blocks) - 1
    try:
        for index, block in enumerate(frame.blocks):
            container[index] = _Recorder(block, calls, index == last)  # type: ignore[operator, index]
        with torch.inference_mode():
            frame.model(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        for index, block in enumerate(frame.blocks):
            container[index] = block  # type: ignore[operator, index]
    if len(calls) != len(frame.blocks):
        raise ModelError(f"{frame.name} is not supported: it did not call each of its decoder blocks once")
    return calls


def embed(frame: Frame, values: dict[str, Tensor], input_ids: Tensor) -> list[Call]:
    """As record_calls, for real tokens int64 [1, length] and the real values of the parameters outside the blocks."""
    with materialized(frame, values):
        return record_calls(frame, input_ids=input_ids)


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
def head(frame: Frame, values: dict[str, Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The part of the model after its blocks: a function from hidden states [1, length, width] to logits.

    The model's own forward runs, with blocks that hand on the given states, so whatever stands between the last block
    and the logits is what the architecture says. The function may be called by several threads.
    """
    local = threading.local()
    container = frame.model.get_submodule(frame.prefix)

    def logits(hidden: Tensor) -> Tensor:
        local.hidden = hidden
        return frame.model(inputs_embeds=hidden, use_cache=False).logits

    with materialized(frame, values):
        for index, block in enumerate(frame.blocks):
            container[index] = _Feed(local, block)  # type: ignore[operator, index]
        try:
            yield logits
        finally:
            for index, block in enumerate(frame.blocks):
                container[index] = block  # type: ignore[operator, index]


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Hidden states after `block`; blocks of some models return them in a tuple."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def to_meta(value: Any) -> Any:
    """What a block is called with, its tensors without their data."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: to_meta(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    return value


def plain(values: Any) -> Any:
    """A copy of tensors, in whatever structure, that autograd may keep: made outside of inference mode."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone(), values)
