"""What tuning changes, as real numbers and as what is stored: levels, scales, int8 columns, norms and biases.

Adam moves real numbers; every forward pass uses what would be stored of them, and gradients go straight through the
rounding. A weight is the level of its code, so the gradient of a level is the sum of those of its weights.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, code_of_rank, group_count, select_levels, symmetric_levels
from bitwright.packing import pack_planes
from bitwright.recipe import TuneRecipe
from bitwright.solvers.feedback import quantize_outlier_columns
from bitwright.solvers.levels import FP16_MAX, GridLevels, nearest, snap

Values = dict[str, Tensor]

SMALLEST = 6e-8  # of fp16, above 0
INSIDE = 0.9  # share of the way to the middle of two levels that a weight may stand off its own


class Tuned(Protocol):
    """A tensor of the block under tuning. `values` are the real numbers that an optimizer moves in place."""

    values: Values

    def rates(self, recipe: TuneRecipe) -> dict[str, float]:
        """Learning rate of each of `values`."""

    def stored(self) -> Tensor:
        """fp32: the tensor that the stored form of `values` stands for."""

    def settle(self) -> None:
        """Put `values` in order after a step."""

    def pull(self, gradient: Tensor) -> Values:
        """Gradient by `stored` -> gradients by `values`, straight through the rounding."""


class TunedVector:
    """A norm's weights or a bias, rounded to the dtype that the shard has for it."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # A power of two: what was not moved stays what it was, to the bit.
        self.unit = tensor.abs().mean().clamp_min(1e-12).log2().round().exp2()
        self.values = {"vector": tensor / self.unit}

    def rates(self, recipe: TuneRecipe) -> dict[str, float]:
        return {"vector": recipe.vectors}

    def stored(self) -> Tensor:
        return (self.values["vector"] * self.unit).to(self.dtype).float()

    def settle(self) -> None: ...

    def pull(self, gradient: Tensor) -> Values:
        return {"vector": gradient * self.unit}


