"""prove(): the declaration equals the recursion, term by term; or which term does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import sympy  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from explaind_core.coefficients import UpdateRule
from explaind_core.errors import ProofError
from explaind_core.symbolic.branches import Branch, branches
from explaind_core.symbolic.closed import ClosedForms
from explaind_core.symbolic.compare import Comparison
from explaind_core.symbolic.unroll import Configuration, Path, configurations

__all__ = ["Proof", "ProvedConfiguration", "prove"]


@dataclass(frozen=True)
class ProvedConfiguration:
    """One combination of values of the options in ``proved_for``, proved.

    Attributes:
        options: the combination; ``...`` is any positive number.
        alpha: alpha_{s,i} at constant hyper-parameters, as sympy expressions in s and i: the key "s,i" for 1 < i < s,
            and "s,s", "s,1", "1,1" where that formula does not hold. Empty where there is no such formula.
        regularization: r_s, likewise; None where there is no such formula.
        compared: whether ``alpha`` was compared with a closed form that the rule gives.
        cases: how many ways through the code there were.
    """

    options: Configuration
    alpha: Mapping[str, Any]
    regularization: Any
    compared: bool
    cases: int

    def latex(self) -> str:
        """The formulas in LaTeX, one a line."""
        lines = [rf"\alpha_{{{pair}}} = {sympy.latex(expr)}" for pair, expr in self.alpha.items()]
        regularization = [] if self.regularization is None else [f"r_s = {sympy.latex(self.regularization)}"]
        return "\n".join(lines + regularization)

    def __str__(self) -> str:
        return "\n".join([*(f"alpha_{{{pair}}} = {expr}" for pair, expr in self.alpha.items()), f"r_s = {self.regularization}"])


@dataclass(frozen=True)
class Proof:
    """What :func:`prove` showed. Prints as a table.

    Attributes:
        rule: the rule's name. steps: how many steps were unrolled. configurations: what it was proved for.
        reason: why there is nothing to prove, where there is not.
    """

    rule: str
    steps: int
    configurations: tuple[ProvedConfiguration, ...] = ()
    reason: str = ""

    @property
    def proved(self) -> bool:
        """Whether the declaration was shown to be the recursion."""
        return not self.reason

    def __str__(self) -> str:
        if not self.proved:
            return f"{self.rule}: not proved: {self.reason}\n"
        table = Table(title=f"{self.rule}: the declaration is the optimizer's recursion", show_lines=True)
        for column in ("options", "closed forms (constant hyper-parameters)"):
            table.add_column(column, overflow="fold")
        groups: dict[str, list[ProvedConfiguration]] = {}
        for found in self.configurations:
            groups.setdefault(str(found), []).append(found)
        for formulas, members in groups.items():
            table.add_row(_ranges([m.options for m in members]), formulas)
        cases = sum(c.cases for c in self.configurations)
        text = StringIO()
        console = Console(file=text, width=100)
        console.print(table)
        console.print(f"{len(self.configurations)} configurations, {cases} cases, {self.steps} steps each")
        return text.getvalue()


def _ranges(several: list[Configuration]) -> str:
    """The values that each option takes in some configurations."""
    seen: dict[str, list[str]] = {}
    for options in several:
        for name, value in options.items():
            shown = seen.setdefault(name, [])
            if _shown(value) not in shown:
                shown.append(_shown(value))
    return "\n".join(f"{name}: {', '.join(values)}" for name, values in seen.items())


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shown, value))})"
    return "any" if value is ... else str(value)


def prove(rule: UpdateRule | type[UpdateRule], steps: int = 3) -> Proof:
    """Prove that a rule's declared coefficients are its optimizer's own recursion.

    What the rule's own ``coefficients`` returns on symbols is unrolled beside its ``recursion``, with other
    hyper-parameters at every step; all coefficients of past gradients and parameters must agree. With constant
    hyper-parameters, alpha_{s,i} must be the rule's ``alpha`` for all s and i, if it gives one.

    Args:
        rule: the rule, with a ``recursion``, or with ``no_closed_form`` to say why it has none.
        steps: how many steps to unroll.

    Raises:
        ProofError: naming the configuration, the step and the term that differs, or what the rule lacks.

    Example:
        >>> from explaind_optimizers import AdamWRule
        >>> proof = prove(AdamWRule)
        >>> proof.proved
        True
        >>> print(proof.configurations[0])
        alpha_{s,i} = ...
    """
    checked = rule() if isinstance(rule, type) else rule
    name = type(checked).__name__
    if checked.no_closed_form:
        return Proof(name, 0, reason=checked.no_closed_form)
    if type(checked).recursion is UpdateRule.recursion:
        raise ProofError(
            f"{name} has no recursion to be proved against",
            expected="a method recursion(self, step) that returns the parameter after the step",
            remedy="write one step of the optimizer in it, as its paper does, or say why not: no_closed_form = '...'",
        )
    return Proof(name, steps, tuple(_prove(checked, c, steps) for c in configurations(checked)))


def _prove(rule: UpdateRule, configuration: Configuration, steps: int) -> ProvedConfiguration:
    options = ", ".join(f"{n}={_shown(v)}" for n, v in configuration.items())
    ways: list[tuple[Branch, Path]] = [(Branch(), Path(rule, configuration))]
    every: list[tuple[Branch, Path]] = []
    for _ in range(steps):
        ahead: dict[Any, tuple[Branch, Path]] = {}
        for known, path in ways:
            for branch, longer in branches(lambda _, path=path: path.advance(), known):
                compare = Comparison(longer, branch, _where(options, branch))
                compare.update()
                compare.states()
                every.append((branch, longer))
                # Ways that lead to the same state go on together, with what is known on both of them.
                met = ahead.get(longer.key)
                ahead[longer.key] = (branch, longer) if met is None else (met[0].common(branch), met[1])
        ways = list(ahead.values())
    proved = ProvedConfiguration(configuration, {}, None, False, len(every))
    if any(isinstance(value, list) for value in configuration.values()):
        return proved  # closed forms are for constant hyper-parameters
    for branch, forms in branches(lambda _: ClosedForms(ways[0][1])):
        Comparison(ways[0][1], branch, _where(options, branch)).alphas(forms)
        alpha = forms.alpha(branch)
        proved = replace(proved, alpha=alpha, regularization=forms.regularization(alpha), compared=bool(forms.own))
    if proved.compared:
        for branch, path in every:
            Comparison(path, branch, _where(options, branch)).closed(path.steps[-1], forms)
    return proved


def _where(options: str, branch: Branch) -> str:
    return "; ".join(part for part in (options, str(branch)) if part)
