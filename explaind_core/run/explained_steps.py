"""Which rules explain a run, and what makes its optimizers again: given, recorded or registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from explaind_core.data import IndexedDataset
from explaind_core.errors import CoefficientError, QuestionError, StoreError
from explaind_core.naming import qualified_name
from explaind_core.rules import (
    JOINED_BY,
    InferredRule,
    JointRule,
    RegisteredRule,
    Registry,
    UpdateRule,
    default_registry,
    each_rule,
    joined,
)
from explaind_core.run.optimizer_classes import another_rule, check_arguments, found_class, speaking_rule
from explaind_core.run.stored_steps import StoredSteps
from explaind_core.store import RunStore, mismatch
from explaind_core.training_step import rebuild_optimizer

__all__ = ["ExplainedSteps", "OptimizerFactory"]

#: Builds an optimizer from a list of parameter groups.
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
#: The arguments of an inferred rule as a manifest holds them.
_INFERRED: Any = {
    "momentum?": (int, float), "nesterov?": bool, "preconditioner?": str, "decay?": str, "bound?": (int, float),
    "force?": bool,
}  # fmt: skip
_INFERRED_NAMES = {name.removesuffix("?") for name in _INFERRED}


class ExplainedSteps(StoredSteps):
    """Recorded steps, and the rules that explain them.

    Args:
        store: where they lie.
        until: look at the steps 1..until only; None for all, ``"intact"`` for those before the first damage.
        damaged: read all that is intact.
        dataset: where inputs that were not stored are read again.
        point: which parameters ``theta`` returns, see :func:`explaind_core.open_run`.
        rule: the rule, or a list with one for each optimizer, instead of the registered ones.
        registry: the plugins to look for rules in; all installed ones by default.
        make_optimizer: what builds the optimizer, or a list for several, where a class alone does not.

    Attributes:
        registry: the plugins.
        rule: the rule that was given, or inferred; None where the registered one explains the run.
        optimizer_makers: what builds each of the optimizers; None where its class does.

    Raises:
        QuestionError: there is no such point; there is not one rule or maker for each optimizer.
        StoreError: there is no run, or it is damaged.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        until: int | str | None = None,
        damaged: bool = False,
        dataset: IndexedDataset | None = None,
        point: str = "gradient",
        rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
        registry: Registry | None = None,
        make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
    ) -> None:
        super().__init__(store, until=until, damaged=damaged, dataset=dataset)
        self.point = self._check_point(point)
        self.registry = registry or default_registry()
        #: What the manifest itself says of inferred rules, where none was given.
        self._recorded_rules = [_inferred_rule(self, o["rule"]) for o in self.optimizers] if rule is None else []
        self.rule = _rules_of(self, rule, self._recorded_rules)
        self.optimizer_makers = _makers_of(self, make_optimizer)

    @property
    def given_rules(self) -> list[UpdateRule | None]:
        """The rule that explains each of :attr:`optimizers`; None where that is the registered one."""
        several = isinstance(self.rule, JointRule)
        return each_rule(self.rule, len(self.optimizers)) if several else [self.rule] * len(self.optimizers)

    @property
    def rule_name(self) -> str:
        """The qualified name of the rule that explains the run."""
        recorded: str = self.manifest["rule"]["name"]
        if self.rule is None:
            return recorded
        if not isinstance(self.rule, JointRule):
            return qualified_name(type(self.rule))
        names = [o["rule"]["name"] for o in self.optimizers]
        given = self.given_rules
        return JOINED_BY.join(n if r is None else qualified_name(type(r)) for n, r in zip(names, given, strict=True))

    @property
    def inferred(self) -> bool:
        """Whether the rule is inferred: a guess that is closed by secants, not a declaration."""
        return self.rule is not None and self.rule.inferred

    @property
    def closed_by_secant(self) -> bool:
        """Whether steps are closed by rank-one secants, whose size results then carry as ``correction``."""
        return any(
            bool(recorded["rule"].get("closed_by_secant")) if rule is None else rule.closed_by_secant
            for rule, recorded in zip(self.given_rules, self.optimizers, strict=True)
        )

    def optimizer_class(self, name: str) -> type[torch.optim.Optimizer]:
        """The class of a recorded optimizer, where a rule speaks for it or the program itself gave one in this process.

        Args:
            name: its qualified name.

        Returns:
            The class.

        Raises:
            StoreError: it is not known, or not installed, here.
            RuleNotFoundError: the rule that speaks for it is not the one that the run was recorded with.
        """
        self._speaking_rule([described["optimizer"] for described in self.optimizers].index(name))
        return found_class(name, where=self.path)

    def _speaking_rule(self, member: int) -> UpdateRule | None:
        given = self.given_rules[member]
        by_hand = all(given is not rule for rule in self._recorded_rules)
        return speaking_rule(self.registry, given, self.optimizers[member], by_hand=by_hand, where=self.path)

    def make_optimizer(self, member: int, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """One of the run's optimizers, made again.

        Args:
            member: its number.
            groups: its parameter groups.

        Returns:
            The optimizer, with an empty state.

        Raises:
            StoreError: its class is not known here, or not to be made with these groups.
            RuleNotFoundError: the rule that speaks for it is not the one that the run was recorded with.
        """
        make = self.optimizer_makers[member]
        if make is not None:
            return make(groups)
        rule = self._speaking_rule(member)
        kind = found_class(self.optimizers[member]["optimizer"], where=self.path)
        given = self.given_rules[member]
        for group in groups:
            check_arguments(kind, rule, group, explaining=given is None or given is rule, where=self.path)
        return rebuild_optimizer(kind, groups, where=self.path)

    def rule_for(self, optimizers: Sequence[torch.optim.Optimizer]) -> RegisteredRule:
        """The rule the run was recorded with (as registered now), or the one it is to be explained by.

        Args:
            optimizers: the run's, rebuilt.

        Returns:
            The rule; of a run of several optimizers, their rules as one (:class:`explaind_core.rules.JointRule`).

        Raises:
            RuleNotFoundError: another rule is registered for an optimizer than the run was recorded with.
        """
        if self.rule is not None and not isinstance(self.rule, JointRule):  # it speaks for all of them
            return RegisteredRule(self.rule, "given", "given", "-")
        given = self.given_rules
        return joined(
            [
                self._registered(described["rule"], optimizer)
                if rule is None
                else RegisteredRule(rule, "given", "given", "-")
                for rule, described, optimizer in zip(given, self.optimizers, optimizers, strict=True)
            ]
        )

    def _registered(self, recorded: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> RegisteredRule:
        name = recorded["name"]
        registered = self.registry.rule_named(name) or self.registry.rule_for(optimizer)
        if qualified_name(type(registered.rule)) != name:
            raise another_rule(recorded, [registered], where=self.path)
        return registered


def _rules_of(
    run: StoredSteps, rule: UpdateRule | Sequence[UpdateRule | None] | None, recorded: Sequence[UpdateRule | None]
) -> UpdateRule | None:
    """The rule, or the rules as one, that were given, or inferred; None where all are the registered ones."""
    count = len(run.optimizers)
    if isinstance(rule, UpdateRule):
        return rule
    rules = list(recorded) if rule is None else each_rule(rule, count)
    if all(each is None for each in rules):
        return None
    return rules[0] if count == 1 else JointRule(rules)


def _makers_of(
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
    try:
        settings = recorded["settings"]
        words = mismatch(settings, _INFERRED, "settings")
        if words or not settings.keys() <= _INFERRED_NAMES:
            raise TypeError(words or f"there is no {sorted(settings.keys() - _INFERRED_NAMES)[0]!r}")
        return InferredRule(**settings)
    except (KeyError, TypeError, CoefficientError) as error:
        raise StoreError(
            f"the settings of the run's inferred rule cannot be read: {error}",
            where=run.path / "manifest.json",
            expected="the arguments of explaind.InferredRule",
            got=recorded.get("settings"),
            remedy="pass open_run(..., rule=explaind.InferredRule(...))",
        ) from error
