"""Signs and magnitudes: an expression is zero if it is where their arguments are positive, zero and negative."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

# The expressions of a proof are sympy's, which has no types.
from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.symbolic.branches import Branch, Datum

__all__ = ["is_zero_by_signs"]

_SIGNED = (sympy.Abs, sympy.sign)
_EXTREMA = (sympy.Max, sympy.Min)

#: An expression and what is known of it: ``">"``, ``">="`` or ``"!="`` 0.
Bound = tuple[Any, str]
#: An expression on one way through the signs, and what is known there.
Way = tuple[Any, tuple[Bound, ...]]


def is_zero_by_signs(
    expr: Any, branch: Branch, is_identity: Callable[[Any], bool], settled: Callable[[Any], Any], limit: int = 40
) -> bool:
    """Whether ``expr`` is zero for all signs that what its signs, magnitudes and extrema are taken of can have.

    ``|m| sign(m)`` is m for positive, negative and zero m, though no rule of algebra says so; ``m / |m|`` is not
    sign(m), as it has no value at 0.

    Args:
        expr: with nothing but symbols inside.
        branch: what is known to be no zero on this way through the code.
        is_identity: decides where no sign is left.
        settled: the expression with those signs taken that hyper-parameters have.
        limit: how many combinations of signs to go through.

    Example:
        >>> m, g = Datum("m", real=True), Datum("g", real=True)
        >>> expr = abs(m) * sympy.sign(m * g) - m * sympy.sign(g)
        >>> is_zero_by_signs(expr, Branch(), lambda e: sympy.expand(e) == 0, lambda e: e)
        True
    """
    if not expr.has(*_SIGNED, *_EXTREMA):
        return False
    number = itertools.count()
    pending: list[Way] = [(expr, tuple((x, "!=") for x, zero in branch.zero.items() if not zero))]
    for _ in range(limit):
        case, bounds = pending.pop()
        if not is_identity(case):
            further = _cases(case, bounds, settled, next(number))
            if further is None:
                return False
            pending.extend(further)
        if not pending:
            return True
    return False


def _cases(expr: Any, bounds: tuple[Bound, ...], settled: Callable[[Any], Any], number: int) -> list[Way] | None:
    """``expr`` where the first undecided argument is positive, negative and zero; None where there is none."""
    found = next(filter(None, map(_solved, _undecided(expr))), None)
    if found is None:
        return None
    symbol, factor, rest = found
    size = Datum(f"|{number}|", positive=True)  # data: unlike hyper-parameters it may be above 1
    ways = []
    for at in map(_reduced, ((size - rest) / factor, (-size - rest) / factor, -rest / factor)):
        known = [*((_reduced(p.xreplace({symbol: at})), relation) for p, relation in bounds), *_bounds(symbol, at)]
        if not any(_contradicts(p, relation) for p, relation in known):
            ways.append((settled(_decided(expr, symbol, at)), tuple(known)))
    return ways


def _bounds(symbol: Any, at: Any) -> list[Bound]:
    """What of ``symbol`` is known is true of what is put in its place."""
    if symbol.is_nonnegative:
        return [(at, ">" if symbol.is_positive else ">=")]
    return [(-at, ">" if symbol.is_negative else ">=")] if symbol.is_nonpositive else []


def _contradicts(x: Any, relation: str) -> bool:
    return bool((x.is_zero and relation != ">=") or (x.is_negative and relation != "!="))


def _undecided(expr: Any) -> Iterator[Any]:
    """What signs are taken of, and the differences that extrema depend on; the innermost first."""
    atoms = sorted(expr.atoms(*_SIGNED, *_EXTREMA), key=lambda m: (m.count_ops(), str(m)))
    for m in atoms:
        if isinstance(m, _EXTREMA):
            yield m.args[0] - m.args[1]
        else:
            yield from (base for base, _ in (f.as_base_exp() for f in sympy.Mul.make_args(sympy.factor(m.args[0]))))


def _solved(x: Any) -> tuple[Any, Any, Any] | None:
    """A symbol for data that ``x`` is linear in, its factor (free of data), and the rest; None where there is none."""
    if x.has(*_SIGNED, *_EXTREMA):
        return None
    x = sympy.expand(x)
    for symbol in sorted(x.atoms(Datum), key=str):
        factor = sympy.diff(x, symbol)
        if factor != 0 and not factor.has(Datum):
            return symbol, factor, x.xreplace({symbol: sympy.S.Zero})
    return None


def _decided(expr: Any, symbol: Any, at: Any) -> Any:
    """``expr`` with a symbol put in, and its signs taken again, from the inside out."""
    if symbol not in expr.free_symbols:
        return expr
    if not expr.args:
        return at if expr == symbol else expr
    arguments = [_decided(a, symbol, at) for a in expr.args]
    if isinstance(expr, (*_SIGNED, *_EXTREMA)):
        arguments = [_reduced(a) for a in arguments]
    return expr.func(*arguments)


def _reduced(x: Any) -> Any:
    return sympy.expand(sympy.cancel(x)) if not x.has(*_SIGNED, *_EXTREMA) else x
