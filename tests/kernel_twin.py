"""The native products once more in torch, in float64 where they count and rounded where they round.

csrc/product/kernels.h and csrc/planes/kernels.h say which float operations are done and in which order; this does the
same ones from the stored matrix, so that packed and simulated models can be compared without the noise of another order
of sums. Integer sums are exact in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers
from bitwright.activations.quantizer import bit_planes
from bitwright.codebook import CodebookMatrix
from bitwright.recipe import ActivationRecipe


def rounded(x: Tensor) -> Tensor:
    """float64 -> what fp32 keeps of it, as float64."""
    return x.to(torch.float32).double()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32(a b + c): the product of two fp32 numbers is exact in float64."""
    return rounded(a * b + c)


def kernel_linear(x: Tensor, matrix: CodebookMatrix, recipe: ActivationRecipe, bias: Tensor | None) -> Tensor:
    """x fp32 [tokens, columns] in the model's channel order -> fp32 [tokens, rows]."""
    matrix = matrix.expanded()
    assert matrix.scales is not None
    if matrix.permutation is not None:
        x = x[:, matrix.permutation]
    normal, group, groups = matrix.normal_columns, matrix.group, matrix.scales.shape[1]
    quantized = quantize_groups(x[:, :normal], group, recipe)
    inside = torch.nn.functional.pad(torch.ones(normal), (0, groups * group - normal)).view(groups, group).double()
    codes = torch.nn.functional.pad(matrix.codes(), (0, groups * group - normal)).view(matrix.rows, groups, group)
    levels = torch.gather(matrix.integer_levels().double(), 2, codes.to(torch.int64)) * inside
    level_sums = levels.sum(dim=-1).T  # [groups, rows]
    scales = matrix.scales.double().T
    step, zero = quantized.step.double(), quantized.zero.double()  # [tokens, groups, 1]
    if recipe.balance == "none":
        clamped = zero.clamp(0, 2**recipe.bits - 1)
        sums = rounded(torch.einsum("tgc,rgc->tgr", (quantized.codes.double() - clamped) * inside, levels))
        factors, rest = rounded(scales * step), clamped - zero
    else:
        offset = rounded(-rounded(step * zero))
        free = plane_scales(x[:, :normal], quantized.codes, quantized.step, quantized.zero, recipe).double()
        counts = [torch.einsum("tgc,rgc->tgr", b.double(), levels) for b in bit_planes(quantized.codes, 4)]
    f = torch.zeros(len(x), matrix.rows, dtype=torch.float64)
    for g in range(groups):
        if recipe.balance == "none":
            f = fma(sums[:, g], factors[:, g], f)
            more = fma(level_sums[g], rounded(factors[:, g] * rest[:, g]), f)
            f = torch.where(rest[:, g] != 0, more, f)
        else:
            t = rounded(counts[0][:, g] * free[:, g, 0:1])
            for plane in range(1, 4):
                t = fma(counts[plane][:, g], free[:, g, plane : plane + 1], t)
            f = fma(fma(level_sums[g], offset[:, g], t), scales[g], f)
    if matrix.outliers is not None and matrix.outlier_scales is not None:
        integers, scale = quantize_outliers(x[:, normal:])
        f = fma(integers.double() @ matrix.outliers.double().T, rounded(matrix.outlier_scales.double() * scale), f)
    return f.float() if bias is None else f.float() + bias


def plane_scales(x: Tensor, codes: Tensor, step: Tensor, zero: Tensor, recipe: ActivationRecipe) -> Tensor:
    """Balanced plane scales fp32 [tokens, groups, 4], their sums in eight parts (channel i in part i mod 8)."""
    tokens, channels = x.shape
    groups, group = codes.shape[1:]
    padded = torch.nn.functional.pad(x, (0, groups * group - channels)).view(tokens, groups, group)
    shared = (padded - step * (codes - zero)) / codes.clamp_min(1)
    found = []
    for plane, bit in enumerate(bit_planes(codes, 4)):
        terms = torch.where(bit > 0, shared, 0.0).unflatten(-1, (-1, 8))
        s = torch.zeros(tokens, groups, 8)
        for part in terms.unbind(dim=2):
            s = s + part
        total = ((s[..., 0] + s[..., 4]) + (s[..., 2] + s[..., 6])) + (
            (s[..., 1] + s[..., 5]) + (s[..., 3] + s[..., 7])
        )
        if recipe.balance == "support":
            count = bit.sum(dim=-1).clamp_min(1)
        else:
            count = torch.full_like(total, group)
            count[:, -1] -= groups * group - channels
        found.append(2.0**plane * (step[..., 0] + total / count))
    return torch.stack(found, dim=-1)
