"""Is an expression zero? Exact where the answer is yes, by a counterexample in numbers where it is no."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.symbolic.branches import Branch, Datum
from explaind_core.symbolic.tensor import mean

__all__ = ["as_symbols", "is_nonnegative", "is_zero", "linear_coefficients", "tidy"]

#: A point where hyper-parameters are valid: learning rates and averages between 0 and 1.
_VALID = sympy.Rational(9, 10)


def as_symbols(expr: Any) -> Any:
    """``expr`` with a symbol in the place of every mean over the tensor: given numbers, like frozen states."""
    return expr.xreplace(
        {m: Datum(str(m), **({"nonnegative": True} if m.is_nonnegative else {"real": True})) for m in expr.atoms(mean)}
    )


def linear_coefficients(expr: Any, inputs: Sequence[Any]) -> list[Any] | None:
    """The coefficient of each input, then the rest; None where ``expr`` is not linear in them.

    Example:
        >>> x, y, a = Datum("x"), Datum("y"), sympy.Symbol("a")
        >>> linear_coefficients(a * (x + 2) - y, [x, y])
        [a, -1, 2*a]
    """
    found = [sympy.diff(expr, x) if expr.has(x) else sympy.S.Zero for x in inputs]
    if any(c.has(*inputs) for c in found):
        return None
    return [*found, expr.xreplace(dict.fromkeys(inputs, sympy.S.Zero))]


def is_nonnegative(expr: Any) -> bool:
    """Whether ``expr`` is never negative, at valid hyper-parameters (``1 - beta > 0``)."""

    def positive(e: Any) -> bool:
        return bool(e.is_Add and not e.has(Datum) and _at_valid(e) > 0)

    return bool(expr.replace(positive, lambda e: sympy.Symbol(f"({e})", positive=True)).is_nonnegative)


def is_zero(expr: Any, branch: Branch) -> bool | None:
    """Whether ``expr`` is zero for all values of its symbols, on this way through the code.

    Returns:
        True where sympy proves it, False where it differs at some values, None where neither can be shown.
    """
    known = as_symbols(branch.facts(as_symbols(expr)))
    if known == 0 or _numerator(_split_roots(known)) == 0:
        return True
    if _differs_somewhere(known, branch):
        return False
    return True if sympy.simplify(_split_roots(known)) == 0 else None


def tidy(expr: Any) -> Any:
    """``expr`` in a form to read."""
    forms = [expr, sympy.factor(expr)] if expr.count_ops() < 200 else [expr]
    return min(forms, key=lambda e: (e.count_ops(), len(str(e))))


def _numerator(expr: Any) -> Any:
    return sympy.expand(sympy.fraction(sympy.together(expr))[0])


def _at_valid(expr: Any) -> Any:
    return expr.xreplace(dict.fromkeys(expr.free_symbols, _VALID))


def _split_roots(expr: Any) -> Any:
    """Take factors of hyper-parameters out of roots: they are positive at valid ones, so sqrt(a b) = sqrt(a) sqrt(b)."""

    def is_root(e: Any) -> bool:
        return bool(e.is_Pow and e.exp.is_Rational and not e.exp.is_Integer)

    def split(base: Any, exponent: Any) -> Any:
        over, under = sympy.fraction(sympy.together(base))
        factors = [*sympy.Mul.make_args(over), *(1 / f for f in sympy.Mul.make_args(under))]
        data = sympy.Mul(*(f for f in factors if f.has(Datum)))
        roots, sign = [], 1
        for factor in sympy.Mul.make_args(sympy.factor(sympy.Mul(*(f for f in factors if not f.has(Datum))))):
            inner, power = factor.as_base_exp()
            if _at_valid(inner) < 0:
                inner, sign = -inner, sign * (-1) ** power
            roots.append(inner ** (power * exponent))
        return (sign * data) ** exponent * sympy.Mul(*roots)

    return expr.replace(is_root, lambda e: split(e.base, e.exp))


def _differs_somewhere(expr: Any, branch: Branch, tries: int = 300) -> bool:
    """Whether ``expr`` is not zero at some numbers that are on this way through the code."""
    draw = random.Random(0)
    zeros = {x.name: sympy.S.Zero for x, answer in branch.zero.items() if answer and x.is_Symbol}
    values: dict[str, Any] = {}

    def value(symbol: Any) -> Any:
        size = sympy.Rational(draw.randint(1, 96), 97)
        if not isinstance(symbol, Datum):
            return draw.randint(1, 5) if symbol.is_integer else size
        return size * 2 if symbol.is_nonnegative else -2 * size if symbol.is_negative else size * draw.choice((-2, 2))

    def at(x: Any) -> Any:
        x = as_symbols(x)
        for symbol in sorted(x.free_symbols, key=str):
            if symbol.name not in values:
                values[symbol.name] = value(symbol)
        return sympy.N(x.xreplace({s: values[s.name] for s in x.free_symbols}), 30)

    found = 0
    for _ in range(tries):
        values = dict(zeros)
        number = at(expr)
        if number.is_finite and branch.holds(at):
            found += 1
            if abs(number) > 1e-15:
                return True
            if found == 3:
                break
    return False
