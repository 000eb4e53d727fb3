"""QuantizedLinear: the module that stands for an nn.Linear, holding what the artifact stores and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.activations import quantize_site
from bitwright.artifact.layout import LayerSpec, layer_shapes
from bitwright.codebook import CodebookMatrix, on_grid
from bitwright.native import native
from bitwright.recipe import ActivationRecipe
from bitwright.runtime import ops, plane_ops, planes, tiles
from bitwright.runtime.hadamard_ops import site_hadamard, site_hadamard_eager
from bitwright.runtime.tiles import STORED
from bitwright.transforms import SiteHadamard

# Of the kernels' tiles: what their integer sums are known to hold.
WIDEST_GROUP = 4096

UNPACKED = (
    "load_state_dict or a move to another device turned packed weights back into the stored tensors, which are"
    " dequantized at every call; bitwright.runtime.pack_sites(model) packs them again"
)


@dataclass(frozen=True)
class Kernel:
    """The op that computes a linear exactly as its recipe says, and what it wants beside inputs, tiles and rows."""

    op: Callable[..., Tensor]
    eager: Callable[..., Tensor]  # the same without torch's dispatcher
    order: Tensor | None  # int32 [columns]
    bias: Tensor | None  # fp32 [rows]
    rest: tuple[Any, ...]
    hadamard: SiteHadamard | None = None  # of the input, behind its order

    def __call__(self, x: Tensor, packed: Tensor, rows: int) -> Tensor:
        order = self.order
        if self.hadamard is not None:
            turn = site_hadamard_eager if self.op is self.eager else site_hadamard
            x, order = turn(x, order, *astuple(self.hadamard)), None
        return self.op(x, packed, order, self.bias, rows, *self.rest)


def to_site(x: Tensor, order: Tensor | None, hadamard: SiteHadamard | None) -> Tensor:
    """fp32 [tokens, columns] in the model's channel order -> site order, transformed; `order` int64 [columns]."""
    if hadamard is None:
        return x if order is None else x.index_select(1, order)
    if x.device.type == "cpu":
        return site_hadamard(x, None if order is None else order.to(torch.int32), *astuple(hadamard))
    return hadamard.apply(x if order is None else x.index_select(1, order))


def with_clip(recipe: ActivationRecipe | None, ratio: float) -> ActivationRecipe | None:
    """The same quantizer with another clip ratio."""
    return recipe and recipe.model_copy(update={"clip": float(ratio)})


