"""The terms of an update by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from explaind_core.decomposition.decompose import StepDecomposition
from explaind_core.rules import JointRule, UpdateRule
from explaind_core.run import Replay, Run

__all__ = ["Updates", "term_names", "updates_of"]

Updates = Mapping[str, Tensor]


def term_names(run: Run) -> tuple[str, ...]:
    """The terms of a run's updates.

    There is a prehistory only where recording began with a used optimizer or a rule's filter starts elsewhere than at
    zero, a penalty only where the loss had one.
    """
    used = any(run.optimizer_state(0).values()) or any(rule.starts_elsewhere for rule in _rules_of(run))
    others = (("prehistory",) if used else ()) + (("penalty",) if run.penalty is not None else ())
    return ("kernel", "regularization", *others)


def _rules_of(run: Run) -> list[UpdateRule]:
    """The rules that explain a run, one for each of its optimizers."""
    named = [run.registry.rule_named(described["rule"]["name"]) for described in run.optimizers]
    given = [
        rule if rule is not None else None if listed is None else listed.rule
        for rule, listed in zip(run.given_rules, named, strict=True)
    ]
    found = [rule for rule in given if rule is not None]
    if len(found) == len(given) or not run.steps:
        return found
    # One whose plugin decides by the instance, and does not list it.
    rule = Replay(run).rule().rule
    return [member for member in rule.members if member is not None] if isinstance(rule, JointRule) else [rule]


def updates_of(split: StepDecomposition, names: Sequence[str]) -> dict[str, Updates]:
    """Term -> parameter name -> its share of the step's update; where it is zero, a name is left out.

    Args:
        split: the step.
        names: the terms that are asked for (see :func:`term_names`).
    """
    return {
        name: {n: getattr(u, name) for n, u in split.updates.items() if getattr(u, name) is not None} for name in names
    }
