"""Which rules explain a run, and what makes its optimizers again: given, recorded or registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from explaind_core.coefficients import UpdateRule
from explaind_core.errors import QuestionError, StoreError
from explaind_core.joint import JointRule, each_rule
from explaind_core.stored_steps import StoredSteps

__all__ = ["OptimizerFactory", "makers_of", "rule_of"]

#: Builds an optimizer from a list of parameter groups.
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def rule_of(run: StoredSteps, rule: UpdateRule | Sequence[UpdateRule | None] | None) -> UpdateRule | None:
    """The rule, or the rules as one, that were given, or inferred; None where all are the registered ones."""
    count = len(run.optimizers)
    if isinstance(rule, UpdateRule):
        return rule
    rules = [_inferred_rule(run, o["rule"]) for o in run.optimizers] if rule is None else each_rule(rule, count)
    if all(each is None for each in rules):
        return None
    return rules[0] if count == 1 else JointRule(rules)


def makers_of(
    run: StoredSteps, make: OptimizerFactory | Sequence[OptimizerFactory | None] | None
) -> Sequence[OptimizerFactory | None]:
    """What makes each of the run's optimizers; None where its class does."""
    count = len(run.optimizers)
    if make is None:
        return [None] * count
    makers = list(make) if isinstance(make, Sequence) else [make]
    if len(makers) != count:
        raise QuestionError(
            "there is not one maker for each optimizer",
            where="make_optimizer",
            expected=f"a list of {count} functions, for {run.manifest['optimizer']}" if count > 1 else "a function",
            got=f"{len(makers)} of them",
            remedy="pass None for an optimizer that needs none",
        )
    return makers


def _inferred_rule(run: StoredSteps, recorded: Mapping[str, Any]) -> UpdateRule | None:
    """The inferred rule that the run was recorded with: nothing but its numbers is needed to make it again."""
    if not recorded.get("inferred"):
        return None
    from explaind_core.inferred import InferredRule  # a later stage, which needs a Run to be fitted

    try:
        return InferredRule(**recorded["settings"])
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"the settings of the run's inferred rule cannot be read: {error}",
            where=run.path / "manifest.json",
            expected="the arguments of explaind.InferredRule",
            got=recorded.get("settings"),
            remedy="pass open_run(..., rule=explaind.InferredRule(...))",
        ) from error
