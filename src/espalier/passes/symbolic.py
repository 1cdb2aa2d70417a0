"""Polynomials with integer coefficients over named extents: what exporters compute with ``Shape``.

Symbols stand for extents of graph inputs, so every symbol is a positive integer.
"""

from __future__ import annotations

from collections.abc import Mapping

Monomial = tuple[str, ...]


class Expr:
    """An integer polynomial, e.g. ``2*batch*seq + 1``. Immutable, hashable."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms: tuple[tuple[Monomial, int], ...] = tuple(sorted((m, c) for m, c in terms.items() if c))

    @staticmethod
    def of(value: int | str | Expr) -> Expr:
        """An expression of a number or of a symbol's name."""
        if isinstance(value, Expr):
            return value
        if isinstance(value, str):
            return Expr({(value,): 1})
        return Expr({(): int(value)})

    @property
    def number(self) -> int | None:
        """The value, when no symbol is left."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    def symbols(self) -> set[str]:
        return {name for monomial, _ in self.terms for name in monomial}

    def at(self, values: Mapping[str, int]) -> int:
        """The value when the symbols have these values; KeyError if one is missing."""
        total = 0
        for monomial, coefficient in self.terms:
            product = coefficient
            for name in monomial:
                product *= values[name]
            total += product
        return total

    def rename(self, names: Mapping[str, str | int]) -> Expr:
        """The expression with symbols replaced by other symbols or numbers."""
        total = Expr({})
        for monomial, coefficient in self.terms:
            product = Expr.of(coefficient)
            for name in monomial:
                product = product * Expr.of(names.get(name, name))
            total = total + product
        return total

    def __add__(self, other: int | Expr) -> Expr:
        terms = dict(self.terms)
        for monomial, coefficient in Expr.of(other).terms:
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Expr(terms)

    __radd__ = __add__

    def __neg__(self) -> Expr:
        return Expr({m: -c for m, c in self.terms})

    def __sub__(self, other: int | Expr) -> Expr:
        return self + (-Expr.of(other))

    def __rsub__(self, other: int | Expr) -> Expr:
        return Expr.of(other) - self

    def __mul__(self, other: int | Expr) -> Expr:
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in Expr.of(other).terms:
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Expr(terms)

    __rmul__ = __mul__

    def over(self, other: int | Expr) -> Expr | None:
        """The exact quotient by a monomial; None when it does not divide evenly."""
        divisor = Expr.of(other)
        if divisor == self and self.terms:
            return Expr.of(1)
        if len(divisor.terms) != 1:
            return None
        monomial, coefficient = divisor.terms[0]
        terms: dict[Monomial, int] = {}
        for mine, number in self.terms:
            left = list(mine)
            for name in monomial:
                if name not in left:
                    return None
                left.remove(name)
            if number % coefficient:
                return None
            terms[tuple(left)] = number // coefficient
        return Expr(terms)

    def never_equals(self, other: int | Expr) -> bool:
        """True when no positive values of the symbols make the two equal."""
        difference = self - other
        number = difference.number
        if number is not None:
            return number != 0
        # Every monomial is at least 1, so the sum of same-signed coefficients bounds the difference away from zero.
        constant = dict(difference.terms).get((), 0)
        others = [c for m, c in difference.terms if m]
        if all(c > 0 for c in others):
            return constant + sum(others) > 0
        if all(c < 0 for c in others):
            return constant + sum(others) < 0
        return False

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int | Expr):
            return self.terms == Expr.of(other).terms
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.terms)

    def __repr__(self) -> str:
        if not self.terms:
            return "0"
        return " + ".join("*".join([*([str(c)] if c != 1 or not m else []), *m]) for m, c in self.terms)


ONE = Expr.of(1)
