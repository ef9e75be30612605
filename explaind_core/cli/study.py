"""``explaind study``: the paper's experiments, one by one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from explaind_core.errors import QuestionError

__all__ = ["INTERRUPTED", "study"]

#: The exit status of a command that was interrupted, as shells have it (128 + SIGINT).
INTERRUPTED = 130

console = Console()


def study(
    name: Annotated[str | None, typer.Argument(help="which; all are listed where nothing is said")] = None,
    out: Annotated[
        Path | None, typer.Option(help="where to work (runs/studies/NAME); an interrupted study continues there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a small version, within minutes")] = False,
    seed: Annotated[
        int | None, typer.Option(help="of data and initialisation (of the first run, where several)")
    ] = None,
    betas: Annotated[str | None, typer.Option(help="of AdamW (grokking): 0.9,0.98 or 0.98,0.99")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps at most (grokking, table1)")] = None,
    data: Annotated[Path | None, typer.Option(help="the folder of CIFAR-10's python files (pruning, table1)")] = None,
    parts: Annotated[str | None, typer.Option(help="only these experiments of the study, separated by commas")] = None,
    keep: Annotated[Path | None, typer.Option(help="copy the report, its tables and figures there")] = None,
) -> None:
    """Reproduce an experiment of the paper, beside the paper's values; 0 if everything computed is exact."""
    from explaind_studies.catalogue import STUDIES, known_study, missing_packages, run_study

    if name is None:
        table = Table("study", "reproduces")
        for known in STUDIES.values():
            table.add_row(known.name, known.title)
        console.print(table)
        raise typer.Exit(0)
    chosen = known_study(name)
    if missing := missing_packages():
        raise QuestionError(
            f"the studies need {', '.join(missing)}", where="explaind study",
            remedy="pip install 'explaind-core[studies]'",
        )  # fmt: skip
    changes: dict[str, Any] = {
        "seed": seed,
        "betas": _pair(betas),
        "most_steps": steps,
        "data": None if data is None else str(data),
        "experiments": None if parts is None else tuple(part.strip() for part in parts.split(",") if part.strip()),
    }
    setting = chosen.setting(quick=quick, **changes)
    folder = out if out is not None else Path("runs") / "studies" / (f"{name}-quick" if quick else name)
    command = "explaind " + shlex.join(sys.argv[1:])
    try:
        report = run_study(name, folder, setting, command=command, kept=keep, console=console)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was finished lies in {folder}: continue by the same command", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if report.holds else 1)


def _pair(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError(text)
    except ValueError as error:
        raise QuestionError(
            "those are no betas", where="--betas", expected="two numbers in [0, 1): 0.9,0.98", got=text
        ) from error
    return first, second
