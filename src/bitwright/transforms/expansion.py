"""Dimension expansion (GBS, arXiv 2504.13989, section 4): zeros behind the channels, so that a Hadamard matrix fits.

The residual stream of n channels becomes one of n', the inputs of a block's last product m' instead of m. What the new
channels hold is zero until a rotation mixes them in; the model computes what it did. Three things have to be seen to,
and an expanded model is then an ordinary one of its architecture, which no reader has to know about:

- RMSNorm divides by the root of the *mean* over n' channels now. With r = n / n' the mean square is r times the former:
  gamma is stored times sqrt(r), and eps is r times the former, which gives the former numbers exactly.
- Norms of queries and keys by head have the same eps in the config and as many channels as before: the products that
  make their inputs are stored times sqrt(r), which r times the eps makes up for, exactly again.
- Biases of what writes to the stream get zeros, too; all others stay as they are. 0 times gate(0) is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expansion:
    """Of the residual stream from `width` to `wide` channels, of the last products' inputs from `inner` to `wider`."""

    width: int
    wide: int
    inner: int
    wider: int

    @property
    def share(self) -> float:
        """r = n / n': eps is stored times this."""
        return self.width / self.wide

    @property
    def gain(self) -> float:
        """sqrt(r)."""
        return math.sqrt(self.share)


@dataclass(frozen=True)
class Role:
    """What happens to one tensor: the expanded axes, and whether it is multiplied by sqrt(r).

    stream  the axis of the residual stream, or None
    inner   the axis of the last product's inputs, or None
    """

    stream: int | None = None
    inner: int | None = None
    gain: bool = False


def expanded_shape(shape: tuple[int, ...], role: Role, by: Expansion) -> tuple[int, ...]:
    """The shape after `expand`. Raises ValueError where an axis has another size than it should."""
    sizes = list(shape)
    for axis, before, after in ((role.stream, by.width, by.wide), (role.inner, by.inner, by.wider)):
        if axis is not None:
            if axis >= len(sizes) or sizes[axis] != before:
                raise ValueError(f"axis {axis} of {list(shape)} should have {before} channels")
            sizes[axis] = after
    return tuple(sizes)


def expand(tensor: Tensor, role: Role, by: Expansion) -> Tensor:
    """A tensor of the model -> that of the expanded model, in its dtype."""
    if role.gain:
        tensor = tensor * by.gain
    shape = expanded_shape(tuple(tensor.shape), role, by)
    if shape == tuple(tensor.shape):
        return tensor
    result = torch.zeros(shape, dtype=tensor.dtype)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result