class QuantizedLinear(nn.Module):
    """y = W x + b with packed W and dynamically quantized x; takes and returns any float dtype, computes in fp32.

    Buffers carry the names of the format (docs/format.md). `weight` is an empty sentinel whose dtype and device speak
    for the module, as model code expects of a linear layer. Linears of one site share the leader's permutation.
    """

    def __init__(self, name: str, spec: LayerSpec, activations: ActivationRecipe | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.activations = activations if spec.clip is None else with_clip(activations, spec.clip)
        self.in_features, self.out_features = spec.columns, spec.rows
        for full_name, (kind, shape) in layer_shapes(name, spec, dtype).items():
            self.register_buffer(full_name[len(name) + 1 :], torch.empty(shape, dtype=kind))
        if not spec.bias:
            self.register_buffer("bias", None)
        # The kernels' tiles, made from the buffers above by `pack`; those are then let go.
        self.packed: Tensor | None
        self.register_buffer("packed", None, persistent=False)
        # In a list, so that the leader is not registered as a child of its neighbours.
        self._leader: list[QuantizedLinear] = [self]
        self._dense: Tensor | None = None
        self._kernel: Kernel | None = None
        self._turned_back = False  # from tiles to stored tensors, by something that nobody asked for that

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

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the format but permutation, bias and sentinel; the module's own where it is not packed."""
        if self.packed is not None:
            return self._unpacked()
        return {name: getattr(self, name) for name in STORED if getattr(self, name, None) is not None}

    def matrix(self) -> CodebookMatrix:
        """The stored matrix."""
        parts = self.stored()
        return CodebookMatrix(
            rows=self.spec.rows,
            columns=self.spec.columns,
            bits=self.spec.bits,
            group=self.spec.group,
            kind=self.spec.kind,
            planes=parts.pop("codes"),
            scales=parts.pop("scales", None),
            permutation=self.order,
            **parts,
        )

    @property
    def counts_planes(self) -> bool:
        """Whether the bit planes of the inputs have free values, which the boolean product alone computes exactly."""
        return self.activations is not None and self.activations.balance != "none"

    @property
    def geometry(self) -> tiles.Geometry:
        sizes = self.spec.rows, self.spec.columns, self.spec.outliers, self.spec.group
        if self.counts_planes:
            return planes.PlaneGeometry(*sizes)
        return tiles.Geometry(*sizes, self.spec.bits, tiles.has_table(self.spec.bits, self.spec.kind))

    def _unpacked(self) -> dict[str, Tensor]:
        assert self.packed is not None
        geometry = self.geometry
        if isinstance(geometry, planes.PlaneGeometry):
            return planes.unpack(self.packed, geometry, self.spec.kind)
        return tiles.unpack(self.packed, geometry, self.spec.kind)

    @property
    def packable(self) -> bool:
        """Whether the native kernels compute exactly what the recipe says, here and now."""
        if self.activations is None:
            return False
        # Planes are counted apart for the paper's two-bit codes alone.
        fits = tiles.serves(self.spec.bits, self.spec.kind) and (self.spec.bits == 2 or not self.counts_planes)
        fits = fits and self.spec.group <= WIDEST_GROUP
        fits = fits and (self.spec.kind != "shared" or on_grid(self.table) is not None)
        return fits and self.weight.device.type == "cpu" and native() is not None

    def pack(self, out: Tensor | None = None) -> None:
        """Turn the stored tensors into the kernels' tiles, in `out` (zeros) where given, and let go of them."""
        self.adopt_tiles((planes if self.counts_planes else tiles).pack(self.matrix(), out))

    def adopt_tiles(self, packed: Tensor) -> None:
        """Take `packed` for the weights and let go of the stored tensors."""
        self._kernel = None
        self._turned_back = False
        for name in STORED:
            if hasattr(self, name):
                setattr(self, name, None)
        self.packed = packed
        # Those that are None behind the others: torch.export (of torch 2.13) miscounts a root module's buffers where
        # one that is there follows one that is not.
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)

    def unpack(self) -> None:
        """Undo `pack`."""
        if self.packed is not None:
            for name, tensor in self.stored().items():
                setattr(self, name, tensor)
            self.packed = None
            self._kernel = None

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] -> the same dtype [..., out_features]."""
        if self.packed is not None and self._dense is None:
            return self.kernel()(x.to(torch.float32), self.packed, self.spec.rows).to(x.dtype)
        if self._turned_back and self._dense is None and not torch.compiler.is_compiling() and self.packable:
            warnings.warn(UNPACKED, stacklevel=2)
        flat = x.reshape(-1, self.in_features).to(torch.float32)
        flat = to_site(flat, self.order, self.spec.transform)
        flat = quantize_site(flat, self.spec.outliers, self.spec.group, self.activations)
        weights = self._dense if self._dense is not None else self.matrix().dequantize_site_order()
        bias = None if self.bias is None else self.bias.to(torch.float32)
        y = nn.functional.linear(flat, weights, bias)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequantize(self) -> Tensor:
        """fp32 [rows, columns] for inputs as the model has them: order and Hadamard undone."""
        weights, order = self.matrix().dequantize_site_order(), self.order
        if self.spec.transform is not None:
            weights = self.spec.transform.apply(weights)
        if order is None:
            return weights
        restored = torch.empty_like(weights)
        restored[:, order] = weights
        return restored

    def kernel(self) -> Kernel:
        """The native op for this linear, its arguments made once."""
        if self._kernel is None:
            spec, inputs = self.spec, self.activations
            assert inputs is not None
            order = None if spec.permutation is None else self._leader[0].permutation.to(torch.int32)
            bias = None if self.bias is None else self.bias.to(torch.float32)
            rest: tuple[Any, ...] = (spec.outliers, spec.group, inputs.clip, inputs.symmetric)
            op: Callable[..., Tensor] = ops.site_linear
            eager: Callable[..., Tensor] = ops.site_linear_eager
            if self.counts_planes:
                rest = (spec.outliers, spec.group, inputs.clip, inputs.balance)
                op, eager = plane_ops.site_planes, plane_ops.site_planes_eager
            else:
                geometry = self.geometry
                rest = (*rest, inputs.bits, geometry.bits, geometry.table)
            self._kernel = Kernel(op, eager, order, bias, rest, spec.transform)
        return self._kernel

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Device moves reach all buffers; casts reach the sentinel and the bias alone.

        model.to(torch.bfloat16) would otherwise round the fp16 scales without a word.
        """

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and tensor is not self.weight and tensor is not self.bias:
                return tensor.to(moved.device)
            return moved

        if self.packed is not None and fn(self.weight).device.type != "cpu":
            self.unpack()  # tiles are for the CPU's kernels
            self._turned_back = True
        self._kernel = None
        super()._apply(careful, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What the format stores, packed or not: save_pretrained writes the artifact's tensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._turned_back = self._turned_back or self.packed is not None
        self.unpack()
        self._kernel = None
        super()._load_from_state_dict(*args, **kwargs)

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


def pack_sites(module: nn.Module) -> None:
    """Repack every linear in `module` that the native kernels serve, site by site.

    The linears of a site stand one behind the other in one tensor, so that one call can multiply them all.
    """
    sites: dict[int, list[QuantizedLinear]] = {}
    for _, linear in quantized_linears(module):
        if linear.packed is None and linear.packable:
            sites.setdefault(id(linear._leader[0]), []).append(linear)
    for members in sites.values():
        sizes = [linear.geometry.packed_bytes() for linear in members]
        for linear, part in zip(members, torch.zeros(sum(sizes), dtype=torch.uint8).split(sizes), strict=True):
            linear.pack(part)


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
