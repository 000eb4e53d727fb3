"""Statistics of a site's input, summed in a fixed order so that the number of threads never shows.

Energy: the diagonal of X^T X in fp64, from the full-precision stream; it orders the channels. Hessian: (2/N) X^T X in
fp32 over the quantized inputs in site order, N sequences (GPTQ's convention, spec section 1). Both are sums over
tokens, so statistics of several runs can be added.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_BLOCK = 512


class HessianSum:
    """Sum of X^T X [channels, channels], its upper triangle built in blocks of rows that are independent units.

    With `cross`, beside it the sum of X_full^T X, X_full the inputs of the full-precision model for the same tokens.
    """

    def __init__(self, channels: int, cross: bool = False) -> None:
        self.total = torch.zeros(channels, channels)
        self.cross = torch.zeros(channels, channels) if cross else None
        self.sequences = 0

    def row_blocks(self) -> range:
        return range(0, self.total.shape[0], ROW_BLOCK)

    def add_rows(self, start: int, x: Tensor) -> None:
        """Add one row block's share of x, fp32 [tokens, channels]."""
        stop = min(start + ROW_BLOCK, self.total.shape[0])
        self.total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def add_cross(self, start: int, full: Tensor, x: Tensor) -> None:
        """Add one row block's share of full^T x, both fp32 [tokens, channels], to `cross`."""
        if self.cross is None:
            raise ValueError("this sum was not asked for a cross term")
        stop = min(start + ROW_BLOCK, self.cross.shape[0])
        self.cross[start:stop].addmm_(full[:, start:stop].T, x)

    def finish_cross(self) -> Tensor:
        """(2 / N) X_full^T X. Raises ValueError where none was asked for."""
        if self.cross is None:
            raise ValueError("this sum was made without the full-precision inputs")
        return self.cross.mul_(2.0 / max(self.sequences, 1))

    def finish(self) -> Tensor:
        """H = (2 / N) X^T X, symmetric."""
        upper = self.total.triu_()
        upper += upper.triu(1).T
        return upper.mul_(2.0 / max(self.sequences, 1))


def channel_energy(x: Tensor) -> Tensor:
    """fp32 [tokens, channels] -> fp64 [channels], the sum of squares."""
    return x.double().square().sum(dim=0)


def wave_sequences(length: int) -> int:
    """Sequences whose site inputs are held in memory at a time: about 8192 tokens, whatever the number of threads."""
    return max(1, 8192 // length)
