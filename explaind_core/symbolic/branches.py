"""Which of two expressions is larger? Where the symbols leave it open, all code runs once for each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import sympy  # type: ignore[import-untyped]

from explaind_core.errors import ProofError

__all__ = ["Branch", "Datum", "Option", "branches", "current"]

T = TypeVar("T")


class Datum(sympy.Symbol):  # type: ignore[misc]
    """A symbol for data (a gradient, a parameter, a state), unlike a hyper-parameter's."""


class Option(sympy.Symbol):  # type: ignore[misc]
    """A hyper-parameter of which the rule does not say that it is never zero."""


class Branch:
    """Answers to the questions that the symbols leave open, on one way through the code.

    Every question is brought to ``x > 0`` or ``x == 0`` for an expression x.

    Args:
        prefix: the answers to the first questions; later ones are answered with yes. None where no question may be
            asked.
        known: a branch whose answers hold here too.

    Attributes:
        solved: symbol -> what it is, by what is zero.
        positive: expression -> whether it is positive, as answered so far.
        zero: expression -> whether it is zero, as answered so far.
        open: the prefixes of the ways not taken.
    """

    def __init__(self, prefix: tuple[bool, ...] | None = (), known: Branch | None = None) -> None:
        self._prefix = prefix
        self._taken: list[bool] = []
        self.open: list[tuple[bool, ...]] = []
        self.positive: dict[Any, bool] = dict(known.positive) if known else {}
        self.zero: dict[Any, bool] = dict(known.zero) if known else {}
        self.solved: dict[Any, Any] = dict(known.solved) if known else {}

    def is_positive(self, x: Any) -> bool:
        """Whether ``x > 0``."""
        x = self._canonical(x)
        _refuse_an_option(x)
        known = False if x.is_nonpositive else x.is_positive
        if known is None:
            known = self.positive.get(x)
        if known is None:
            below, equal = self.positive.get(-x), self.zero.get(_unsigned(x))
            known = False if below or equal else True if below is False and equal is False else None
        if known is None:
            known = self.positive[x] = self._choose(f"{x} > 0")
        return bool(known)

    def is_zero(self, x: Any) -> bool:
        """Whether ``x == 0``. Two hyper-parameters are never equal: special values are a rule's ``proved_for``."""
        x = self._data(x)
        _refuse_an_option(x)
        known = x.is_zero if x.has(Datum) else bool(x.is_zero)
        if known is None:
            known = self.zero.get(x)
        if known is None:
            above, below = self.positive.get(x), self.positive.get(-x)
            known = False if above or below else True if above is False and below is False else None
        if known is None:
            known = self.zero[x] = False if self._contradicts_zero(x) else self._choose(f"{x} == 0")
            self.solved = self._zeros()
        return bool(known)

    def facts(self, expr: Any) -> Any:
        """``expr`` with what is known on this way through the code put in."""
        expr = expr.xreplace(self.solved)
        for x, answer in self.positive.items():
            for symbol, sign in ((x, "positive"), (-x, "negative")):
                if answer and symbol.is_Symbol:
                    expr = expr.xreplace({symbol: type(symbol)(symbol.name, **{sign: True})})
        chosen = {m: self._chosen(m) for m in expr.atoms(sympy.Max, sympy.Min)}
        signs = {s: self._sign(s) for s in expr.atoms(sympy.sign, sympy.Abs)} if self.zero else {}
        return expr.xreplace({**chosen, **signs})

    def common(self, other: Branch) -> Branch:
        """The answers that are the same on both ways."""
        found = Branch()
        found.positive = {x: a for x, a in self.positive.items() if other.positive.get(x) == a}
        found.zero = {x: a for x, a in self.zero.items() if other.zero.get(x) == a}
        found.solved = found._zeros()
        return found

    def holds(self, at: Callable[[Any], Any]) -> bool:
        """Whether ``at``, which turns expressions into numbers, gives the answers of this way."""
        positive = ((at(x), answer) for x, answer in self.positive.items())
        zero = ((at(x), answer) for x, answer in self.zero.items())
        return all(x.is_real and bool(x > 1e-12) == answer for x, answer in positive) and all(
            bool(abs(x) < 1e-12) == answer for x, answer in zero
        )

    def text(self, names: Mapping[Any, Any] | None = None) -> str:
        """The answers, in words, with other ``names`` for some symbols."""
        positive = [(x, ">" if answer else "<=") for x, answer in self.positive.items()]
        zero = [(x, "==" if answer else "!=") for x, answer in self.zero.items()]
        return ", ".join(f"{x.xreplace(names or {})} {relation} 0" for x, relation in positive + zero)

    def _chosen(self, extremum: Any) -> Any:
        """The argument that a maximum or minimum of two takes, where the answers tell."""
        if len(extremum.args) != 2:
            return extremum
        a, b = extremum.args
        for first, second in ((a, b), (b, a)):
            answer = self.positive.get(self._canonical(first - second))
            if answer is not None:
                return first if answer == isinstance(extremum, sympy.Max) else second
        return extremum

    def _sign(self, sign: Any) -> Any:
        """A sign or a magnitude, by what is known of its argument."""
        x = sign.args[0]
        data = self._data(x)
        zero = data == 0 if data.is_number else self.zero.get(data)
        if zero:
            return sympy.S.Zero
        return x / sympy.Abs(x) if isinstance(sign, sympy.sign) and zero is False else sign

    def _zeros(self) -> dict[Any, Any]:
        """What is zero, solved for one of its symbols."""
        found: dict[Any, Any] = {}
        for x in (x.xreplace(found) for x, answer in self.zero.items() if answer):
            linear = (s for s in sorted(x.atoms(Datum), key=str) if not sympy.diff(x, s).has(Datum))
            symbol = x if x.is_Symbol else next(linear, None)
            if symbol is not None:
                solution = {symbol: -x.xreplace({symbol: sympy.S.Zero}) / sympy.diff(x, symbol)}
                found = {s: e.xreplace(solution) for s, e in found.items()} | solution
        return found

    def _data(self, x: Any) -> Any:
        """The factors of ``x`` that may be zero: hyper-parameters and denominators are not."""
        x = self._canonical(x)
        if _unsigned(x).is_Symbol or not x.has(Datum):
            return _unsigned(x)
        powers = (factor.as_base_exp() for factor in sympy.Mul.make_args(sympy.factor(x)))
        bases = (_unsigned(base) for base, power in powers if base.has(Datum) and not power.is_negative)
        return sympy.Mul(*(base for base in bases if self.zero.get(base) is not False))

    def _canonical(self, x: Any) -> Any:
        return _fraction(x.xreplace(self.solved))

    def _contradicts_zero(self, symbol: Any) -> bool:
        """Whether an earlier answer excludes that ``symbol`` is zero."""
        if not symbol.is_Symbol:
            return False
        at = {symbol: sympy.S.Zero}
        return any(x.xreplace(at).is_positive is (not answer) for x, answer in self.positive.items())

    def _choose(self, question: str) -> bool:
        if self._prefix is None:
            raise ProofError(f"whether {question} does not follow from the symbols", remedy="ask inside branches()")
        place = len(self._taken)
        if place >= len(self._prefix):
            self.open.append((*self._taken, False))
            self._taken.append(True)
        else:
            self._taken.append(self._prefix[place])
        return self._taken[-1]


