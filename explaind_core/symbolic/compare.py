"""The comparisons of a proof, each of which names the term that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy  # type: ignore[import-untyped]

from explaind_core.errors import DisprovedError, ProofError
from explaind_core.symbolic.algebra import as_symbols, is_zero, linear_coefficients, proves_zero, text, tidy
from explaind_core.symbolic.branches import Branch
from explaind_core.symbolic.closed import ClosedForms
from explaind_core.symbolic.tensor import exact
from explaind_core.symbolic.unroll import EARLIER, Path, UnrolledStep

__all__ = ["Comparison"]

#: How any step but the first is shown: as step t.
_STEP = {EARLIER: sympy.Symbol("t") - 1}
_WHOLE = "the update as a whole, which is not linear in the gradient"


@dataclass(frozen=True)
class Comparison:
    """The comparisons for one configuration and one way through the code.

    Attributes:
        path: the rule's recursion and declaration.
        branch: the way through the code.
        options: the configuration in words.
    """

    path: Path
    branch: Branch
    options: str

    def update(self) -> None:
        """The newest update: every coefficient of a past gradient and parameter."""
        step = self.path.steps[-1]
        terms = self._terms(step)
        if all(proves_zero(expected - got, self.branch) for _, expected, got in terms):
            return
        # States as symbols may hide that a rule computes them anew: then the whole update decides.
        verdict = self._are_equal(step.expected, step.got)
        if verdict is not True:
            terms = [*(terms if len(terms) > 1 else self._terms(step, self._linear_but_for_magnitudes)), terms[0]]
            differing = (term for term in terms if self._are_equal(*term[1:]) is verdict)
            self._refute("its recursion", *next(differing, terms[0]), step.label, verdict)

    def states(self) -> None:
        """The filter's states and the entries of the optimizer's state that ``filter_states`` names."""
        for m, entry in zip(self.path.filter, self.path.rule.filter_states, strict=False):
            expected, got = exact(self.path.state.get(entry, 0)), exact(m)
            verdict = self._are_equal(expected, got)
            if verdict is not True:
                term = f"the filter's state and the optimizer's {entry!r}, which filter_states names"
                self._refute("its recursion", term, expected, got, self.path.steps[-1].label, verdict)

    def alphas(self, forms: ClosedForms) -> None:
        """The rule's ``alpha`` and what it declares, for all s and i."""
        for pair, expected in forms.declared.items():
            if pair in forms.own:
                verdict = is_zero(expected - forms.own[pair], self.branch)
                if verdict is not True:
                    declared, own = (forms.read(pair, x) for x in (expected, forms.own[pair]))
                    self._refute("the closed form in its alpha()", f"alpha_{{{pair}}}", declared, own, None, verdict)

    def closed(self, forms: ClosedForms) -> None:
        """The newest update at constant hyper-parameters and the sums of Theorem 3.1 and Corollary 3.2.

        The coefficient of g_i is ``-P_s alpha_{s,i} E_i``; that of theta_{i-1} is ``-P_s alpha_{s,i} W_i``, and
        ``-rho_s`` for the newest.
        """
        step = self.path.steps[-1]
        found = linear_coefficients(as_symbols(step.expected - step.prehistory), [*step.gradients, *step.thetas])
        if found is None:
            return
        past, constant = step.declared, self.path.constant()
        alphas = [forms.author(len(past), i) for i in range(1, len(past) + 1)]
        P, rho = past[-1].P, past[-1].rho
        kernel = [-P * a * declared.E for a, declared in zip(alphas, past, strict=True)]
        decay = [-P * a * declared.W for a, declared in zip(alphas, past, strict=True)]
        decay[-1] -= rho
        symbols = [*step.gradients, *step.thetas]
        for symbol, expected, got in zip(symbols, found[:-1], [*kernel, *decay], strict=True):
            verdict = self._are_equal(expected, as_symbols(got), constant)
            if verdict is not True:
                shown = (x.xreplace(constant) for x in (expected, got))
                self._refute("the sums over its alpha()", self._name(symbol, step), *shown, step.label, verdict)

    def _are_equal(self, expected: Any, got: Any, constant: Mapping[Any, Any] | None = None) -> bool | None:
        """As :func:`is_zero` of the difference, with states as given symbols if that suffices."""
        difference, constant = expected - got, constant or {}
        if proves_zero(difference.xreplace(constant), self.branch):
            return True
        definitions = {x: definition.xreplace(constant) for x, definition in self.path.definitions.items()}
        return is_zero(difference.xreplace(constant), self.branch, definitions)

    def _terms(
        self, step: UnrolledStep, linear: Callable[[Any, list[Any]], list[Any] | None] = linear_coefficients
    ) -> list[tuple[str, Any, Any]]:
        """What is compared, by name: coefficient by coefficient where both updates are linear."""
        facts = self.branch.facts
        memory = [m for m in self.path.memory or () if m.is_Symbol]
        named = [(x, facts(x)) for x in [*reversed(step.gradients), *reversed(step.thetas), *memory]]
        inputs = {x: symbol for x, symbol in named if symbol.is_Symbol}
        expected, got = (facts(as_symbols(x)) for x in (step.expected, step.got))
        rows = [linear(x, list(inputs.values())) for x in (expected, got)]
        if rows[0] is None or rows[1] is None:
            return [(_WHOLE, expected, got)]
        names = [*(self._name(x, step) for x in inputs), "what depends on no gradient and no parameter"]
        if linear is not linear_coefficients:
            names = [f"{_WHOLE}; with magnitudes taken as given, {name}" for name in names]
        return list(zip(names, rows[0], rows[1], strict=True))

    @staticmethod
    def _linear_but_for_magnitudes(expr: Any, inputs: list[Any]) -> list[Any] | None:
        """The inputs' coefficients, where sign(x) is x / abs(x). To name a term only: sign(0) is none of that."""
        expr = expr.xreplace({s: s.args[0] / sympy.Abs(s.args[0]) for s in expr.atoms(sympy.sign)})
        given = {m: sympy.Dummy(positive=True) for m in expr.atoms(sympy.Abs) if m.free_symbols & set(inputs)}
        found = linear_coefficients(expr.xreplace(given), inputs)
        return found and [c.xreplace({symbol: m for m, symbol in given.items()}) for c in found]

    def _name(self, symbol: Any, step: UnrolledStep) -> str:
        t = step.label
        if symbol in step.gradients:
            i = symbol.name.removeprefix("g_")
            return f"the coefficient of {symbol}, -P_{t} alpha_{{{t},{i}}} E_{i}"
        if symbol in step.thetas:
            i = step.gradients[step.thetas.index(symbol)].name.removeprefix("g_")
            decoupled = f" - rho_{t}" if symbol == step.thetas[-1] else ""
            return f"the coefficient of {symbol}, -P_{t} alpha_{{{t},{i}}} W_{i}{decoupled}"
        return f"the coefficient of the filter's state {symbol}, -P_{t} C_{t}"

    def _refute(self, other: str, term: str, *differing: Any) -> NoReturn:
        expected, got, step, verdict = differing
        sure = "is not" if verdict is False else "could not be proved to be"
        parts = (step and f"step {step}", self.options, self.branch.text(_STEP))
        raise (DisprovedError if verdict is False else ProofError)(
            f"what {type(self.path.rule).__name__} declares {sure} {other}: {term}",
            where="; ".join(part for part in parts if part) or None,
            expected=text(tidy(expected.xreplace(_STEP))),
            got=text(tidy(got.xreplace(_STEP))),
            remedy=(
                "correct the term in coefficients(), or in recursion() or alpha() if these are wrong"
                if verdict is False
                else "write both in forms that are more alike; no numbers were found for which they differ"
            )
            + self._unwritten(),
        )

    def _unwritten(self) -> str:
        """What may be missing in the recursion rather than wrong anywhere."""
        names = sorted(self.path.unwritten)
        entries = ", ".join(f"step.hyper_after[{name!r}]" for name in names)
        told = f"; coefficients() reads {entries}, which recursion() does not set: taken to be as before the step"
        return told if names else ""
