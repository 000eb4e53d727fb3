"""The Hadamard transform of a site's normal channels, after the channel order: exactly undone in the weights.

Two uses, one description. *Group-local*: each group of normal channels of its own, so that sorting by energy and the
int8 outlier channels stay what they are, while the values inside a group come near a Gaussian, which four levels and a
4-bit quantizer serve best (GSR, arXiv 2505.03810, rotates locally for the same reason). *Across heads*, and *of all
channels* before the last product of a block: what QuaRot (NeurIPS 2024, section 4) does online.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.transforms.hadamard import transform


@dataclass(frozen=True)
class SiteHadamard:
    """The first `normal` channels seen as [-1, size, stride], H / sqrt(size) along the middle axis.

    With stride 1 what is left behind the whole blocks is cut into falling powers of two below `size`, each with its own
    H: 40 channels behind blocks of 128 are blocks of 32 and 8. (Any constructible size would do as well today; but it
    may be that more sizes can be constructed one day, and an artifact must not change its meaning.) With a wider stride
    they stay as they are. Symmetric and orthogonal: its own inverse.
    """

    size: int
    stride: int
    normal: int

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(begin, end, size) of the stretches of channels that blocks of one size fill, from the first channel on."""
        span = self.size * self.stride
        end = self.normal // span * span
        if end:
            yield 0, end, self.size
        block = 1 << (self.size.bit_length() - 1) if self.stride == 1 else 1
        while block > 1:
            begin, end = end, end + (self.normal - end) // block * block
            if end > begin:
                yield begin, end, block
            block //= 2

    def apply(self, x: Tensor) -> Tensor:
        """Float [..., columns] in site order -> the same shape and dtype. For weights [rows, columns] it is the undoing
        of the same on their inputs. In torch, in any float dtype; the op `site_hadamard` is for activations."""
        parts = []
        done = 0
        for begin, done, size in self.pieces():
            values = x[..., begin:done]
            if self.stride > 1:
                turned = values.unflatten(-1, (-1, size, self.stride)).transpose(-1, -2)
                parts.append(transform(turned, size).transpose(-1, -2).flatten(-3))
            else:
                parts.append(transform(values, size))
        return torch.cat([*parts, x[..., done:]], dim=-1) if parts else x
