"""``explaind optimizers``: the registered rules, one line an optimizer, for eyes and for grep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console

from explaind_core.errors import QuestionError
from explaind_core.naming import qualified_name
from explaind_core.rules import RegisteredRule, UpdateRule, default_registry

__all__ = ["listed_optimizers", "optimizers", "proof_word"]

console = Console()

#: The columns, what stands between two of them, and the least that a shortened name is left with.
HEAD = ("optimizer", "rule", "package", "proof")
GAP = "  "
LEAST = 12
#: For a rule that names no class: its plugin looks at the instance.
UNNAMED = "(by instance)"

Row = tuple[str, str, str, str]


def proof_word(rule: UpdateRule) -> str:
    """What there is of a symbolic proof, without making it: ``"written"``, ``"no form"`` (no closed one) or ``"none"``.

    Example:
        >>> from explaind_optimizers import AdamWRule, MuonRule
        >>> proof_word(AdamWRule()), proof_word(MuonRule())
        ('written', 'no form')
    """
    return "no form" if rule.no_closed_form else "written" if rule.has_recursion else "none"


def listed_optimizers(rules: Sequence[RegisteredRule], width: int | None = None) -> Iterator[str]:
    """The table of ``rules``, line by line: a head, then one line an optimizer, sorted by its class.

    Args:
        rules: of a registry.
        width: of a terminal, in columns: names that are too long for it lose their modules (``torch…AdamW``), and
            keep their class. None: every name in full, however long the lines are.

    Example:
        >>> from explaind_core.plugins import default_registry
        >>> lines = list(listed_optimizers(default_registry().rules(), 80))
        >>> max(map(len, lines)) <= 80, lines[0].split()
        (True, ['optimizer', 'rule', 'package', 'proof'])
    """
    rows = sorted(
        (name, qualified_name(type(r.rule)), f"{r.package} {r.version}", proof_word(r.rule))
        for r in rules
        for name in r.rule.optimizers or (UNNAMED,)
    )
    table: list[Row] = [HEAD, *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(HEAD))]
    if width is not None:
        widths[:2] = _names_within(width - sum(widths[2:]) - len(GAP) * (len(HEAD) - 1), widths)
    for row in table:
        cells = (_shortened(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True))
        yield GAP.join(cells).rstrip()


def _names_within(both: int, widths: Sequence[int]) -> tuple[int, int]:
    """How many columns the optimizers get, and the rules: somewhat more for the optimizers, which are looked for."""
    rule = min(widths[1], max(LEAST, both * 6 // 13))
    optimizer = min(widths[0], max(LEAST, both - rule))
    return optimizer, min(widths[1], max(rule, both - optimizer))


def _shortened(name: str, width: int) -> str:
    """The longest of ``a.b.c.Class``, ``a…c.Class``, ``a…Class``, ``…c.Class`` and ``…Class`` that fits."""
    if len(name) <= width:
        return name
    modules, _, last = name.rpartition(".")
    top, inner = modules.partition(".")[0], f"{modules.rpartition('.')[2]}.{last}"
    shorter = (f"{top}…{inner}", f"{top}…{last}", f"…{inner}", f"…{last}") if modules else ()
    return next((text for text in shorter if len(text) <= width), "…" + last[len(last) - width + 1 :])


def optimizers(
    name: Annotated[
        str | None, typer.Argument(help="only optimizers whose class has this in its name, with the options modelled")
    ] = None,
) -> None:
    """List the registered rules, one line an optimizer: class, rule, package and version, proof."""
    rules = default_registry().rules()
    if name is not None:
        rules = tuple(r for r in rules if any(name.lower() in known.lower() for known in r.rule.optimizers))
        if not rules:
            raise QuestionError(
                "no optimizer with a rule is called like that",
                where="explaind optimizers",
                expected="a part of a class's qualified name, such as adamw",
                got=name,
                remedy="explaind optimizers lists all of them",
            )
    lines = list(listed_optimizers(rules, console.width if console.is_terminal else None))
    if name is not None:
        lines += _options(rules)
    for line in lines:  # not the console: it would wrap what is longer than its width
        typer.echo(line)


def _options(rules: Sequence[RegisteredRule]) -> Iterator[str]:
    for registered in rules:
        rule = registered.rule
        yield ""
        yield f"{qualified_name(type(rule))} models"
        yield from (f"  {option}" for option in sorted(rule.options))
        yield from (f"  {option}: {' or '.join(map(repr, values))}" for option, values in sorted(rule.fixed.items()))
