"""prove(): the declaration equals the recursion, term by term; or which term does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

import sympy  # type: ignore[import-untyped]
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from explaind_core.errors import ProofError
from explaind_core.rules import UpdateRule
from explaind_core.symbolic.algebra import latex, text
from explaind_core.symbolic.branches import Branch, branches
from explaind_core.symbolic.closed import ClosedForms
from explaind_core.symbolic.compare import Comparison
from explaind_core.symbolic.recursion import Configuration, configurations
from explaind_core.symbolic.tensor import exact
from explaind_core.symbolic.unroll import Path

__all__ = ["Proof", "ProvedConfiguration", "prove"]

Way = tuple[Branch, Path]


@dataclass(frozen=True)
class ProvedConfiguration:
    """One combination of values of the options in ``proved_for``, proved.

    Attributes:
        options: the combination; ``...`` is any positive number.
        every_step: whether it was proved for every step, by induction, and not only for the first ones.
        cases: how many ways through the code there were.
        alpha: alpha_{s,i} at constant hyper-parameters, as sympy expressions in s and i: the key "s,i" for 1 < i < s,
            and "s,s", "s,1", "1,1" where that formula does not hold. Empty where there is no one formula.
        regularization: r_s, likewise; None where there is no one formula.
        compared: whether ``alpha`` was compared with a closed form that the rule gives.
        unwritten: entries of the group that ``coefficients`` reads in ``hyper_after`` and ``recursion`` does not set:
            the proof takes the optimizer to leave them as they were.
    """

    options: Configuration
    every_step: bool
    cases: int
    alpha: Mapping[str, Any]
    regularization: Any
    compared: bool
    unwritten: tuple[str, ...] = ()

    def latex(self) -> str:
        """The formulas in LaTeX, one a line."""
        return "\n".join(f"{name} = {latex(expr)}" for name, expr in self._formulas(r"\alpha"))

    def _formulas(self, alpha: str = "alpha") -> Iterator[tuple[str, Any]]:
        yield from ((f"{alpha}_{{{pair}}}", expr) for pair, expr in self.alpha.items())
        if self.regularization is not None:
            yield "r_s", self.regularization

    def __str__(self) -> str:
        return "\n".join(f"{name} = {text(expr)}" for name, expr in self._formulas())


@dataclass(frozen=True)
class Proof:
    """What :func:`prove` showed. Prints as a table.

    Attributes:
        rule: the rule's name.
        steps: how many steps were unrolled.
        configurations: what it was proved for.
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
        table = Table(show_lines=True)
        for column in ("options", "at constant hyper-parameters"):
            table.add_column(column, overflow="fold")
        groups: dict[str, list[Configuration]] = {}
        for found in self.configurations:
            groups.setdefault(str(found), []).append(found.options)
        for formulas, members in groups.items():
            table.add_row(escape(self._ranges(members)), escape(formulas))
        general = sum(c.every_step for c in self.configurations)
        rest = len(self.configurations) - general
        page = StringIO()
        console = Console(file=page, width=100)
        console.print(f"{self.rule}: the declaration is the optimizer's recursion")
        console.print(table)
        for count, span in ((general, "every step, by induction"), (rest, f"the first {self.steps} steps")):
            if count:
                console.print(f"{count} configuration{'s'[: count > 1]}: {span}")
        if unwritten := sorted({name for c in self.configurations for name in c.unwritten}):
            entries = ", ".join(unwritten)
            console.print(f"provided that the step leaves as it was, as recursion() does not set it: {entries}")
        return page.getvalue()

    def _ranges(self, members: list[Configuration]) -> str:
        """The values that each option takes in some configurations, if it takes several in all."""
        every, some = (
            {n: list(dict.fromkeys(shown(c[n]) for c in of)) for n in of[0]}
            for of in ([c.options for c in self.configurations], members)
        )
        return "\n".join(f"{n}: {' or '.join(some[n])}" for n in some if len(every[n]) > 1)


def shown(value: Any) -> str:
    """A value of ``proved_for`` in words.

    Example:
        >>> shown((..., None))
        '(any, None)'
    """
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})" if isinstance(value, tuple) else " then ".join(map(shown, value))
    known = {id(...): "any", id(NotImplemented): "absent"}
    return known.get(id(value)) or ("counted" if callable(value) else str(value))


