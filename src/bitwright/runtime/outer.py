"""QuantizedEmbedding and QuantizedHead: what stands outside the blocks, from the integers that the artifact stores.

Nothing is unpacked: a lookup dequantizes the rows of its tokens, and the head's kernel multiplies with the codes as
they lie. A head tied to the embedding has no codes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.artifact.layout import OuterSpec, outer_shapes
from bitwright.outer import OuterMatrix
from bitwright.runtime import ops


class QuantizedOuter(nn.Module):
    """Buffers `codes` and `scales` (bitwright.outer), and the sentinel `weight` that speaks for dtype and device."""

    def __init__(self, spec: OuterSpec, dtype: torch.dtype, tied: QuantizedOuter | None = None) -> None:
        super().__init__()
        self.spec = spec
        # In a list, so that the embedding is not registered as a child of its head.
        self._source: list[QuantizedOuter] = [tied or self]
        for name, (kind, shape) in outer_shapes("", spec, dtype).items():
            if tied is None or name == ".weight":
                self.register_buffer(name[1:], torch.empty(shape, dtype=kind), persistent=tied is None)

    def matrix(self) -> OuterMatrix:
        """The stored matrix."""
        source = self._source[0]
        return OuterMatrix(source.codes, source.scales, self.spec.columns, self.spec.group)

    def own_tensors(self) -> dict[str, Tensor]:
        """What this module stores itself: nothing where it is tied."""
        return self.matrix().tensors() if self._source[0] is self else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedOuter:
        """Moves reach all buffers; casts reach the sentinel and the bias alone, and never the fp16 scales."""

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self._buffers.get("scales") else moved

        super()._apply(careful, recurse)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        tied = "" if self._source[0] is self else ", tied"
        return f"{spec.rows} x {spec.columns}, {spec.bits} bits in groups of {spec.group}{tied}"

    def __getattr__(self, name: str) -> Any:
        """For type checkers: buffers are tensors, and a tied head has not got them all."""
        return super().__getattr__(name)


class QuantizedEmbedding(QuantizedOuter):
    """Stands for an nn.Embedding: int [...] -> [..., columns] in the dtype of the sentinel."""

    def __init__(self, spec: OuterSpec, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(spec, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.rows, spec.columns, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.matrix().select(ids.reshape(-1)).dequantize()
        return rows.view(*ids.shape, self.spec.columns).to(self.weight.dtype)


class QuantizedHead(QuantizedOuter):
    """Stands for the nn.Linear that makes logits: float [..., columns] -> fp32 [..., rows], whatever the model's dtype.

    The input is not quantized. `tied` is the embedding whose rows it multiplies with, where it has none of its own.
    """

    def __init__(
        self, spec: OuterSpec, dtype: torch.dtype, bias: bool = False, tied: QuantizedEmbedding | None = None
    ) -> None:
        super().__init__(spec, dtype, tied)
        self.in_features, self.out_features = spec.columns, spec.rows
        self.register_buffer("bias", torch.empty(spec.rows, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.matrix()
        x = x.to(torch.float32)
        if weights.codes.device.type != "cpu":
            y = nn.functional.linear(x, weights.dequantize())
        else:
            y = ops.head_linear(x, weights.codes, weights.scales, weights.group)
        return y if self.bias is None else y + self.bias.to(torch.float32)


def quantized_outers(module: nn.Module) -> Iterator[tuple[str, QuantizedOuter]]:
    """The quantized embedding and head in a module, with their names."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, QuantizedOuter))