class TunedMatrix:
    """A linear in site order: levels or scales a group, the int8 columns, and with `target` the codes.

    All values are shares of the largest level of a group, or of the largest weight of the int8 columns of a row: one
    rate suits them all. Levels keep the order of their ranks.

    target  fp32 [rows, columns] or None: the original weights. Each normal one, drawn towards the level of its code
            until that is the nearest, is a value; from then on codes are those of the nearest levels (straight-through)
    """

    def __init__(self, matrix: CodebookMatrix, target: Tensor | None = None) -> None:
        if matrix.kind == "shared" or matrix.scales is None:
            raise ValueError(f"a table for a whole matrix is not tuned; found kind {matrix.kind!r}")
        self.matrix = matrix
        self.groups = group_count(matrix.normal_columns, matrix.group)
        self.codes = self._grouped(matrix.codes())
        self.values: Values = {}
        if matrix.kind == "free":
            assert matrix.levels is not None
            order = code_of_rank(matrix.bits).long()
            self.rank_of = torch.empty_like(order)
            self.rank_of[order] = torch.arange(len(order))
            levels = matrix.levels.float() * matrix.scales.float().unsqueeze(-1)
            self.unit = levels.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            self.values["levels"] = levels[..., order] / self.unit
        else:
            self.unit = matrix.scales.float().unsqueeze(-1)
            if matrix.zeros is None:
                self.offsets = symmetric_levels(matrix.bits).float()[self.codes.long()]
            else:
                self.offsets = self.codes.float() - matrix.zeros.float().unsqueeze(-1)
            self.values["levels"] = torch.ones_like(self.unit)
        if matrix.outliers is not None:
            assert matrix.outlier_scales is not None
            scales = matrix.outlier_scales.float().unsqueeze(1)
            self.outlier_unit = 127 * scales
            self.values["outliers"] = matrix.outliers.float() * scales / self.outlier_unit
        if target is not None:
            self.values["weights"] = self._drawn(target)
            self.settle()

    def settle(self) -> None:
        """After a step: levels in the order of their ranks again, codes of the nearest levels where they are tuned."""
        if self.matrix.kind == "free":
            levels = self.values["levels"]
            levels.copy_(levels.sort(dim=-1).values)
        if "weights" in self.values:
            weights = (self.values["weights"] * self.unit).flatten(0, 1)
            ranks = nearest(weights, self._grid().values())
            self.codes = code_of_rank(self.matrix.bits)[ranks.long()].view(self.codes.shape)

    def _grid(self) -> GridLevels:
        """Grid levels of all rows and groups, one behind the other."""
        return snap((self.values["levels"] * self.unit).flatten(0, 1))

    def _grouped(self, columns: Tensor) -> Tensor:
        """[rows, normal] -> [rows, groups, group], zeros behind the last one."""
        padding = self.groups * self.matrix.group - columns.shape[1]
        return torch.nn.functional.pad(columns, (0, padding)).unflatten(1, (self.groups, self.matrix.group))

    def _drawn(self, target: Tensor) -> Tensor:
        levels = self.values["levels"]
        ranks = self.rank_of[self.codes.long()]
        middles = (levels[..., 1:] + levels[..., :-1]) / 2
        far = torch.full_like(levels[..., :1], torch.inf)
        own = levels.gather(-1, ranks)
        low, high = (torch.cat(edges, dim=-1).gather(-1, ranks) - own for edges in ([-far, middles], [middles, far]))
        wanted = self._grouped(target[:, : self.matrix.normal_columns]) / self.unit - own
        return own + torch.minimum(torch.maximum(wanted, INSIDE * low), INSIDE * high)

    def rates(self, recipe: TuneRecipe) -> dict[str, float]:
        known = {"levels": recipe.levels, "outliers": recipe.outliers, "weights": recipe.codes}
        return {name: known[name] for name in self.values}

    def snapped(self) -> CodebookMatrix:
        """What is stored."""
        matrix = self._snapped()
        if "weights" not in self.values:
            return matrix
        codes = self.codes.flatten(1)[:, : matrix.normal_columns].contiguous()
        return dataclasses.replace(matrix, planes=pack_planes(codes, matrix.bits))

    def _snapped(self) -> CodebookMatrix:
        """Levels, scales and int8 columns of `snapped`; its codes in `self.codes`."""
        if self.matrix.kind == "free":
            grid = self._grid()
            shape = self.unit.shape[:2]
            levels = grid.integers.view(*shape, -1)[..., self.rank_of].contiguous()
            fresh = dataclasses.replace(self.matrix, levels=levels, scales=grid.scale.view(shape))
        else:
            real = (self.values["levels"] * self.unit).squeeze(-1)
            scales = real.clamp(SMALLEST, FP16_MAX).to(torch.float16)
            fresh = dataclasses.replace(self.matrix, scales=scales)
        if "outliers" in self.values:
            integers, scales = quantize_outlier_columns(self.values["outliers"] * self.outlier_unit)
            fresh = dataclasses.replace(fresh, outliers=integers, outlier_scales=scales)
        return fresh

    def stored(self) -> Tensor:
        matrix = self._snapped()
        assert matrix.scales is not None
        scales = matrix.scales.float().unsqueeze(-1)
        if matrix.levels is not None:
            normal = select_levels(matrix.levels.float() * scales, self.codes)
        else:
            normal = self.offsets * scales
        weights = normal.flatten(1)[:, : matrix.normal_columns]
        if matrix.outliers is None or matrix.outlier_scales is None:
            return weights.contiguous()
        return torch.cat([weights, matrix.outliers.float() * matrix.outlier_scales.float().unsqueeze(1)], dim=1)

    def pull(self, gradient: Tensor) -> Values:
        normal = self._grouped(gradient[:, : self.matrix.normal_columns])
        if self.matrix.kind == "free":
            sums = [(normal * (self.codes == code)).sum(dim=-1) for code in code_of_rank(self.matrix.bits)]
            levels = torch.stack(sums, dim=-1)
        else:
            levels = (normal * self.offsets).sum(dim=-1, keepdim=True)
        found = {"levels": levels * self.unit}
        if "outliers" in self.values:
            found["outliers"] = gradient[:, self.matrix.normal_columns :] * self.outlier_unit
        if "weights" in self.values:
            found["weights"] = normal * self.unit
        return found
