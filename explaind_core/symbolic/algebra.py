"""Is an expression zero? Exact where the answer is yes, by a counterexample in numbers where it is no."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy.printing.latex import LatexPrinter  # type: ignore[import-untyped]
from sympy.printing.str import StrPrinter  # type: ignore[import-untyped]

from explaind_core.symbolic.branches import Branch, Datum
from explaind_core.symbolic.signs import is_zero_by_signs
from explaind_core.symbolic.tensor import mean

__all__ = ["as_symbols", "is_nonnegative", "is_zero", "latex", "linear_coefficients", "proves_zero", "text", "tidy"]

#: A point where hyper-parameters are valid: learning rates and averages between 0 and 1.
_VALID = sympy.Rational(9, 10)


def as_symbols(expr: Any) -> Any:
    """``expr`` with a symbol in the place of every mean over the tensor: given numbers, like frozen states."""
    return expr.xreplace(
        {m: Datum(str(m), **({"nonnegative": True} if m.is_nonnegative else {"real": True})) for m in expr.atoms(mean)}
    )


def linear_coefficients(expr: Any, inputs: Sequence[Any]) -> list[Any] | None:
    """The coefficient of each input, then the rest; None where ``expr`` is not linear in them.

    Args:
        expr: what is taken apart.
        inputs: the symbols that it is to be linear in.

    Example:
        >>> x, y, a = Datum("x"), Datum("y"), sympy.Symbol("a")
        >>> linear_coefficients(a * (x + 2) - y, [x, y])
        [a, -1, 2*a]
    """
    found = _linear(expr, frozenset(inputs))
    return None if found is None else [found.get(x, sympy.S.Zero) for x in (*inputs, sympy.S.One)]


def _linear(expr: Any, inputs: frozenset[Any]) -> dict[Any, Any] | None:
    """Input -> coefficient, and 1 -> the rest; the expression's form is kept, which a derivative would not do."""
    if expr in inputs:
        return {expr: sympy.S.One}
    if inputs.isdisjoint(expr.free_symbols):
        return {sympy.S.One: expr}
    total: dict[Any, Any] = {}
    if expr.is_Add:
        for term in expr.args:
            part = _linear(term, inputs)
            if part is None:
                return None
            total |= {x: total.get(x, 0) + c for x, c in part.items()}
        return total
    moving = [f for f in expr.args if not inputs.isdisjoint(f.free_symbols)]
    part = _linear(moving[0], inputs) if expr.is_Mul and len(moving) == 1 else None
    if part is None:
        return None
    factor = sympy.Mul(*(f for f in expr.args if f is not moving[0]))
    return {x: factor * c for x, c in part.items()}


def is_nonnegative(expr: Any) -> bool:
    """Whether ``expr`` is never negative, at valid hyper-parameters (``1 - beta > 0``)."""

    def positive(e: Any) -> bool:
        return bool(e.is_Add and not e.has(Datum) and _at_valid(e) > 0)

    return bool(expr.replace(positive, lambda e: sympy.Symbol(f"({e})", positive=True)).is_nonnegative)


def proves_zero(expr: Any, branch: Branch) -> bool:
    """Whether ``expr`` is shown quickly to be zero for all values of its symbols, on this way through the code.

    Args:
        expr: any expression.
        branch: the way.
    """
    known = _known(expr, branch)
    return _is_identity(known) or is_zero_by_signs(known, branch, _is_identity, _settled, limit=12)


def is_zero(expr: Any, branch: Branch, definitions: Mapping[Any, Any] | None = None) -> bool | None:
    """Whether ``expr`` is zero for all values of its symbols, on this way through the code.

    Args:
        expr: any expression.
        branch: the way.
        definitions: what some of its symbols stand for, oldest first.

    Returns:
        True where sympy proves it, False where it differs at some values, None where neither can be shown.
    """
    known = _known(expr, branch)
    if _is_identity(known) or is_zero_by_signs(known, branch, _is_identity, _settled):
        return True
    definitions = definitions or {}
    if _differs_somewhere(known, branch, {symbol.name: as_symbols(x) for symbol, x in definitions.items()}):
        return False
    for symbol, definition in reversed(list(definitions.items())):
        if expr.has(symbol):
            expr = expr.xreplace({symbol: definition})
    known = _known(expr, branch)
    if _is_identity(known) or is_zero_by_signs(known, branch, _is_identity, _settled):
        return True
    return True if sympy.simplify(_split_roots(known)) == 0 else None


def _known(expr: Any, branch: Branch) -> Any:
    known = as_symbols(branch.facts(as_symbols(expr)))
    known = known.xreplace({m: _largest(m) for m in known.atoms(sympy.Max)})
    return _settled(known)


