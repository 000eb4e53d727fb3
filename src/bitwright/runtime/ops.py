"""The kernels of the quantized linear and of the dense head, native and reference; their schemas stand in schemas.py.

The native kernels get addresses and sizes of tensors that are checked here; they know no torch. The reference kernels
are torch code on the same packed bytes, for machines without a compiler and as a second opinion in the tests.

torch's dispatcher takes some microseconds to call an op that is written in Python. Code that is never traced can call
the functions behind the ops, here and in the other modules of ops: they are named as the ops are, and `_eager`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.activations import quantize_site
from bitwright.codebook import CodebookMatrix
from bitwright.native import native
from bitwright.outer import ROWS_AT_ONCE, OuterMatrix, outer_matrix_shapes
from bitwright.recipe import ActivationRecipe
from bitwright.runtime.schemas import kernel, require_float32
from bitwright.runtime.tiles import Geometry, geometry_of_sizes, unpack


def cut(clip: float) -> float:
    """Share of the range taken off at each end."""
    return (1.0 - clip) / 2.0


def share(clip: float, symmetric: bool) -> float:
    """Share of -max..max that symmetric codes span; 0 for those with a zero point."""
    return clip if symmetric else 0.0


def _check_packed(packed: Tensor, geometry: Geometry) -> None:
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != geometry.packed_bytes():
        raise ValueError(
            f"packed weights of {geometry} are {geometry.packed_bytes()} contiguous uint8;"
            f" found {packed.numel()} of {packed.dtype}"
        )
    if packed.data_ptr() % 64:
        raise ValueError("packed weights must begin at an address that 64 divides")


def check_inputs(x: Tensor, order: Tensor | None, columns: int) -> None:
    require_float32(x=x)
    if order is not None and (order.dtype != torch.int32 or order.shape != (columns,)):
        raise ValueError(f"order must be int32 [{columns}]; found {order.dtype} {list(order.shape)}")


def check(x: Tensor, packed: Tensor, order: Tensor | None, bias: Tensor | None, geometry: Geometry) -> None:
    """What the native kernel relies on; raises ValueError."""
    _check_packed(packed, geometry)
    check_inputs(x, order, geometry.columns)
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (geometry.rows,)):
        raise ValueError(f"bias must be float32 [{geometry.rows}]; found {bias.dtype} {list(bias.shape)}")


@kernel("site_linear")
def site_linear_eager(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    rows: int,
    outliers: int,
    group: int,
    clip: float,
    symmetric: bool = False,
) -> Tensor:
    """x fp32 [..., columns] in the model's channel order -> fp32 [..., rows]: all linears of a site, 4-bit inputs."""
    geometry = geometry_of_sizes(rows, x.shape[-1], outliers, group)
    check(x, packed, order, bias, geometry)
    module = native()
    if module is None:
        recipe = ActivationRecipe(bits=4, balance="none", clip=clip, symmetric=symmetric)
        return site_reference(x, unpack(packed, geometry, "free"), order, bias, geometry, recipe)
    setting = (cut(clip), 4, share(clip, symmetric))
    return run_site(module.site_linear, x, packed, order, bias, geometry, setting)


