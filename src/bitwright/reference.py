"""The quantized linear, slow and readable: BWA's equations 1 to 7 with planes, counts and nothing fused.

This is the executable specification that kernels are tested against. One output is

    y_j = sum over groups l of
              sum_a mu_{l,a} (alpha_1 v_1 + beta_1 r_1 + alpha_0 v_0 + beta_0 r_0)  -  mu_l z_l S_{j,l}
          + s_j s_x sum over outlier channels of w8 x8  + bias_j

with the counts, over the 128 channels of a group and for the plane b_a of the activation codes,

    v_1 = popcount(q AND b_a AND m)   v_0 = popcount(q AND b_a AND NOT m)
    r_1 = popcount(b_a AND m)         r_0 = popcount(b_a AND NOT m)

q is the sign plane, m the membership plane (1: the set s = 1, erratum E11), level(q, m) = alpha_m q + beta_m, and
S_{j,l} the sum of the dequantized weights of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.activations import quantize_groups, quantize_outliers
from bitwright.codebook import CodebookMatrix
from bitwright.packing import unpack_plane
from bitwright.recipe import ActivationRecipe


def plane_counts(q: Tensor, m: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v1, v0, r1, r0) of boolean tensors that broadcast; the counts run over the last axis (eq. 7)."""
    q, m, b = q.bool(), m.bool(), b.bool()

    def count(bits: Tensor) -> Tensor:
        return bits.sum(dim=-1)

    return count(q & b & m), count(q & b & ~m), count(b & m), count(b & ~m)


def quantized_linear(x: Tensor, matrix: CodebookMatrix, recipe: ActivationRecipe, bias: Tensor | None = None) -> Tensor:
    """x [tokens, columns] in the model's channel order -> y fp64 [tokens, rows], by the sums above.

    For codebooks of two bits: any four levels are two affine pairs.
    """
    if matrix.bits != 2:
        raise ValueError(f"the 1+1 form needs 2-bit codes, found {matrix.bits}")
    x = x.to(torch.float32)
    if matrix.permutation is not None:
        x = x[:, matrix.permutation]
    matrix = matrix.expanded()
    assert matrix.scales is not None
    normal = matrix.normal_columns
    groups, width = matrix.scales.shape[1], matrix.group
    padding = groups * width - normal

    def grouped(plane: Tensor) -> Tensor:
        bits = torch.nn.functional.pad(unpack_plane(plane, normal), (0, padding))
        return bits.view(matrix.rows, groups, width)

    q, m = grouped(matrix.planes[0]), grouped(matrix.planes[1])
    level = matrix.integer_levels().double() * matrix.scales.double().unsqueeze(-1)  # by code q + 2 m
    beta0, alpha0 = level[..., 0], level[..., 1] - level[..., 0]
    beta1, alpha1 = level[..., 2], level[..., 3] - level[..., 2]
    inside = (torch.arange(groups * width) < normal).view(groups, width)
    everything = plane_counts(q, m, inside.expand_as(q))
    group_sum = alpha1 * everything[0] + beta1 * everything[2] + alpha0 * everything[1] + beta0 * everything[3]

    quantized = quantize_groups(x[:, :normal], width, recipe)
    codes = quantized.codes.to(torch.int64)
    y = torch.zeros(x.shape[0], matrix.rows, dtype=torch.float64)
    for token in range(x.shape[0]):
        step, zero = quantized.step[token, :, 0].double(), quantized.zero[token, :, 0].double()
        for plane in range(recipe.bits):
            b = (codes[token] >> plane) & 1
            v1, v0, r1, r0 = plane_counts(q, m, b.expand_as(q))
            if quantized.plane_scales is None:
                scale = step * 2.0**plane
            else:
                scale = quantized.plane_scales[token, :, plane].double()
            y[token] += ((alpha1 * v1 + beta1 * r1 + alpha0 * v0 + beta0 * r0) * scale).sum(dim=-1)
        y[token] -= (group_sum * step * zero).sum(dim=-1)
    if matrix.outliers is not None and matrix.outlier_scales is not None:
        integers, scale_x = quantize_outliers(x[:, normal:])
        products = integers.double() @ matrix.outliers.double().T
        y += products * scale_x.double() * matrix.outlier_scales.double()
    return y if bias is None else y + bias.double()


