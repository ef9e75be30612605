"""The studies by name: what ``explaind study NAME`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from explaind_core.errors import QuestionError
from explaind_studies.report import Report, keep
from explaind_studies.workbook import Workbook

__all__ = ["STUDIES", "Study", "known_study", "missing_packages", "run_study"]


@dataclass(frozen=True)
class Study:
    """An experiment of the paper.

    Attributes:
        name: on the command line.
        title: what it reproduces.
        module: that has ``PAPER`` and ``QUICK``, two settings (dataclasses), and
            ``study(workbook, setting) -> Report``.
    """

    name: str
    title: str
    module: str

    def setting(self, *, quick: bool = False, **changes: Any) -> Any:
        """The paper's setting, or the quick one, with those ``changes`` that are not None.

        Raises:
            QuestionError: the study has no such setting.
        """
        found = getattr(import_module(self.module), "QUICK" if quick else "PAPER")
        given = {k: v for k, v in changes.items() if v is not None}
        known = {f.name for f in fields(found)}
        if unknown := sorted(set(given) - known):
            raise QuestionError(
                f"the study {self.name!r} has no setting {unknown[0]!r}", expected=sorted(known), got=unknown
            )
        return replace(found, **given)


#: In the paper's order.
STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study("table1", "Table 1: the rebuilt predictions against the models", "explaind_studies.table1"),
        Study("pruning", "Figure 2: pruning by importance", "explaind_studies.pruning"),
        Study("grokking", "Section 5 and appendix E: grokking modular addition", "explaind_studies.grokking"),
    )
}


def known_study(name: str) -> Study:
    """The study of that name.

    Raises:
        QuestionError: there is none.

    Example:
        >>> known_study("table1").title
        'Table 1: the rebuilt predictions against the models'
    """
    if name not in STUDIES:
        raise QuestionError(f"there is no study {name!r}", where="explaind study", expected=sorted(STUDIES), got=name)
    return STUDIES[name]


def missing_packages() -> list[str]:
    """Which of the packages of the extra ``studies`` are not installed.

    Example:
        >>> missing_packages()
        []
    """
    names = {"plotly": "plotly", "scipy": "scipy", "sklearn": "scikit-learn"}
    return [package for module, package in names.items() if find_spec(module) is None]


def run_study(
    name: str,
    folder: Path,
    setting: Any,
    *,
    command: str,
    kept: Path | None = None,
    console: Console | None = None,
    progress: bool = True,
) -> Report:
    """Run a study in ``folder``, or continue it there; write its report, and keep a copy of it.

    Args:
        name: one of ``STUDIES``.
        folder: where the study lies.
        setting: of that study.
        command: that starts it, for the page.
        kept: where tables and pictures are to be copied, None for nowhere.
        console: for what is said on the way; standard output by default.
        progress: whether to show bars.

    Raises:
        QuestionError: there is no such study.
        StoreError: the folder holds something else.
    """
    module = known_study(name).module
    console = console or Console()
    book = Workbook(folder, name, setting, console=console, progress=progress)
    function: Callable[[Workbook, Any], Report] = import_module(module).study
    report = function(book, setting)
    page = report.write(folder, command)
    if kept is not None:
        keep(folder, kept)
    for claim in report.claims:
        console.print(f"{claim.where}: {claim.text} -> {claim.verdict}: {claim.measure}: {claim.value}", markup=False)
    for check, (holds, measured) in report.checks.items():
        console.print(f"{'holds' if holds else 'DOES NOT HOLD'}: {check}: {measured}", markup=False, highlight=False)
    console.print(f"{report.seconds:,.0f} s in all; wrote {page}", highlight=False, soft_wrap=True)
    return report
