"""Statistics of a site's input, summed in a fixed order so that the number of threads never shows.

Energy: the diagonal of X^T X in fp64, from the full-precision stream; it orders the channels. Hessian: (2/N) X^T X in
fp32 over the quantized inputs in site order, N sequences (GPTQ's convention, spec section 1). Both are sums over
tokens, so statistics of several runs can be added.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_BLOCK = 512


def row_blocks(rows: int) -> range:
    """First rows of the blocks that are independent units of work."""
    return range(0, rows, ROW_BLOCK)


class HessianSum:
    """Sum of X^T X [channels, channels], its upper triangle built in blocks of rows."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, channels)
        self.sequences = 0

    def add_rows(self, start: int, x: Tensor) -> None:
        """Add one row block's share of x, fp32 [tokens, channels]."""
        stop = min(start + ROW_BLOCK, self.total.shape[0])
        self.total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def finish(self) -> Tensor:
        """H = (2 / N) X^T X, symmetric."""
        upper = self.total.triu_()
        upper += upper.triu(1).T
        return upper.mul_(2.0 / max(self.sequences, 1))


class CrossSum:
    """Sum of Y^T X [rows, channels] over the same tokens, built in blocks of rows."""

    def __init__(self, rows: int, channels: int) -> None:
        self.total = torch.zeros(rows, channels)
        self.sequences = 0

    def add_rows(self, start: int, y: Tensor, x: Tensor) -> None:
        """Add one row block's share of y^T x, fp32 [tokens, rows] and [tokens, channels]."""
        stop = min(start + ROW_BLOCK, self.total.shape[0])
        self.total[start:stop].addmm_(y[:, start:stop].T, x)

    def finish(self) -> Tensor:
        """(2 / N) Y^T X."""
        return self.total.mul_(2.0 / max(self.sequences, 1))


def channel_energy(x: Tensor) -> Tensor:
    """fp32 [tokens, channels] -> fp64 [channels], the sum of squares."""
    return x.double().square().sum(dim=0)


def wave_sequences(length: int) -> int:
    """Sequences whose site inputs are held in memory at a time: about 8192 tokens, whatever the number of threads."""
    return max(1, 8192 // length)
