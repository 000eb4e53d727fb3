"""The weights of an RMSNorm moved into the linears behind it.

norm(x) = gamma * x / rms(x), and W (gamma * u) = (W diag(gamma)) u: with gamma in the columns of W the norm keeps ones
and commutes with every rotation of its input, because a rotation keeps rms(x) (SliceGPT, arXiv 2401.15024, section 3;
QuaRot, section 4). Layers that subtract a mean do not occur in these models, and none is subtracted from embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_norm(state: dict[str, Tensor], norm: str, linears: Sequence[str]) -> dict[str, Tensor]:
    """A copy of `state` with the weights [columns] of `norm` in the columns of all `linears`, and ones in their place.

    `norm` and `linears` are module names; `state` holds `NAME.weight` of each, [rows, columns] of the linears. These
    must be all that reads the norm's output. Biases stand behind the product and stay.
    """
    gamma = state[f"{norm}.weight"]
    fused = {f"{name}.weight": state[f"{name}.weight"] * gamma for name in linears}
    return {**state, **fused, f"{norm}.weight": torch.ones_like(gamma)}
