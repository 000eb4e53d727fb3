"""Activation quantization as an op of its own: what `site_linear` does to its inputs before it multiplies.

For looking at what the 4-bit inputs of a site are, and for building another product on them. The integers are those
that the byte kernels multiply: a normal channel is `step * (code + rest)`, an outlier channel `outlier_step * code`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers
from bitwright.native import native
from bitwright.recipe import ActivationRecipe
from bitwright.runtime.ops import check_inputs, cut, share
from bitwright.runtime.schemas import kernel
from bitwright.runtime.tiles import Geometry

BITS: Final = 4


@kernel("quantize_site")
def _quantize_site(
    x: Tensor, order: Tensor | None, outliers: int, group: int, clip: float, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x fp32 [..., columns] in the model's channel order -> its 4-bit integers, channels in site order.

        codes          int8 [..., columns - outliers]  c - z of BWA, eq. 3, with z clamped to 0..15
        step           fp32 [..., groups]              mu
        rest           fp32 [..., groups]              what the clamp took off z: 0 but where a group has one sign
        outlier_codes  int8 [..., outliers]            symmetric, -127..127
        outlier_step   fp32 [...]                      one a token

    Channel i of the normal ones has the value step[i // group] * (codes[i] + rest[i // group]), which is what
    `activations.quantize_site` returns; where |z| is above 2^24 (a group of values that are equal but for their last
    bits) fp32 cannot hold z - 15, and the two may differ in the last bit. A group with a value that is not finite has
    step NaN and codes 0, as have the outliers of such a token.

    `order` is int32 [columns], the channel that stands at each place of the site order, or None; `clip` and `symmetric`
    as in ActivationRecipe (symmetric: z is 8 and rest 0). Raises ValueError for what does not fit.
    """
    columns = x.shape[-1] if x.dim() else 0
    if not 0 <= outliers < columns or group < 1:
        raise ValueError(f"{columns} columns cannot have {outliers} outliers and groups of {group}")
    check_inputs(x, order, columns)
    geometry, batch = Geometry(0, columns, outliers, group), x.shape[:-1]
    quantize = _reference if native() is None else _native
    codes, step, rest, outlier_codes, outlier_step = quantize(
        x.reshape(-1, columns),
        order,
        geometry,
        ActivationRecipe(bits=BITS, balance="none", clip=clip, symmetric=symmetric),
    )
    return (
        codes.reshape(*batch, geometry.normal),
        step.reshape(*batch, geometry.groups),
        rest.reshape(*batch, geometry.groups),
        outlier_codes.reshape(*batch, outliers),
        outlier_step.reshape(batch),
    )


def _native(x: Tensor, order: Tensor | None, geometry: Geometry, recipe: ActivationRecipe) -> tuple[Tensor, ...]:
    """x [tokens, columns]; the kernels keep what belongs to a group together, [groups, tokens, ...]."""
    x = x.contiguous()
    order = None if order is None else order.contiguous()
    tokens, groups = len(x), geometry.groups
    codes = torch.empty((groups, tokens, geometry.width), dtype=torch.int8)
    step, rest = torch.empty(groups, tokens), torch.empty(groups, tokens)
    shift = torch.empty((groups, tokens), dtype=torch.int32)  # only the product wants these
    outlier_codes = torch.empty((tokens, -(-geometry.outliers // 4) * 4), dtype=torch.int8)
    outlier_step, outlier_shift = torch.zeros(tokens), torch.empty(tokens, dtype=torch.int32)
    native().quantize_site(
        x.data_ptr(),
        tokens,
        geometry.columns,
        geometry.outliers,
        geometry.group,
        0 if order is None else order.data_ptr(),
        cut(recipe.clip),
        BITS,
        share(recipe.clip, recipe.symmetric),
        *(part.data_ptr() for part in (codes, step, rest, shift, outlier_codes, outlier_step, outlier_shift)),
        torch.get_num_threads(),
    )
    codes = codes[..., : geometry.group].transpose(0, 1).flatten(1)[:, : geometry.normal]
    parts = codes, step.T, rest.T, outlier_codes[:, : geometry.outliers], outlier_step
    return tuple(part.contiguous() for part in parts)


def _reference(x: Tensor, order: Tensor | None, geometry: Geometry, recipe: ActivationRecipe) -> tuple[Tensor, ...]:
    """The same in torch, bit for bit."""
    if order is not None:
        x = x.index_select(1, order.to(torch.int64))
    normal, outliers = x.split([geometry.normal, geometry.outliers], dim=1)
    found = quantize_groups(normal, geometry.group, recipe)
    filled = torch.nn.functional.pad(normal, (0, geometry.groups * geometry.group - geometry.normal))
    finite = filled.unflatten(1, (geometry.groups, -1)).isfinite().all(dim=-1, keepdim=True)
    inside = found.zero.clamp(0, 2**BITS - 1)
    codes = torch.where(finite, found.codes - inside, 0.0).nan_to_num(0.0)
    step, rest = torch.where(finite, found.step, torch.nan), torch.where(finite, inside - found.zero, 0.0)
    integers, scale = outliers, torch.zeros(len(x))
    if geometry.outliers:
        finite = outliers.isfinite().all(dim=-1, keepdim=True)
        integers, steps = quantize_outliers(outliers)
        integers, scale = torch.where(finite, integers, 0.0), torch.where(finite, steps, torch.nan).squeeze(-1)
    codes = codes.flatten(1)[:, : geometry.normal].to(torch.int8)
    return codes.contiguous(), step.squeeze(-1), rest.squeeze(-1), integers.to(torch.int8), scale


quantize_site = torch.ops.bitwright.quantize_site.default