def prove(rule: UpdateRule | type[UpdateRule], steps: int = 3) -> Proof:
    """Prove that a rule's declared coefficients are its optimizer's own recursion.

    What the rule's own ``coefficients`` returns on symbols is unrolled beside its ``recursion``, with other
    hyper-parameters at every step; all coefficients of past gradients and parameters must agree. With constant
    hyper-parameters, alpha_{s,i} must be the rule's ``alpha`` for all s and i, if it gives one.

    Args:
        rule: the rule, with a ``recursion``, or with ``no_closed_form`` to say why it has none.
        steps: how many steps to unroll.

    Raises:
        DisprovedError: naming the configuration, the step and the term that differs.
        ProofError: it is neither proved nor disproved; naming what was not shown, or what the rule lacks.

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
    if not checked.has_recursion:
        raise ProofError(
            f"{name} has no recursion to be proved against",
            expected="a method recursion(self, step) that returns the parameter after the step",
            remedy="write one step of the optimizer in it, as its paper does, or say why not: no_closed_form = '...'",
        )
    return Proof(name, steps, tuple(_Configured(checked, c).prove(steps) for c in configurations(checked)))


def _signless(ways: list[Way]) -> set[str]:
    """The entries of state and group that may be negative after some step."""
    entries = ((*path.state.items(), *path.group.items()) for _, path in ways)
    return {name for found in entries for name, x in found if not exact(x).is_nonnegative}


class _Configured:
    """The proof for one configuration."""

    def __init__(self, rule: UpdateRule, configuration: Configuration) -> None:
        self._rule, self._options = rule, configuration
        # Closed forms and inductions have no place for a schedule.
        self._scheduled = any(isinstance(value, list) for value in configuration.values())

    def prove(self, steps: int) -> ProvedConfiguration:
        ways, every = self._unroll(steps)
        general = [] if self._scheduled else self._induction(ways, every)
        closed = [] if self._scheduled else self._closed(ways[0][1], every)
        alphas = [f.readable for f in closed]
        # Where P_s differs from case to case, it stays a symbol.
        regularizations = {f.regularization() for f in closed}
        if len(regularizations) > 1:
            regularizations = {f.regularization(sympy.Symbol("P_s")) for f in closed}
        return ProvedConfiguration(
            self._options,
            every_step=bool(general),
            cases=len(every) + len(general),
            alpha=alphas[0] if alphas and all(a == alphas[0] for a in alphas) else {},
            regularization=regularizations.pop() if len(regularizations) == 1 else None,
            compared=any(f.own for f in closed),
            unwritten=tuple(sorted({name for _, path in (*every, *general) for name in path.unwritten})),
        )

    def _unroll(self, steps: int) -> tuple[list[Way], list[Way]]:
        """The first steps, from the start: the ways at the end, and all ways with their newest step."""
        ways: list[Way] = [(Branch(), Path(self._rule, self._options))]
        every: list[Way] = []
        for _ in range(steps):
            ahead: dict[Any, Way] = {}
            for known, path in ways:
                for branch, longer in self._advanced(path, known):
                    every.append((branch, longer))
                    # Ways that lead to the same state go on together, with what is known on both of them.
                    met = ahead.get(longer.key)
                    ahead[longer.key] = (met[0].common(branch), met[1].merged(longer)) if met else (branch, longer)
            ways = list(ahead.values())
        return ways, every

    def _induction(self, ends: list[Way], every: list[Way]) -> list[Way]:
        """Any step but the first, from symbols for whatever the state holds; empty where there is no hypothesis."""
        found: list[Way] = []
        signless = _signless(every)
        for path in {frozenset(p.state): p for _, p in ends}.values():
            if len(path.filter) > len(self._rule.filter_states):
                return []
            ways = self._advanced(path.anywhere(signless), None)
            while not _signless(ways) <= signless:  # what was taken to be never negative must stay so
                signless |= _signless(ways)
                ways = self._advanced(path.anywhere(signless), None)
            found += ways
        return found

    def _advanced(self, path: Path, known: Branch | None) -> list[Way]:
        ways = list(branches(lambda _: path.advance(), known))
        for branch, longer in ways:
            compare = self._comparison(branch, longer)
            compare.update()
            compare.states()
        return ways

    def _closed(self, path: Path, every: list[Way]) -> list[ClosedForms]:
        several = list(branches(lambda _: ClosedForms(path)))
        for branch, forms in several:
            self._comparison(branch, path).alphas(forms)
        if several[0][1].own:
            for branch, way in every:
                self._comparison(branch, way).closed(several[0][1])
        return [forms for _, forms in several]

    def _comparison(self, branch: Branch, path: Path) -> Comparison:
        listed = {**self._rule.fixed, **self._rule.proved_for}.items()
        several = {n for names, values in listed if len(values) > 1 for n in names.split()}
        return Comparison(path, branch, ", ".join(f"{n}={shown(v)}" for n, v in self._options.items() if n in several))
