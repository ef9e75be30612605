"""Closed forms: alpha_{s,i} for any s and i, and the regularization as a sum over past parameters."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.coefficients import OptimizerState, RecordedStep
from explaind_core.symbolic.algebra import is_zero, tidy
from explaind_core.symbolic.branches import Branch, Datum
from explaind_core.symbolic.tensor import SymbolicTensor, exact
from explaind_core.symbolic.unroll import NAME, Declared, Path, declare, hyper_parameters

__all__ = ["ClosedForms"]

S, I = sympy.symbols("s i", integer=True, positive=True)  # noqa: E741
# i = 1 + J and s = i + K: so 1 < i < s follows from the symbols alone. A step without another is s = 1 + J.
J, K = sympy.symbols("j k", integer=True, positive=True)
_PAIRS = {"s,i": (1 + J + K, 1 + J), "s,s": (1 + J, 1 + J), "s,1": (1 + J, 1), "1,1": (1, 1)}
_READ = {"s,i": {J: I - 1, K: S - I}, "s,s": {J: S - 1}, "s,1": {J: S - 1}, "1,1": {}}


class ClosedForms:
    """What a rule declares at constant hyper-parameters and a general step, for one configuration.

    Attributes:
        declared: alpha_{s,i} by the declaration, for the pairs "s,i" (1 < i < s), "s,s" (s > 1), "s,1" and "1,1", in
            the symbols J and K. Empty where the filter's A changes from step to step or mixes its states.
        own: the same by the rule's ``alpha``; empty where it has none.
    """

    def __init__(self, path: Path) -> None:
        self._rule, self._path = path.rule, path
        self._hyper = hyper_parameters(path.rule, path.configuration)
        self._late, self._early, self._single = (
            self._at(clock, label) for clock, label in ((1 + J + K, "s"), (1 + J, "i"), (1 + J, "s"))
        )
        self.declared = self._alphas()
        self.own = {} if self.author(1, 1) is None else {pair: self.author(*at) for pair, at in _PAIRS.items()}

    def author(self, s: Any, i: Any) -> Any:
        """The rule's own ``alpha`` at (s, i); None where it has none."""
        hyper = OptimizerState(NAME, self._hyper, "parameter group")
        found = self._rule.alpha(SymbolicTensor(s), SymbolicTensor(i), hyper)
        return None if found is NotImplemented else exact(found)

    @staticmethod
    def readable(pair: str, expr: Any) -> Any:
        """``expr``, of the given pair, in the symbols s and i."""
        return tidy(expr.xreplace(_READ[pair]))

    def alpha(self, branch: Branch) -> dict[str, Any]:
        """The closed form to be read, in the symbols s and i: "s,i", and the pairs that it does not hold for."""
        found = {pair: self.readable(pair, expr) for pair, expr in self.declared.items()}
        for pair, at in (("s,s", {I: S}), ("s,1", {I: sympy.S.One}), ("1,1", {I: sympy.S.One, S: sympy.S.One})):
            if found and is_zero(found["s,i"].xreplace(at) - found[pair], branch):
                del found[pair]
        return found

    def regularization(self, alpha: dict[str, Any]) -> Any:
        """r_s at constant hyper-parameters (Corollary 3.2 of the paper), in the symbols s and i and past thetas."""
        theta, late = sympy.IndexedBase("theta"), self._late
        decay = late.rho.xreplace(_READ["s,i"]) * theta[S - 1]
        if late.W == 0:
            return tidy(decay)
        weight, pull = (x.xreplace(_READ["s,i"]) for x in (late.P, self._early.W))
        if not late.B:
            return decay + weight * (late.D * late.W).xreplace(_READ["s,i"]) * theta[S - 1]
        kept = alpha["s,i"] if len(alpha) == 1 else sympy.IndexedBase("alpha")[S, I]
        outside, inside = (kept * pull).as_independent(I)
        return decay + weight * outside * sympy.Sum(inside * theta[I - 1], (I, 1, S))

    def _at(self, clock: Any, label: str) -> Declared:
        """The declaration at a general step, with symbols for the state of that step."""
        last = self._path.state

        def entries(when: str) -> OptimizerState:
            found = {name: SymbolicTensor(self._entry(name, x, when)) for name, x in last.items()}
            return OptimizerState(NAME, found, "optimizer state, by the rule's recursion,")

        data = {n: SymbolicTensor(Datum(f"{n}_{label}", real=True)) for n in ("theta", "gradient", "displacement")}
        return declare(
            self._rule,
            RecordedStep(
                name=NAME,
                step=SymbolicTensor(clock),  # type: ignore[arg-type]
                clock=SymbolicTensor(clock),  # type: ignore[arg-type]
                hyper=OptimizerState(NAME, self._hyper, "parameter group"),
                before=entries(f"{label}-1"),
                after=entries(label),
                hyper_after=OptimizerState(NAME, self._hyper, "parameter group after the step"),
                **data,  # type: ignore[arg-type]
            ),
        )

    @staticmethod
    def _entry(name: str, last: SymbolicTensor, when: str) -> Datum:
        return Datum(f"{name}_{when}", **({"nonnegative": True} if last.expr.is_nonnegative else {"real": True}))

    def _alphas(self) -> dict[str, Any]:
        rows, constant = self._early.A, self._path.constant()
        mixed = any(a != 0 for j, row in enumerate(rows) for k, a in enumerate(row) if j != k)
        if mixed or any(row[j].has(J, Datum) for j, row in enumerate(rows)):
            return {}
        first = self._path.steps[0].declared[0]
        born = [*(b.xreplace(constant) for b in first.B), *(sympy.S.Zero for _ in rows[len(first.B) :])]

        def between(c: tuple[Any, ...], power: Any, b: Any) -> Any:
            states = zip(c, rows, b, strict=True)
            return sympy.Add(*(cj * row[j] ** power * bj for j, (cj, row, bj) in enumerate(states)))

        return {
            "s,i": between(self._late.C, K - 1, self._early.B),
            "s,s": self._single.D,
            "s,1": between(self._single.C, J - 1, born),
            "1,1": first.D.xreplace(constant),
        }
