"""docs/optimizers.md from the registry of rules: equations, coefficients, options, measured errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from explaind_core.naming import qualified_name
from explaind_core.rules import Registry, UpdateRule, default_registry
from explaind_core.symbolic import standing

__all__ = ["lines_of_algebra", "tables"]

_KIT = ("one_step", "rollout", "alphas", "adjoints", "one_step_float32")


def tables(measured: Mapping[str, Mapping[str, Any]], *, registry: Registry | None = None) -> str:
    """The rules as a Markdown page: one table of errors, one section a rule.

    Args:
        measured: rule name -> its errors as measured: ``kit`` (family -> the fields of
            :class:`explaind_core.conformance.Conformance`, and ``tolerance``) and ``run`` (of a recorded training).
        registry: whose rules.

    Example:
        >>> page = tables({})
        >>> "## SGD" in page
        True
    """
    rules = (registry or default_registry()).rules()
    head = (
        "| optimizer | one step, float64 | rollout | alphas | adjoints | one step, float32 | drawn trainings | proof |"
    )
    lines = [head, "|" + "---|" * 8]
    sections = []
    for registered in rules:
        rule = registered.rule
        proof, formulas = _proof(rule)
        found = measured.get(qualified_name(type(rule)), {})
        families = found.get("kit", {})
        cells = [_worst(families, name) for name in _KIT]
        cases = sum(int(f["cases"]) for f in families.values())
        name = _title(rule)
        lines.append(f"| [{name}](#{_anchor(name)}) | {' | '.join(cells)} | {cases or '-'} | {proof} |")
        sections.append(_section(name, rule, f"{registered.package} {registered.version}", formulas, found))
    return "\n".join(lines) + "\n\n" + "\n".join(sections)


def lines_of_algebra(rule: UpdateRule | type[UpdateRule]) -> int:
    """Lines of code of ``coefficients`` without its docstring, comments and blank lines.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> lines_of_algebra(SGDRule) <= 20
        True
    """
    kind = rule if isinstance(rule, type) else type(rule)
    code = re.sub(r'r?""".*?"""', "", inspect.getsource(kind.coefficients), count=1, flags=re.DOTALL)
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def _title(rule: UpdateRule) -> str:
    return type(rule).__name__.removesuffix("Rule")


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _worst(families: Mapping[str, Mapping[str, Any]], name: str) -> str:
    return f"{max(float(f[name]) for f in families.values()):.1e}" if families else "-"


def _proof(rule: UpdateRule) -> tuple[str, list[str]]:
    """A word for the table, and the closed forms."""
    stands = standing(rule)
    proof = stands.proof
    if proof is None:
        return stands.word, [f"{stands.word[0].upper()}{stands.word[1:]}: {stands.text.splitlines()[0]}."]
    if not proof.proved:
        return "no closed form", [f"No symbolic proof: {proof.reason}."]
    forms: dict[str, list[str]] = {}
    for configuration in proof.configurations:
        if configuration.alpha:
            forms.setdefault(str(configuration), [])
    shown = ["Closed forms at constant hyper-parameters:", "", "```text", "\n\n".join(forms), "```"] if forms else []
    return f"{len(proof.configurations)} configurations", shown


def _section(name: str, rule: UpdateRule, package: str, formulas: list[str], found: Mapping[str, Any]) -> str:
    equation = (inspect.getdoc(type(rule)) or "").split("\nExample:")[0].strip()
    coefficients = (inspect.getdoc(type(rule).coefficients) or "").strip()
    fixed = [f"`{option}` in {list(values)}" for option, values in sorted(rule.fixed.items())]
    notes = [
        text
        for holds, text in (
            (rule.flat, "All tensors are one vector."),
            (rule.evaluates_elsewhere, "The model is evaluated elsewhere than its gradients are taken at."),
            (rule.closed_by_secant, "Steps are closed by a rank-one secant, whose size results carry."),
            (rule.iterations({}) is not None, "Each inner iteration is a step."),
        )
        if holds
    ]
    lines = [f"## {name}", "", equation, "", f"**Coefficients.** {coefficients}", *([" ".join(notes)] if notes else [])]
    lines += ["", *formulas, ""] if formulas else [""]
    lines += [
        f"- classes: {', '.join(f'`{o}`' for o in rule.optimizers)}",
        f"- rule: `{qualified_name(type(rule))}` of {package}, {lines_of_algebra(rule)} lines of algebra",
        f"- options: {', '.join(f'`{o}`' for o in sorted(rule.options))}",
    ]
    lines += [f"- only: {', '.join(fixed)}"] if fixed else []
    for label, family in found.get("kit", {}).items():
        errors = ", ".join(f"{n.replace('_', ' ')} {float(family[n]):.1e}" for n in _KIT)
        lines.append(f"- {label or 'drawn trainings'} ({family['cases']} cases): {errors}")
    if not found:
        lines.append("- not measured: no optimizer that it speaks for was installed")
    if "run" in found:
        lines.append("- " + found["run"]["text"])
    return "\n".join(lines) + "\n"