def _settled(expr: Any) -> Any:
    return expr.xreplace({m: _in_factors(m) for m in expr.atoms(sympy.Abs, sympy.sign)})


@lru_cache(maxsize=4096)
def _in_factors(magnitude: Any) -> Any:
    """A magnitude or a sign, of the factors that data are in; of the others the sign is known."""
    found, inside = sympy.S.One, sympy.S.One
    for factor in sympy.Mul.make_args(sympy.factor(magnitude.args[0])):
        sign = 0 if factor.has(Datum) else _sign_at_valid(factor)
        found *= 1 if sign == 0 else sign * factor if isinstance(magnitude, sympy.Abs) else sign
        inside *= factor if sign == 0 else 1
    return found * type(magnitude)(inside)


def _sign_at_valid(expr: Any) -> int:
    """The sign at all valid hyper-parameters, by samples of them: 1 - beta has one, beta1 - beta2 has none (0)."""
    draw = random.Random(0)
    samples = ({x: sympy.Rational(draw.randint(1, 96), 97) for x in expr.free_symbols} for _ in range(20))
    signs = {int(sympy.sign(expr.xreplace(at))) for at in samples}
    return signs.pop() if len(signs) == 1 else 0


def _largest(maximum: Any) -> Any:
    return next((x for x in maximum.args if all(is_nonnegative(x - y) for y in maximum.args)), maximum)


@lru_cache(maxsize=4096)
def _is_identity(expr: Any) -> bool:
    return bool(expr == 0 or (not expr.is_number and _numerator(_split_roots(expr)) == 0))


class _PositiveFirst:
    """Prints s - i, where sympy would print -i + s."""

    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        terms: list[Any] = super()._as_ordered_terms(expr, order=order)  # type: ignore[misc]
        return sorted(terms, key=lambda term: bool(term.could_extract_minus_sign()))


class _Text(_PositiveFirst, StrPrinter):  # type: ignore[misc]
    pass


class _Latex(_PositiveFirst, LatexPrinter):  # type: ignore[misc]
    pass


def text(expr: Any) -> str:
    """``expr`` to be read.

    Example:
        >>> text(1 - sympy.Symbol("beta"))
        '1 - beta'
    """
    return str(_Text().doprint(expr))


def latex(expr: Any) -> str:
    """``expr`` in LaTeX."""
    return str(_Latex().doprint(expr))


def tidy(expr: Any) -> Any:
    """``expr`` in a form to read."""
    factored = sympy.factor(expr) if expr.count_ops() < 200 else expr
    return factored if factored.count_ops() < 0.8 * expr.count_ops() else expr


def _numerator(expr: Any) -> Any:
    return sympy.expand(sympy.fraction(sympy.together(expr))[0])


def _at_valid(expr: Any) -> Any:
    return expr.xreplace({x: _VALID - sympy.Rational(k, 100) for k, x in enumerate(sorted(expr.free_symbols, key=str))})


def _split_roots(expr: Any) -> Any:
    """Take factors of hyper-parameters out of roots: sqrt(a b) = sqrt(a) sqrt(b), as valid ones make them positive."""

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


def _differs_somewhere(expr: Any, branch: Branch, definitions: Mapping[str, Any], tries: int = 300) -> bool:
    """Whether ``expr`` is not zero at some numbers that are on this way through the code."""
    draw = random.Random(0)
    definitions = {**definitions, **{x.name: as_symbols(e) for x, e in branch.solved.items()}}
    values: dict[str, Any] = {}
    sizes: tuple[int, ...] = (1,)

    def value(symbol: Any) -> Any:
        size = sympy.Rational(draw.randint(1, 96), 97)
        if not isinstance(symbol, Datum):
            return draw.randint(1, 12) if symbol.is_integer else size * draw.choice(sizes)
        return size * 2 if symbol.is_nonnegative else -2 * size if symbol.is_negative else size * draw.choice((-2, 2))

    def at(x: Any) -> Any:
        x = as_symbols(x)
        for symbol in sorted(x.free_symbols, key=str):
            if symbol.name not in values:
                defined = definitions.get(symbol.name)
                values[symbol.name] = value(symbol) if defined is None else at(defined)
        return sympy.N(x.xreplace({s: values[s.name] for s in x.free_symbols}), 30)

    found = 0
    for k in range(tries):
        # Hyper-parameters are below 1, unless that cannot be on this way.
        sizes, values = (1,) if k < tries // 2 else (1, 1, 3), {}
        try:
            number = at(expr) if branch.holds(at) else sympy.nan
        except (TypeError, ValueError, RecursionError):  # the larger of two complex numbers: not on this way
            continue
        if number.is_finite:
            found += 1
            if abs(number) > 1e-15:
                return True
        if found == 8 or expr.is_number:
            break
    return False
