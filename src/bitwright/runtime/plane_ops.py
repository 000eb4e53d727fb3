"""The op of the boolean product, `site_planes`: native and reference kernel; the schema stands in schemas.py.

Where `site_linear` (ops.py) needs plane values 2^a mu, this takes every balance of the recipe exactly: integer counts
of q, m and q AND m in each bit plane of the input (BWA, eq. 5 to 7), then one fp32 step a group.
"""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from torch import Tensor

from bitwright.native import native
from bitwright.recipe import ActivationRecipe
from bitwright.runtime.ops import check, cut, run_site, site_reference
from bitwright.runtime.planes import PlaneGeometry, unpack
from bitwright.runtime.schemas import kernel

BALANCES: tuple[str, ...] = get_args(ActivationRecipe.model_fields["balance"].annotation)
NATIVE = ("none", "support", "literal")  # the numbers of csrc/planes/planes.h


def _geometry(x: Tensor, rows: int, outliers: int, group: int, balance: str) -> PlaneGeometry:
    if balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}; found {balance!r}")
    if group <= 0 or group % 8:
        raise ValueError(f"group must be a positive multiple of 8; found {group}")
    return PlaneGeometry(rows, x.shape[-1], outliers, group)


@kernel("site_planes")
def site_planes_eager(
    x: Tensor,
    packed: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    rows: int,
    outliers: int,
    group: int,
    clip: float,
    balance: str,
) -> Tensor:
    """x fp32 [..., columns] in the model's channel order -> fp32 [..., rows]: all linears of a site, 4-bit inputs.

    `packed` is what `planes.pack` made, `order` int32 [columns], `bias` fp32 [rows]; `balance` as in the recipe (BWA,
    eq. 11). A token with a value that is not finite gives rows of NaN. Raises ValueError for what does not fit.
    """
    geometry = _geometry(x, rows, outliers, group, balance)
    check(x, packed, order, bias, geometry)
    module = native()
    if module is None:
        recipe = ActivationRecipe(bits=4, balance=cast(Any, balance), clip=clip)
        return site_reference(x, unpack(packed, geometry, "free"), order, bias, geometry, recipe)
    return run_site(module.site_planes, x, packed, order, bias, geometry, (cut(clip), NATIVE.index(balance)))


site_planes = torch.ops.bitwright.site_planes.default
