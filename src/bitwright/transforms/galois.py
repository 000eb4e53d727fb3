"""Finite fields of q = p^k elements, as far as Paley's constructions need them: sums and squares.

An element is a number 0 .. q - 1 whose digits to the base p are the coefficients of a polynomial, the constant one
first. Polynomials are added digit by digit and multiplied modulo the first irreducible polynomial of degree k, so that
a field is the same in every version: artifacts depend on the matrices that are built from it. Own code, because a
hundred lines do, and the libraries that know finite fields bring compilers along.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in itertools.takewhile(lambda d: d * d <= q, itertools.count(2)) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def irreducible(p: int, k: int) -> list[int]:
    """The monic irreducible polynomial of degree k over GF(p): k + 1 coefficients, the constant one first.

    Of all there are the first, its lower coefficients read as a number to the base p.
    """
    for number in range(p**k):
        candidate = [*_digits(number, p, k), 1]
        divisors = ([*_digits(lower, p, degree), 1] for degree in range(1, k // 2 + 1) for lower in range(p**degree))
        if not any(not any(_remainder(candidate, divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError(f"there is an irreducible polynomial of every degree over GF({p})")


def character(q: int) -> Tensor:
    """int8 [q]: 0 for zero, 1 for the other squares of GF(q), -1 for the rest; q an odd prime power."""
    p, k = _field(q)
    modulus = irreducible(p, k)
    values = torch.full((q,), -1, dtype=torch.int8)
    for element in range(q):
        values[_square(_digits(element, p, k), modulus, p)] = 1
    values[0] = 0
    return values


def sums(q: int, sign: int = 1) -> Tensor:
    """int64 [q, q]: a + b in GF(q), or a - b with `sign` -1."""
    p, k = _field(q)
    elements = torch.arange(q)
    total = torch.zeros(q, q, dtype=torch.int64)
    for place in range(k):
        digit = elements // p**place % p
        total += (digit.unsqueeze(1) + sign * digit) % p * p**place
    return total


def _field(q: int) -> tuple[int, int]:
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"{q} is no power of an odd prime")
    return found


def _digits(number: int, p: int, count: int) -> list[int]:
    return [number // p**place % p for place in range(count)]


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """The remainder modulo a monic divisor, one coefficient for each of its lower ones."""
    rest = list(dividend)
    degree = len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for place, coefficient in enumerate(divisor):
            rest[top - degree + place] = (rest[top - degree + place] - lead * coefficient) % p
    return rest[:degree]


def _square(element: list[int], modulus: list[int], p: int) -> int:
    product = [0] * (2 * len(element) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(element), repeat=2):
        product[i + j] = (product[i + j] + a * b) % p
    return sum(digit * p**place for place, digit in enumerate(_remainder(product, modulus, p)))
