"""Hadamard matrices of every size that current models have, and the fast products with them.

A size n is taken apart into a power of two and *dense* factors, orders for which Paley's constructions have a matrix
(transforms/paley.py): H_n = H_m1 (x) H_m2 (x) ... (x) S with S Sylvester's matrix of order 2^a. So a product costs `a`
butterflies and the dense factors, not n^2: 11008 = 344 * 32, 8960 = 28 * 20 * 16. All factors are symmetric with
orthogonal rows, so H_n / sqrt(n) is symmetric and orthogonal: it is its own inverse.

Which factors are taken is part of what an artifact means: a size must give the same matrix in every version.

QuaRot (NeurIPS 2024, section 3) has a fixed list of small matrices; GBS (arXiv 2504.13989, section 4) builds Paley's
for prime orders alone. Prime powers and products of several dense factors serve more sizes, with smaller factors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.errors import TransformError
from bitwright.transforms.paley import construction, paley

# Larger dense factors exist, but a product with them costs more than the linear that it would help.
LARGEST_DENSE = 1024


@dataclass(frozen=True)
class Factors:
    """size = product of `dense` times `power`, a power of two; H is their Kronecker product in this order."""

    size: int
    dense: tuple[int, ...]
    power: int

    def __str__(self) -> str:
        return " x ".join(str(factor) for factor in (*self.dense, self.power) if factor > 1) or "1"


def factors(size: int) -> Factors:
    """The cheapest way to build a Hadamard matrix of this size.

    Raises TransformError, with a way out, where Sylvester, Paley I and II and Kronecker products give none.
    """
    found = _cheapest(size)
    if found is None:
        block, larger = largest_block(size), next_size(size)
        raise TransformError(
            f"no Hadamard matrix of size {size} can be built by Sylvester's, Paley's and Kronecker's constructions with"
            f" factors up to {LARGEST_DENSE}; use a block-local transform (blocks of {block} divide it) or expand the"
            f" dimension with zeros to {larger} = {factors(larger)}"
        )
    return found


def constructible(size: int) -> bool:
    """Whether `factors` finds a way."""
    return _cheapest(size) is not None


def smallest_factor(size: int) -> int | None:
    """The least single dense order m (1: none needed) such that size / m is a power of two; None where there is none.

    What a transform with one dense factor, such as QuaRot's, needs; `factors` may find several smaller ones.
    """
    odd, power = _odd_part(size)
    if odd == 1:
        return 1
    return next((m for m in _orders(odd, power)), None)


def largest_block(columns: int, most: int | None = None, power_of_two: bool = False) -> int:
    """The largest divisor of `columns`, at most `most`, that has a Hadamard matrix: the block of a local transform."""
    limit = columns if most is None else min(most, columns)
    for block in range(limit, 0, -1):
        if columns % block == 0 and (not block & (block - 1) if power_of_two else constructible(block)):
            return block
    raise ValueError(f"there is no block of at most {most} in {columns} columns")


def next_size(size: int) -> int:
    """The least constructible size from `size` on: what the dimension can be expanded to with zeros (GBS)."""
    while not constructible(size):
        size += 1
    return size


@lru_cache(maxsize=64)
def dense_factor(order: int) -> Tensor:
    """int8 [order, order], one of the dense factors: made once, not to be changed."""
    return paley(order)


def matrix(size: int) -> Tensor:
    """H, int8 [size, size] of 1 and -1, symmetric, H H = size I. Raises TransformError as `factors` does."""
    parts = factors(size)
    result = torch.ones(1, 1, dtype=torch.int8)
    for order in parts.dense:
        result = torch.kron(result, dense_factor(order))
    for _ in range(parts.power.bit_length() - 1):
        result = torch.kron(result, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    return result


def transform(x: Tensor, block: int) -> Tensor:
    """Float [..., columns] -> the same shape and dtype, each `block` consecutive columns times H / sqrt(block).

    Its own inverse. In any float dtype, on any device, by torch alone: for weights, offline. The op
    `bitwright.runtime.hadamard_ops.hadamard` is for activations. Raises ValueError where block does not divide columns.
    """
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of blocks of {block}")
    parts = factors(block)
    y = butterflies(x * (1.0 / math.sqrt(block)), parts.power)
    for order, inner in dense_steps(parts):
        y = (dense_factor(order).to(y) @ y.unflatten(-1, (-1, order, inner))).flatten(-3)
    return y


def dense_steps(parts: Factors) -> Iterator[tuple[int, int]]:
    """(order, inner) of each dense factor: it acts on the middle axis of the columns seen as [-1, order, inner]."""
    inner = parts.size
    for order in parts.dense:
        inner //= order
        yield order, inner


def butterflies(y: Tensor, power: int) -> Tensor:
    """[..., columns] -> each `power` consecutive columns times Sylvester's matrix, unscaled: distance 1, 2, 4, ..."""
    distance = 1
    while distance < power:
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return y


@dataclass(frozen=True)
class RandomHadamard:
    """Q = D H / sqrt(block), D random signs: QuaRot's randomized rotation (section 3.1) of row vectors, x -> x Q.

    The signs keep inputs that line up with a row of H from meeting in one output. They follow from `seed` and nothing
    else: not from torch's generators, which may change.
    """

    columns: int
    block: int
    seed: int

    def signs(self, like: Tensor) -> Tensor:
        """[columns] of 1 and -1 in the dtype and on the device of `like`."""
        count = -(-self.columns // 8)
        digest = hashlib.shake_256(f"bitwright hadamard {self.seed}".encode()).digest(count)
        bits = [(byte >> place & 1) for byte in digest for place in range(8)]
        return (1 - 2 * torch.tensor(bits[: self.columns])).to(like)

    def apply(self, x: Tensor) -> Tensor:
        """x Q over the last axis: of activations [..., columns], or of weights [rows, columns] to undo it in them."""
        return transform(x * self.signs(x), self.block)

    def invert(self, y: Tensor) -> Tensor:
        """y Q^T, so that invert(apply(x)) = x up to rounding."""
        return transform(y, self.block) * self.signs(y)


def _odd_part(size: int) -> tuple[int, int]:
    """size = odd * 2^power."""
    if size < 1:
        raise ValueError(f"a size is at least 1; found {size}")
    power = (size & -size).bit_length() - 1
    return size >> power, power


def _orders(odd: int, power: int) -> Iterator[int]:
    """Orders odd * 2^e, e <= power, of Paley's constructions, the smallest first."""
    for e in range(2, power + 1):
        if odd << e <= LARGEST_DENSE and construction(odd << e):
            yield odd << e


@lru_cache(maxsize=4096)
def _cheapest(size: int) -> Factors | None:
    odd, power = _odd_part(size)
    best = _split(odd, power)
    if best is None:
        return None
    dense = tuple(sorted(best[1], reverse=True))
    return Factors(size, dense, size // math.prod(dense))


def _split(odd: int, power: int) -> tuple[float, tuple[int, ...]] | None:
    """(cost, dense orders) of the cheapest product of dense orders and 2^rest for the size odd * 2^power.

    The cost is in additions a value: one a butterfly; of a dense factor, in the kernel (csrc/decoder.h), a quarter of
    its order and four for its tables.
    """
    if odd == 1:
        return power, ()
    best: tuple[float, tuple[int, ...]] | None = None
    for divisor in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        for order in _orders(divisor, power):
            rest = _split(odd // divisor, power - ((order // divisor).bit_length() - 1))
            if rest is not None:
                option = (order / 4 + 4 + rest[0], tuple(sorted((order, *rest[1]))))
                best = option if best is None else min(best, option)
    return best
