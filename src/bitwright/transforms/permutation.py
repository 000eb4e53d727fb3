"""The order of a site's input channels (BWA section 3.4, Atom section 4.1): outliers last, the others sorted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def channel_order(energy: Tensor, outliers: int, order: Literal["ascending", "descending", "none"]) -> Tensor:
    """Energies [channels] -> permutation int64 [channels]: site channel i is input channel permutation[i].

    The `outliers` channels of the highest energy come last, in ascending order; the normal channels before them in the
    order asked for. Ties keep the order of the channels, so that equal statistics give equal artifacts.
    """
    ascending = torch.argsort(energy, stable=True)
    normal, last = ascending[: len(energy) - outliers], ascending[len(energy) - outliers :]
    if order == "descending":
        normal = normal.flip(0)
    elif order == "none":
        normal, last = normal.sort().values, last.sort().values
    return torch.cat([normal, last])
