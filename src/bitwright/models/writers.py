"""Linears that write to the residual stream, found by running a block: those whose output is added to the stream."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright.models.passes import run_block, to_meta

# The stream as the block receives it, where others name the module that receives it.
ENTRY = ""


class _Additions(TorchDispatchMode):
    """Follows the residual stream through additions: stream + output of a linear is the stream again."""

    def __init__(self, entry: Tensor) -> None:
        super().__init__()
        self.streams = [entry]
        self.outputs: dict[str, Tensor] = {}
        self.writers: dict[str, Tensor] = {}  # linear -> the stream that it is added to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and not kwargs:
            for stream, output in (args, args[::-1]):
                writer = next((name for name, tensor in self.outputs.items() if tensor is output), None)
                if writer is not None and any(stream is known for known in self.streams):
                    self.writers[writer] = stream
                    self.streams.append(result)
        return result


def find_writers(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, str]:
    """Linear -> the module of the block whose input is the stream that the linear's output is added to, or ENTRY.

    The block runs on the meta device. Left out is a linear whose output is scaled or normed before it is added, and one
    whose stream no module receives as it is (some blocks with attention and MLP side by side).
    """
    probe = copy.deepcopy(block).to("meta")
    entry = hidden.to("meta")
    receivers: list[tuple[str, Tensor]] = []
    additions = _Additions(entry)
    for name, module in probe.named_modules():
        if not name:
            continue

        def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                receivers.append((name, args[0]))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any, name: str = name) -> None:
            additions.outputs[name] = output

        module.register_forward_pre_hook(before)
        if type(module) is nn.Linear:
            module.register_forward_hook(after)
    with torch.inference_mode(), additions:
        run_block(probe, entry, to_meta(kwargs))
    found = {}
    for writer, stream in additions.writers.items():
        receiver = next((name for name, tensor in receivers if tensor is stream), None)
        if stream is entry or receiver is not None:
            found[writer] = ENTRY if stream is entry else str(receiver)
    return found
