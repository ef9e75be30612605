"""The verdict on a rule: the conformance kit on every family of trainings, and the symbolic proof."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

from explaind_core.conformance.coverage import Coverage
from explaind_core.conformance.one_case import Conformance
from explaind_core.conformance.search import check_trials
from explaind_core.errors import ConformanceError
from explaind_core.naming import qualified_name
from explaind_core.progress import track
from explaind_core.rules import Registry, Trials, UpdateRule, default_registry

__all__ = ["FamilyVerdict", "Verdict", "check_plugin"]


@dataclass(frozen=True)
class FamilyVerdict:
    """What the kit found on one family of trainings: its errors, or (``refuted``) the smallest case that fails.

    Attributes:
        trials: how its trainings are drawn.
        found: the largest errors; None where it is refuted.
        refuted: the smallest case that fails, as code that runs; empty where none does.
    """

    trials: Trials
    found: Conformance | None
    refuted: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a rule declares the truth. Prints as a table.

    Attributes:
        rule: its qualified name.
        families: what the kit found, family by family.
        proof: what :func:`explaind_core.symbolic.prove` printed, or why it proved nothing.
        proved: whether it did.
        disproved: whether the proof found a term that differs.
        standing: what there is of a proof, in words (see :class:`explaind_core.symbolic.Standing`).
        failed: whether a proof is written and does not hold, disproved or not.
        untested: options of the constructor that no drawn training set to anything but their defaults.
        unmodelled: options that the rule does not name; a recording refuses them where they are not at their defaults.
        unseen: options that are neither in the parameter groups nor attributes of their names: a recording can compare
            them with their defaults by the optimizer's other attributes only, before its first step.
    """

    rule: str
    families: tuple[FamilyVerdict, ...]
    proof: str
    proved: bool
    disproved: bool
    standing: str
    failed: bool
    untested: tuple[str, ...] = ()
    unmodelled: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every drawn training was explained."""
        return all(family.found is not None for family in self.families)

    @property
    def holds(self) -> bool:
        """Exact, and any proof that is written holds."""
        return self.exact and not self.failed

    def __str__(self) -> str:
        table = Table(title=f"{self.rule}: largest errors of drawn trainings")
        names = ("one_step", "rollout", "alphas", "adjoints", "store", "one_step_float32")
        for column in ("trainings", "cases", *(name.replace("_", " ") for name in names), "bound"):
            table.add_column(column)
        for family in self.families:
            label = family.trials.name or "drawn"
            if family.found is None:
                table.add_row(label, "", *["refuted"] * len(names), f"{family.trials.tolerance:.0e}")
            else:
                errors = (f"{getattr(family.found, name):.1e}" for name in names)
                table.add_row(label, str(family.found.cases), *errors, f"{family.trials.tolerance:.0e}")
        text = StringIO()
        console = Console(file=text, width=120)
        console.print(table)
        for family in self.families:
            if family.refuted:
                console.print(family.refuted, markup=False, highlight=False)
            if family.found is not None and family.found.refused:
                console.print(f"{family.found.refused} drawn combinations were refused by the optimizer's constructor")
        for options, what in (
            (self.untested, "left at their defaults, untested"),
            (self.unmodelled, "not named by the rule, refused in a recording unless at their defaults"),
            (self.unseen, "neither in the parameter groups nor an attribute of that name"),
        ):
            if options:
                console.print(f"{what}: {', '.join(options)}", markup=False, highlight=False)
        console.print(self.proof, markup=False, highlight=False)
        console.print(f"verdict: {'exact' if self.exact else 'REFUTED'}, {self.standing}")
        return text.getvalue()


def check_plugin(
    rule: UpdateRule | type[UpdateRule],
    *,
    max_examples: int = 100,
    registry: Registry | None = None,
    progress: bool = False,
) -> Verdict:
    """Run the conformance kit and the symbolic proof on a rule.

    Trainings are drawn as the rule's plugin says (hook ``explaind_trials``), or as the optimizer's constructor tells.

    Args:
        rule: the rule, or its class.
        max_examples: drawn trainings per family.
        registry: the plugins that are asked for trials, those of the installed packages by default.
        progress: whether to show a bar.

    Raises:
        ConformanceError: no optimizer that the rule speaks for is installed.

    Example:
        >>> from explaind_optimizers import AdamaxRule
        >>> check_plugin(AdamaxRule, max_examples=5).holds
        True
    """
    from explaind_core.symbolic import standing  # sympy is for proofs only

    checked = rule() if isinstance(rule, type) else rule
    every = (registry or default_registry()).trials_for(checked)
    families, coverage = [], Coverage(checked)
    for trials in track(every, len(every), "training", enabled=progress):
        try:
            found = check_trials(checked, coverage.watching(trials), max_examples=max_examples)
            families.append(FamilyVerdict(trials, found))
        except ConformanceError as error:
            families.append(FamilyVerdict(trials, None, str(error)))
    stands = standing(checked)
    return Verdict(
        rule=qualified_name(type(checked)),
        families=tuple(families),
        proof=stands.text,
        proved=stands.proved,
        disproved=stands.disproved,
        standing=stands.word,
        failed=stands.failed,
        untested=tuple(dict.fromkeys((*coverage.untested, *(name for t in every for name in t.untested)))),
        unmodelled=coverage.unmodelled,
        unseen=coverage.unseen,
    )