@lru_cache(maxsize=4096)
def _fraction(x: Any) -> Any:
    """``x``, but for positive factors, so that a question is known again in another form."""
    if x.is_number or _unsigned(x).is_Symbol:
        return x
    over, under = sympy.fraction(sympy.cancel(sympy.together(x)))
    signed = sympy.Mul(*(f for f in sympy.Mul.make_args(over.as_content_primitive()[1]) if not f.is_positive))
    return signed if under.is_positive else signed / under


def _unsigned(x: Any) -> Any:
    return -x if x.could_extract_minus_sign() else x


def _refuse_an_option(x: Any) -> None:
    symbol = _unsigned(x)
    if isinstance(symbol, Option):
        raise ProofError(
            f"whether {symbol} is zero decides what happens, and the rule does not say which values it has",
            remedy='list them: proved_for = {"momentum": (0, ...)}, where ... is any positive number',
        )


_running: list[Branch] = []


def current() -> Branch:
    """The branch that is being run."""
    return _running[-1] if _running else Branch(None)


def branches(run: Callable[[Branch], T], known: Branch | None = None, limit: int = 500) -> Iterator[tuple[Branch, T]]:
    """Run ``run`` once for every combination of answers to the questions that its symbols leave open.

    Args:
        run: called with its branch, once for each.
        known: a branch whose answers hold for all.
        limit: how many combinations to go through.

    Raises:
        ProofError: there are more than ``limit`` combinations.

    Example:
        >>> x = Datum("x", real=True)
        >>> [(way.text(), found) for way, found in branches(lambda way: x if way.is_positive(x) else 0)]
        [('x > 0', x), ('x <= 0', 0)]
    """
    pending: list[tuple[bool, ...]] = [()]
    for _ in range(limit):
        branch = Branch(pending.pop(), known)
        _running.append(branch)
        try:
            result = run(branch)
        finally:
            _running.pop()
        pending.extend(branch.open)
        yield branch, result
        if not pending:
            return
    raise ProofError(f"more than {limit} cases to go through", remedy="list fewer values in proved_for")
