"""The dynamic activation quantizer of a site: 4 bits a channel, a step and a zero point a token and group.

Normal channels: codes over groups of the weights' size, with a zero point (BWA, eq. 3 and 4, errata E7 to E9) or
symmetric (Atom). With a zero point optionally *balanced* plane scales (BWA, appendix A, eq. 10 and 11, erratum E18):
the value of bit plane a is then a free number mu_a in place of 2^a mu. Outlier channels: symmetric int8, one
scale a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.recipe import ActivationRecipe

MINIMUM_STEP = 1e-5


@dataclass(frozen=True)
class QuantizedGroups:
    """Codes of the normal channels of some tokens, padded to whole groups.

    codes         fp32 integers [tokens, groups, group] in 0..2**bits - 1; padding has code 0
    step          fp32 [tokens, groups, 1], mu
    zero          fp32 integers [tokens, groups, 1], z
    plane_scales  fp32 [tokens, groups, planes], mu_a, or None when mu_a = 2^a mu
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    plane_scales: Tensor | None

    def values(self) -> Tensor:
        """xhat = sum_a mu_a b_a - mu z, fp32 [tokens, groups, group]."""
        if self.plane_scales is None:
            return self.step * (self.codes - self.zero)
        total = (-self.step * self.zero).expand_as(self.codes)
        for plane, bit in enumerate(bit_planes(self.codes, self.plane_scales.shape[-1])):
            total = torch.addcmul(total, self.plane_scales[..., plane : plane + 1], bit)
        return total


def bit_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Integers in fp32 -> their bits as fp32 zeros and ones, lowest plane first.

    In arithmetic: on the CPU, comparisons and integer shifts take several times as long.
    """
    planes = []
    rest = codes
    for plane in reversed(range(bits)):
        bit = (rest - (2**plane - 1)).clamp_(0, 1)
        rest = torch.sub(rest, bit, alpha=2**plane)
        planes.append(bit)
    return planes[::-1]


def quantize_groups(x: Tensor, group: int, recipe: ActivationRecipe) -> QuantizedGroups:
    """fp32 x [tokens, channels] in site order, normal channels only -> codes, steps and zero points.

    mu = (max - min) / (2**bits - 1), at least 1e-5; z = -round(min / mu), an integer that is not clamped, so groups
    whose values all have one sign are not clipped. A group of equal values has mu = 1e-5 and is exact to mu / 2.
    With `symmetric` mu = clip max|x| / (2**(bits - 1) - 1) and z = 2**(bits - 1): values -8 mu .. 7 mu for 4 bits, as
    Atom's code has them.
    """
    tokens, channels = x.shape
    padding = -channels % group
    if padding:
        # Repeating the last channel leaves the extremes of the ragged group as they are.
        x = torch.cat([x, x[:, -1:].expand(tokens, padding)], dim=1)
    x = x.unflatten(1, (-1, group))
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    top = 2**recipe.bits - 1
    if recipe.symmetric:
        step = (torch.maximum(-low, high) * recipe.clip / (top // 2)).clamp_min(MINIMUM_STEP)
        zero = torch.full_like(step, 2 ** (recipe.bits - 1))
    else:
        if recipe.clip != 1.0:
            cut = (high - low) * ((1.0 - recipe.clip) / 2.0)
            low, high = low + cut, high - cut
        step = ((high - low) / top).clamp_min(MINIMUM_STEP)
        zero = -torch.round(low / step)
    codes = torch.round(x / step).add_(zero).clamp_(0, top)
    if padding:
        codes[:, -1, group - padding :] = 0.0
    if recipe.balance == "none":
        return QuantizedGroups(codes, step, zero, None)
    return QuantizedGroups(codes, step, zero, _balanced_scales(x, codes, step, zero, channels, recipe))


def _balanced_scales(
    x: Tensor, codes: Tensor, step: Tensor, zero: Tensor, channels: int, recipe: ActivationRecipe
) -> Tensor:
    """mu_a = 2^a mu + average of 2^a b_a / c * (x - xhat): each plane takes its share of the rounding error.

    `support` averages over the channels where b_a = 1 (it makes the mean error of the group vanish), `literal` over
    all channels as printed in eq. 11. Channels of code 0 have no share.
    """
    groups, group = x.shape[1:]
    # (x - xhat) / c: one division serves all planes. Where c = 0, as in the padding, no plane has a bit.
    shared = (x - step * (codes - zero)).div_(codes.clamp_min(1))
    scales = []
    for plane, bit in enumerate(bit_planes(codes, recipe.bits)):
        total = (shared * bit).sum(dim=-1, keepdim=True)
        if recipe.balance == "support":
            count = bit.sum(dim=-1, keepdim=True).clamp_min(1)
        else:
            count = torch.full_like(total, group)
            count[:, -1] -= groups * group - channels
        scales.append(2.0**plane * (step + total / count))
    return torch.cat(scales, dim=-1)


def quantize_outliers(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [tokens, outliers] -> (integers -127..127 as fp32, scale fp32 [tokens, 1]): symmetric int8 a token."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127.0).clamp_min(1e-12)
    return torch.clamp(torch.round(x / scale), -127, 127), scale


# Values worked on at a time: their temporaries stay in the cache, which is worth a factor of ten.
CHUNK = 1 << 17


def quantize_site(x: Tensor, outliers: int, group: int, recipe: ActivationRecipe | None) -> Tensor:
    """Quantize and dequantize the input of a site: fp32 [tokens, channels] in site order -> fp32 of the same shape."""
    if recipe is None:
        return x
    rows = max(1, CHUNK // x.shape[1])
    parts = [_quantize_tokens(part, outliers, group, recipe) for part in x.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _quantize_tokens(x: Tensor, outliers: int, group: int, recipe: ActivationRecipe) -> Tensor:
    normal = x.shape[1] - outliers
    values = quantize_groups(x[:, :normal], group, recipe).values().flatten(1)[:, :normal]
    if not outliers:
        return values
    integers, scale = quantize_outliers(x[:, normal:])
    return torch.cat([values, integers * scale], dim=1)