def run_site(
    function: Callable[..., None],
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    setting: tuple[float, ...],
) -> Tensor:
    """Call the native product of either kind of tiles on checked tensors; `setting` is what its quantizer wants."""
    # Everything here is paid at every call: hence one look at the shape, and sizes as arguments instead of a tuple.
    x = x.contiguous()
    order = None if order is None else order.contiguous()
    bias = None if bias is None else bias.contiguous()
    shape = x.shape
    tokens = shape[0] if len(shape) == 2 else x.numel() // geometry.columns
    y = torch.empty(tokens, geometry.rows, dtype=torch.float32)
    function(
        x.data_ptr(),
        tokens,
        packed.data_ptr(),
        geometry.rows,
        geometry.columns,
        geometry.outliers,
        geometry.group,
        0 if order is None else order.data_ptr(),
        *setting,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if len(shape) == 2 else y.view(*shape[:-1], geometry.rows)


def site_reference(
    x: Tensor,
    stored: dict[str, Tensor],
    order: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    recipe: ActivationRecipe,
) -> Tensor:
    """What the native products compute, in torch: the quantizer, then a dense product with the stored weights."""
    flat = x.reshape(-1, geometry.columns)
    if order is not None:
        flat = flat.index_select(1, order.to(torch.int64))
    flat = quantize_site(flat, geometry.outliers, geometry.group, recipe)
    y = torch.nn.functional.linear(flat, _dense(stored, geometry), bias)
    return y.reshape(*x.shape[:-1], geometry.rows)


def _dense(stored: dict[str, Tensor], geometry: Geometry) -> Tensor:
    """Stored tensors with free levels -> fp32 [rows, columns] in site order."""
    matrix = CodebookMatrix(
        rows=geometry.rows,
        columns=geometry.columns,
        bits=2,
        group=geometry.group,
        kind="free",
        planes=stored["codes"],
        scales=stored["scales"],
        levels=stored["levels"],
        outliers=stored.get("outliers"),
        outlier_scales=stored.get("outlier_scales"),
    )
    return matrix.dequantize_site_order()


@kernel("dense_linear")
def dense_linear_eager(x: Tensor, weight: Tensor) -> Tensor:
    """x fp32 [..., columns], weight bfloat16 [rows, columns] -> fp32 [..., rows], products summed in fp32."""
    if x.dtype != torch.float32 or weight.dtype != torch.bfloat16 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be float32 [..., {weight.shape[1]}] and weight bfloat16;"
            f" found {x.dtype} {list(x.shape)} and {weight.dtype}"
        )
    module = native()
    if module is None:
        return torch.nn.functional.linear(x, weight.to(torch.float32))
    x, weight = x.contiguous(), weight.contiguous()
    rows, columns = weight.shape
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    tokens = x.numel() // columns
    module.dense_linear(x.data_ptr(), tokens, weight.data_ptr(), rows, columns, y.data_ptr(), torch.get_num_threads())
    return y


@kernel("head_linear")
def head_linear_eager(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """x fp32 [..., columns], codes and scales of an OuterMatrix [rows, columns] -> fp32 [..., rows], summed in fp32."""
    rows, columns, bits = codes.shape[0], x.shape[-1], 8 if codes.dtype == torch.int8 else 4
    require_float32(x=x)
    shapes = outer_matrix_shapes(rows, columns, bits, group) if group > 0 and group % 8 == 0 else {}
    if shapes != {"codes": (codes.dtype, codes.shape), "scales": (scales.dtype, scales.shape)}:
        raise ValueError(
            f"codes and scales of x [..., {columns}] in groups of {group}, a multiple of 8, have other shapes than"
            f" {codes.dtype} {list(codes.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    module = native()
    if module is None:
        weights = OuterMatrix(codes, scales, columns, group)
        parts = torch.arange(rows).split(ROWS_AT_ONCE)  # the whole head in fp32 would be the largest tensor by far
        return torch.cat([torch.nn.functional.linear(x, weights.select(part).dequantize()) for part in parts], dim=-1)
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    addresses = (codes.data_ptr(), scales.data_ptr())
    tokens, threads = x.numel() // columns, torch.get_num_threads()
    module.head_linear(x.data_ptr(), tokens, *addresses, rows, columns, group, bits, y.data_ptr(), threads)
    return y


@kernel("dequantize")
def _dequantize(packed: Tensor, rows: int, columns: int, outliers: int, group: int) -> Tensor:
    """Packed weights of a site -> fp32 [rows, columns] in site order, exact."""
    geometry = Geometry(rows, columns, outliers, group)
    _check_packed(packed, geometry)
    module = native()
    if module is None:
        return _dense(unpack(packed, geometry, "free"), geometry)
    weights = torch.empty((rows, columns), dtype=torch.float32)
    sizes = (rows, columns, outliers, group)
    module.unpack(packed.data_ptr(), *sizes, 0, rows, weights.data_ptr(), torch.get_num_threads())
    return weights


site_linear = torch.ops.bitwright.site_linear.default
dequantize = torch.ops.bitwright.dequantize.default
head_linear = torch.ops.bitwright.head_linear.default
dense_linear = torch.ops.bitwright.dense_linear.default
