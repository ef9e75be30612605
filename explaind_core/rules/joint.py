"""Several optimizers on one model: each parameter is explained by the rule of the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from explaind_core.errors import RecordingError, UnsupportedOptionError
from explaind_core.naming import plain_optimizer, qualified_name
from explaind_core.rules.missing import optimizer_inside
from explaind_core.rules.registry import RegisteredRule
from explaind_core.rules.rule import RecordedStep, StepCoefficients, UpdateRule

__all__ = ["JOINED_BY", "OWNER", "JointRule", "check_joinable", "each_optimizer", "each_rule", "joined"]

#: The entry of a stored parameter group that tells which of several optimizers it belongs to, counted from 0.
OWNER = "optimizer"
#: Between names of classes, where one text must name all of them.
JOINED_BY = " + "


class JointRule(UpdateRule):
    """The rules of several optimizers: a parameter's group tells which of them speaks for it.

    Args:
        members: one rule for each optimizer, in the order in which they were given to the Recorder; None where the
            registered one is meant.

    Example:
        >>> from explaind_core import InferredRule
        >>> first, second = InferredRule(momentum=0.9), InferredRule()
        >>> JointRule([first, second]).member({"lr": 0.1, "optimizer": 0}).momentum
        0.9
    """

    def __init__(self, members: Sequence[UpdateRule | None]) -> None:
        self.members = tuple(members)
        given = [rule for rule in self.members if rule is not None]
        self.closed_by_secant = any(rule.closed_by_secant for rule in given)  # type: ignore[misc]
        self.inferred = any(rule.inferred for rule in given)  # type: ignore[misc]

    def __str__(self) -> str:
        return JOINED_BY.join("registered" if rule is None else str(rule) for rule in self.members)

    def member(self, hyper: Mapping[str, Any]) -> UpdateRule:
        """The rule of the optimizer that a parameter group with these hyper-parameters belongs to."""
        rule: UpdateRule | None = self.members[hyper[OWNER]]
        assert rule is not None  # a replay looks up the registered ones
        return rule

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """Those of the rule that speaks for the parameter."""
        return self.member(step.hyper).coefficients(step)


def each_optimizer(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """One optimizer or several, as a list; those of frameworks without their shells.

    Args:
        optimizer: one, or a list of different ones.

    Raises:
        RecordingError: none is given, or something else, or one of them twice.
    """
    given = [plain_optimizer(each) for each in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    strangers = [type(o).__name__ for o in given if not isinstance(o, torch.optim.Optimizer)]
    if strangers or not given or len({id(o) for o in given}) < len(given):
        inside = next((found for found in map(optimizer_inside, given) if strangers and found[1] is not None), None)
        raise RecordingError(
            "the optimizer to record is not an optimizer, or a list of different ones",
            where="optimizer",
            expected="a torch.optim.Optimizer, or a list of them",
            got=strangers or [type(o).__name__ for o in given],
            remedy=inside and f"it wraps one: pass that, {inside[0]}, which is a {qualified_name(type(inside[1]))}",
        )
    return given


def each_rule(rule: UpdateRule | Sequence[UpdateRule | None] | None, count: int) -> list[UpdateRule | None]:
    """The rules that were given, one for each of ``count`` optimizers; None stands for the registered one.

    Args:
        rule: one for the only optimizer, a :class:`JointRule`, a list with one entry an optimizer, or None.
        count: how many optimizers there are.

    Raises:
        RecordingError: there are several optimizers and not one entry for each.
    """
    if rule is None:
        return [None] * count
    if isinstance(rule, JointRule):
        rule = rule.members
    given: list[UpdateRule | None] = list(rule) if isinstance(rule, Sequence) else [rule]
    if len(given) != count or not all(r is None or isinstance(r, UpdateRule) for r in given):
        raise RecordingError(
            "there is not one rule for each optimizer",
            where="rule",
            expected=f"{count} rules, None for the registered one" if count > 1 else "one rule, or None",
            got=[type(r).__name__ for r in given],
            remedy="pass rule=[rule of the first optimizer, None, ...]",
        )
    return given


def check_joinable(optimizers: Sequence[torch.optim.Optimizer], rules: Sequence[UpdateRule]) -> None:
    """Refuse optimizers that are recorded alone only.

    Args:
        optimizers: those that are recorded together.
        rules: the rule of each.

    Raises:
        UnsupportedOptionError: naming the first of them, and why.
    """
    for optimizer, rule in zip(optimizers, rules, strict=True):
        reasons = [
            (rule.iterations({}) is not None, "each of its steps is several, which iterate inside step(closure)"),
            (rule.flat, "its rule takes all tensors as one vector"),
            (rule.evaluates_elsewhere, "the model is evaluated elsewhere than where its gradients are taken"),
            (bool(rule.outside), "its state holds more than gradients give it"),
        ]
        for refused, reason in reasons:
            if refused:
                raise UnsupportedOptionError(
                    f"{qualified_name(type(optimizer))} cannot be recorded together with other optimizers: {reason}",
                    where=f"optimizer {list(optimizers).index(optimizer)} of {len(optimizers)}",
                    expected="optimizers that make one step of their own parameters from one gradient",
                    remedy="record it alone, or train its parameters with another optimizer",
                )


def joined(registered: Sequence[RegisteredRule]) -> RegisteredRule:
    """The rules of all optimizers as one; the rule itself where there is one optimizer only."""
    if len(registered) == 1:
        return registered[0]
    texts = {
        field: JOINED_BY.join(str(getattr(r, field)) for r in registered) for field in ("plugin", "package", "version")
    }
    return RegisteredRule(JointRule([r.rule for r in registered]), **texts)
