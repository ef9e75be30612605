"""The comparisons of a proof, each of which names the term that differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from explaind_core.errors import ProofError
from explaind_core.symbolic.algebra import as_symbols, is_zero, linear_coefficients, tidy
from explaind_core.symbolic.branches import Branch
from explaind_core.symbolic.closed import ClosedForms
from explaind_core.symbolic.tensor import exact
from explaind_core.symbolic.unroll import Path, UnrolledStep

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """The comparisons for one configuration and one way through the code.

    Attributes:
        path: the rule's recursion and declaration. branch: the way. where: both in words.
    """

    path: Path
    branch: Branch
    where: str

    def update(self) -> None:
        """The newest update: every coefficient of a past gradient and parameter."""
        step = self.path.steps[-1]
        terms = self._terms(step)
        differing = [term for term in terms if is_zero(term[1] - term[2], self.branch) is not True]
        # States as symbols may hide that a rule computes them anew: then the whole update decides.
        if differing:
            whole = self.path.expand(step.expected - step.got)
            verdict = is_zero(whole, self.branch)
            if verdict is not True:
                term, expected, got = differing[0]
                self._refute("its recursion", term, expected, got, step.clock, verdict)

    def states(self) -> None:
        """The filter's states and the entries of the optimizer's state that ``filter_states`` names."""
        for m, entry in zip(self.path.filter, self.path.rule.filter_states, strict=False):
            expected, got = exact(self.path.state.get(entry, 0)), exact(m)
            verdict = is_zero(self.path.expand(expected - got), self.branch)
            if verdict is not True:
                term = f"the filter's state and the optimizer's {entry!r}, which filter_states names"
                self._refute("its recursion", term, expected, got, len(self.path.steps), verdict)

    def alphas(self, forms: ClosedForms) -> None:
        """The rule's ``alpha`` and what it declares, for all s and i."""
        for pair, expected in forms.declared.items():
            if pair in forms.own:
                verdict = is_zero(expected - forms.own[pair], self.branch)
                if verdict is not True:
                    shown = (forms.readable(pair, x) for x in (expected, forms.own[pair]))
                    self._refute("the closed form in its alpha()", f"alpha_{{{pair}}}", *shown, None, verdict)

    def closed(self, step: UnrolledStep, forms: ClosedForms) -> None:
        """The update of one step at constant hyper-parameters and the sums of Theorem 3.1 and Corollary 3.2.

        The coefficient of g_i is ``-P_s alpha_{s,i} E_i``; that of theta_{i-1} is ``-P_s alpha_{s,i} W_i``, and
        ``-rho_s`` for the newest.
        """
        found = linear_coefficients(as_symbols(step.expected), [*step.gradients, *step.thetas])
        if found is None:
            return
        past, constant = step.declared, self.path.constant()
        alphas = [forms.author(step.clock, i) for i in range(1, step.clock + 1)]
        P, rho = past[-1].P, past[-1].rho
        kernel = [-P * a * declared.E for a, declared in zip(alphas, past, strict=True)]
        decay = [-P * a * declared.W for a, declared in zip(alphas, past, strict=True)]
        decay[-1] -= rho
        symbols = [*step.gradients, *step.thetas]
        for symbol, expected, got in zip(symbols, found[:-1], [*kernel, *decay], strict=True):
            at_constant = [as_symbols(x).xreplace(constant) for x in (expected, got)]
            verdict = is_zero(self.path.expand(at_constant[0] - at_constant[1]), self.branch)
            if verdict is not True:
                self._refute("the sums over its alpha()", self._name(symbol, step), *at_constant, step.clock, verdict)

    def _terms(self, step: UnrolledStep) -> list[tuple[str, Any, Any]]:
        """What is compared, by name: coefficient by coefficient where both updates are linear."""
        facts = self.branch.facts
        named = [(x, facts(x)) for x in [*reversed(step.gradients), *reversed(step.thetas)]]
        inputs = {symbol: x for x, symbol in named if symbol.is_Symbol}
        expected, got = (facts(as_symbols(x)) for x in (step.expected, step.got))
        rows = [linear_coefficients(x, list(inputs)) for x in (expected, got)]
        if rows[0] is None or rows[1] is None:
            return [("the update as a whole, which is not linear in the gradient", expected, got)]
        names = [*(self._name(x, step) for x in inputs.values()), "what depends on no gradient and no parameter"]
        return list(zip(names, *rows, strict=True))

    @staticmethod
    def _name(symbol: Any, step: UnrolledStep) -> str:
        kind, number = symbol.name.rsplit("_", 1)
        if kind == "g":
            return f"the coefficient of g_{number}, -P_{step.clock} alpha_{{{step.clock},{number}}} E_{number}"
        i = int(number) + 1
        decoupled = f" - rho_{i}" if i == step.clock else ""
        return f"the coefficient of theta_{number}, -P_{step.clock} alpha_{{{step.clock},{i}}} W_{i}{decoupled}"

    def _refute(self, other: str, term: str, expected: Any, got: Any, clock: int | None, verdict: bool | None) -> None:
        sure = "is not" if verdict is False else "could not be proved to be"
        where = self.where if clock is None else f"the update from theta_{clock - 1} to theta_{clock}; {self.where}"
        raise ProofError(
            f"what {type(self.path.rule).__name__} declares {sure} {other}: {term}",
            where=where,
            expected=tidy(expected),
            got=tidy(got),
            remedy="correct the term in coefficients(), or in recursion() or alpha() if these are wrong"
            if verdict is False
            else "write both in forms that are more alike; no numbers were found for which they differ",
        )
