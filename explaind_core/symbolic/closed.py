"""Closed forms: alpha_{s,i} for any s and i, and the regularization as a sum over past parameters."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.rules import OptimizerState, RecordedStep
from explaind_core.symbolic.algebra import proves_zero
from explaind_core.symbolic.branches import Branch, Datum, Option
from explaind_core.symbolic.recursion import hyper_parameters
from explaind_core.symbolic.shown import GroupAfter, counted_after
from explaind_core.symbolic.tensor import SymbolicTensor, exact
from explaind_core.symbolic.unroll import AHEAD, EARLIER, NAME, Declared, Path, declare

__all__ = ["ClosedForms"]

S, I = sympy.symbols("s i", integer=True, positive=True)  # noqa: E741
# i = 1 + J and s = i + K: so 1 < i < s follows from the symbols alone. A step without another is s = 1 + J.
J, K = EARLIER, AHEAD
_PAIRS = {"s,i": (1 + J + K, 1 + J), "s,s": (1 + J, 1 + J), "s,1": (1 + J, 1), "1,1": (1, 1)}
_READ = {"s,i": {J: I - 1, K: S - I}, "s,s": {J: S - 1}, "s,1": {J: S - 1}, "1,1": {}}


class ClosedForms:
    """What a rule declares at constant hyper-parameters and a general step, for one configuration.

    Args:
        path: the rule's recursion and declaration, unrolled from the first step.

    Attributes:
        declared: alpha_{s,i} by the declaration, for the pairs "s,i" (1 < i < s), "s,s" (s > 1), "s,1" and "1,1", in
            the symbols J and K. Empty where the filter's A changes from step to step or mixes its states.
        own: the same by the rule's ``alpha``; empty where it has none.
        readable: ``own``, else ``declared``, in the symbols s and i; what follows from "s,i" is left out.
    """

    def __init__(self, path: Path) -> None:
        self._rule, self._path = path.rule, path
        self._hyper = hyper_parameters(path.rule, path.configuration)
        first = {x: x.name.removesuffix("_1") for x in path.definitions if x.name.endswith("_1")}
        self._shown: dict[Any, Any] = {x: sympy.IndexedBase(name)[1] for x, name in first.items()}
        self._last = self._at(1 + J + K, "s")
        self._early = self._at(1 + J, "i") if self._last.B else self._last
        self.declared = self._alphas() if self._last.B else dict.fromkeys(_PAIRS, sympy.S.Zero)
        if not self._last.B:
            self.declared |= {"s,s": self._last.D, "1,1": path.steps[0].declared[0].D}
        self.own = {} if self.author(1, 1) is None else {pair: self.author(*at) for pair, at in _PAIRS.items()}
        self.readable = self._readable()

    def author(self, s: Any, i: Any) -> Any:
        """The rule's own ``alpha`` at (s, i); None where it has none.

        Args:
            s: the step whose update is read.
            i: the step whose gradient is in it.
        """
        hyper = OptimizerState(NAME, self._hyper, "parameter group")
        found = self._rule.alpha(SymbolicTensor(s), SymbolicTensor(i), hyper)
        return None if found is NotImplemented else exact(found)

    def read(self, pair: str, expr: Any) -> Any:
        """``expr``, of the given pair, in the symbols s and i; hyper-parameters are plain positive symbols.

        Args:
            pair: ``"s,i"``, ``"s,s"``, ``"s,1"`` or ``"1,1"``.
            expr: in the symbols J and K.
        """
        plain = {x: sympy.Symbol(x.name, positive=True) for x in expr.atoms(Option)}
        return expr.xreplace({**_READ[pair], **self._shown, **plain})

    def _readable(self) -> dict[str, Any]:
        found = {pair: sympy.powsimp(self.read(pair, x)) for pair, x in (self.own or self.declared).items()}

        def follows(pair: str, other: str, at: dict[Any, int | Any]) -> bool:
            return proves_zero(found[other].subs(at) - found[pair], Branch())

        special = {
            "s,s": lambda: follows("s,s", "s,i", {I: S}),
            "s,1": lambda: follows("s,1", "s,i", {I: 1}),
            "1,1": lambda: follows("1,1", "s,i", {I: 1, S: 1}) or follows("1,1", "s,s", {S: 1}),
        }
        return {pair: x for pair, x in found.items() if pair == "s,i" or not special[pair]()}

    def regularization(self, preconditioner: Any = None) -> Any:
        """r_s (Corollary 3.2 of the paper), in s, i and past thetas; with ``preconditioner`` shown for P_s."""
        theta, last = sympy.IndexedBase("theta"), self._last
        rho, P, W, D = (self.read("s,i", x) for x in (last.rho, last.P, last.W, last.D))
        P = P if preconditioner is None else preconditioner
        decoupled = rho * theta[S - 1]
        if W == 0:
            return decoupled
        if not any(c != 0 for c in last.C):
            return decoupled + P * D * W * theta[S - 1]
        alpha = self.readable["s,i"] if len(self.readable) == 1 else sympy.IndexedBase("alpha")[S, I]
        pull = self.read("s,i", self._early.W)
        outside, inside = (alpha * pull).as_independent(I)
        return decoupled + P * outside * sympy.Sum(inside * theta[I - 1], (I, 1, S))

    def _at(self, clock: Any, label: str) -> Declared:
        """The declaration at a general step, with symbols for the state of that step."""

        def entries(when: str) -> OptimizerState:
            found = {name: SymbolicTensor(Datum(f"{name}_{when}", real=True)) for name in self._path.state}
            index = {"s": S, "i": I}[when[0]] - int(len(when) > 1)
            self._shown |= {exact(x): sympy.IndexedBase(name)[index] for name, x in found.items()}
            return OptimizerState(NAME, found, "optimizer state, by the rule's recursion,")

        names = ("theta", "gradient", "displacement", *(("mask",) if self._path.sparse else ()))
        data = {n: SymbolicTensor(Datum(f"{n}_{label}", real=True)) for n in names}
        for x in data.values():
            x.ndim = self._path.configuration.get("ndim", 0)
        hyper = hyper_parameters(self._rule, self._path.configuration, step=SymbolicTensor(clock))
        group = {name: SymbolicTensor(Datum(f"{name}_{label}", real=True)) for name in self._path.group}
        self._shown |= {exact(x): sympy.IndexedBase(name)[{"s": S, "i": I}[label]] for name, x in group.items()}
        return declare(
            self._rule,
            RecordedStep(
                name=NAME,
                step=SymbolicTensor(clock),  # type: ignore[arg-type]
                clock=SymbolicTensor(clock),  # type: ignore[arg-type]
                hyper=OptimizerState(NAME, hyper, "parameter group"),
                before=entries(f"{label}-1"),
                after=entries(label),
                hyper_after=GroupAfter(NAME, hyper, counted_after(self._path.configuration, clock), group),
                point=self._path.configuration.get("point", "gradient"),
                **data,  # type: ignore[arg-type]
            ),
        )

    def _alphas(self) -> dict[str, Any]:
        early, single = self._early, self._at(1 + J, "s")
        rows, constant = early.A, self._path.constant()
        mixed = any(a != 0 for j, row in enumerate(rows) for k, a in enumerate(row) if j != k)
        if mixed or any(row[j].has(J, Datum) for j, row in enumerate(rows)):
            return {}
        first = self._path.steps[0].declared[0]
        born = [*(b.xreplace(constant) for b in first.B), *(sympy.S.Zero for _ in rows[len(first.B) :])]

        def between(c: tuple[Any, ...], power: Any, b: Any) -> Any:
            states = zip(c, rows, b, strict=True)
            return sympy.Add(*(cj * row[j] ** power * bj for j, (cj, row, bj) in enumerate(states)))

        return {
            "s,i": between(self._last.C, K - 1, early.B),
            "s,s": single.D,
            "s,1": between(single.C, J - 1, born),
            "1,1": first.D.xreplace(constant),
        }
