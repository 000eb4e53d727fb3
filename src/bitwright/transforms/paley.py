"""Paley's two constructions of Hadamard matrices over any odd prime power, in their symmetric forms.

With chi the quadratic character of GF(q) (1 for squares, -1 for the others, 0 for zero):

- construction I, order q + 1, q = 3 mod 4: a border of ones around chi(a + b), with -1 where a + b = 0;
- construction II, order 2 (q + 1), q = 1 mod 4: C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C the border
  of ones around chi(a - b), symmetric because -1 is a square, zero on the diagonal.

The first is usually written with chi(a - b) and a border of both signs; permuting and negating rows gives this one. The
point of it: H equals its transpose, so that H / sqrt(n) is its own inverse, like Sylvester's, and one transform serves
both ways. Where both constructions give an order (12 from 11 and from 5), the first is taken.

Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.transforms.galois import character, prime_power, sums


def construction(order: int) -> int | None:
    """1 or 2, whichever of Paley's constructions gives a matrix of this order; None where neither does."""
    if order % 4:
        return None
    if prime_power(order - 1):
        return 1  # 4 | order: the prime power order - 1 is 3 mod 4
    q = order // 2 - 1
    return 2 if q % 4 == 1 and prime_power(q) else None


def paley(order: int) -> Tensor:
    """int8 [order, order] of 1 and -1, symmetric, rows orthogonal. Raises ValueError where `construction` is None."""
    kind = construction(order)
    if kind is None:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    if kind == 1:
        matrix = _bordered(order - 1, sign=1)
        matrix[matrix == 0] = -1
        matrix[0, 0] = 1
        return matrix
    core = _bordered(order // 2 - 1, sign=-1)
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    corner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, ones) + torch.kron(torch.eye(len(core), dtype=torch.int8), corner)


def _bordered(q: int, sign: int) -> Tensor:
    """int8 [q + 1, q + 1]: chi(a + sign b) of GF(q) behind a row and a column of ones, 0 in the corner."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character(q)[sums(q, sign)]
    return bordered