def level_coefficients(levels: Tensor) -> Tensor:
    """Integers [..., 2**k] by code -> the integers [..., 2**k] that weigh products of the code's bits.

    Any 2**k levels are a sum over sets S of bits: level(code) = sum_S coefficient_S prod_(i in S) bit_i, where S is
    counted as a code is, bit i for plane i. Equally spaced levels, code - zero, have 2**i for the single bits, -zero
    for the empty set, and no more: the bit-serial product of ABQ-LLM. Four free levels have BWA's q, m and q AND m.
    """
    found = levels.to(torch.int64).clone()
    bits = found.shape[-1].bit_length() - 1
    for bit in range(bits):  # Moebius inversion, one bit after the other
        pairs = found.unflatten(-1, (-1, 2, 2**bit))
        pairs[..., 1, :] -= pairs[..., 0, :]
    return found


def plane_sums(planes: Tensor, coefficients: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Sum of level times code, by AND and popcount of planes alone (ABQ-LLM, AAAI 2025).

    planes        bool [k, rows, groups, width], of the weights
    coefficients  int64 [rows, groups, 2**k], `level_coefficients`
    codes         int64 [groups, width], 0..2**bits - 1: of one token
    ->            int64 [rows, groups] = sum_S coefficient_S sum_j 2**j popcount(AND of the planes in S AND plane j)
    """
    total = torch.zeros(coefficients.shape[:2], dtype=torch.int64)
    for subset in range(coefficients.shape[-1]):
        weight = coefficients[..., subset]
        if not weight.any():
            continue
        chosen = [plane for bit, plane in enumerate(planes) if subset >> bit & 1]
        for plane in range(bits):
            ones = ((codes >> plane) & 1).bool().expand_as(planes[0])
            for other in chosen:
                ones = ones & other
            total += weight * ones.sum(dim=-1) << plane
    return total


def plane_linear(x: Tensor, matrix: CodebookMatrix, recipe: ActivationRecipe, bias: Tensor | None = None) -> Tensor:
    """As `quantized_linear`, for codes of 1 to 8 bits and inputs of 1 to 8, whose planes have the values 2^a mu.

    One output is sum over groups of scale mu (sum of level c - z sum of level), both sums exact integers, and the int8
    part. Raises ValueError for balanced plane scales.
    """
    if recipe.balance != "none":
        raise ValueError(f"planes of 2^a mu alone; found balance = {recipe.balance!r}")
    x = x.to(torch.float32)
    if matrix.permutation is not None:
        x = x[:, matrix.permutation]
    matrix = matrix.expanded()
    assert matrix.scales is not None
    normal, width, groups = matrix.normal_columns, matrix.group, matrix.scales.shape[1]

    def grouped(channels: Tensor) -> Tensor:
        return torch.nn.functional.pad(channels, (0, groups * width - normal)).unflatten(-1, (groups, width))

    planes = torch.stack([grouped(unpack_plane(plane, normal)).bool() for plane in matrix.planes])
    coefficients = level_coefficients(matrix.integer_levels())
    level_sums = plane_sums(planes, coefficients, grouped(torch.ones(normal, dtype=torch.int64)), 1)
    quantized = quantize_groups(x[:, :normal], width, recipe)
    y = torch.zeros(x.shape[0], matrix.rows, dtype=torch.float64)
    for token, codes in enumerate(quantized.codes.to(torch.int64)):
        step, zero = quantized.step[token, :, 0].double(), quantized.zero[token, :, 0].double()
        sums = plane_sums(planes, coefficients, codes, recipe.bits).double() - zero * level_sums.double()
        y[token] = (sums * step * matrix.scales.double()).sum(dim=-1)
    if matrix.outliers is not None and matrix.outlier_scales is not None:
        integers, scale_x = quantize_outliers(x[:, normal:])
        y += integers.double() @ matrix.outliers.double().T * scale_x.double() * matrix.outlier_scales.double()
    return y if bias is None else y + bias.double()
