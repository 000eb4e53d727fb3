"""QuantizedLinear: the module that stands for an nn.Linear, holding what the artifact stores and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.artifact.layout import LayerSpec, layer_shapes
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe


class QuantizedLinear(nn.Module):
    """y = W x + b with packed W and dynamically quantized x; takes and returns any float dtype, computes in fp32.

    Buffers carry the names of the format (docs/format.md). `weight` is an empty sentinel whose dtype and device speak
    for the module, as model code expects of a linear layer. Linears of one site share the leader's permutation.
    """

    def __init__(self, name: str, spec: LayerSpec, activations: ActivationRecipe | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.activations = activations
        self.in_features, self.out_features = spec.columns, spec.rows
        for full_name, (kind, shape) in layer_shapes(name, spec, dtype).items():
            self.register_buffer(full_name[len(name) + 1 :], torch.empty(shape, dtype=kind))
        if not spec.bias:
            self.register_buffer("bias", None)
        # In a list, so that the leader is not registered as a child of its neighbours.
        self._leader: list[QuantizedLinear] = [self]
        self._dense: Tensor | None = None

    @classmethod
    def from_matrix(
        cls,
        name: str,
        spec: LayerSpec,
        activations: ActivationRecipe | None,
        matrix: CodebookMatrix,
        bias: Tensor | None,
    ) -> QuantizedLinear:
        """A module around a solved matrix, for use before the artifact exists."""
        module = cls(name, spec, activations, torch.float32)
        for part, tensor in matrix.tensors().items():
            setattr(module, part, tensor)
        if spec.permutation == name and matrix.permutation is not None:
            module.permutation = matrix.permutation.to(module.permutation.dtype)
        if bias is not None:
            module.bias = bias
        return module

    def share_permutation(self, leader: QuantizedLinear) -> None:
        self._leader = [leader]

    @property
    def order(self) -> Tensor | None:
        """The site's permutation int64 [columns], or None."""
        if self.spec.permutation is None:
            return None
        return self._leader[0].permutation.to(torch.int64)

    def matrix(self) -> CodebookMatrix:
        """The stored matrix; its tensors are the module's own, not copies."""
        return CodebookMatrix(
            rows=self.spec.rows,
            columns=self.spec.columns,
            bits=self.spec.bits,
            group=self.spec.group,
            kind=self.spec.kind,
            planes=self.codes,
            scales=self.scales,
            levels=getattr(self, "levels", None),
            zeros=getattr(self, "zeros", None),
            outliers=getattr(self, "outliers", None),
            outlier_scales=getattr(self, "outlier_scales", None),
            permutation=self.order,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] -> the same dtype [..., out_features]."""
        flat = x.reshape(-1, self.in_features).to(torch.float32)
        order = self.order
        if order is not None:
            flat = flat.index_select(1, order)
        flat = quantize_site(flat, self.spec.outliers, self.spec.group, self.activations)
        weights = self._dense if self._dense is not None else self.matrix().dequantize_site_order()
        bias = None if self.bias is None else self.bias.to(torch.float32)
        y = nn.functional.linear(flat, weights, bias)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Device moves reach all buffers; casts reach the sentinel and the bias alone.

        model.to(torch.bfloat16) would otherwise round the fp16 scales without a word.
        """

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and tensor is not self.weight and tensor is not self.bias:
                return tensor.to(moved.device)
            return moved

        super()._apply(careful, recurse)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{spec.columns} -> {spec.rows}, {spec.bits}-bit {spec.kind} codes in groups of {spec.group},"
            f" {spec.outliers} int8 outlier channels, bias={spec.bias}"
        )

    def __getattr__(self, name: str) -> Any:
        """For type checkers: buffers are tensors, and which ones there are depends on the spec."""
        return super().__getattr__(name)


def quantized_linears(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """All QuantizedLinear in a module, with their names."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, QuantizedLinear))


@contextmanager
def dense_weights(module: nn.Module) -> Iterator[None]:
    """Keep the dequantized weights of all linears in `module` for the time of a with, at 4 bytes a weight.

    The values are the same either way; many short forward passes save the unpacking.
    """
    linears = [child for _, child in quantized_linears(module)]
    for linear in linears:
        linear._dense = linear.matrix().dequantize_site_order()
    try:
        yield
    finally:
        for linear in linears:
            linear._dense = None
