"""Which of an optimizer's options the drawn trainings have set to anything but their defaults."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from explaind_core.rules import (
    REQUIRED,
    Trials,
    UpdateRule,
    constructor_options,
    found_value,
    is_same,
    made_anew,
)

__all__ = ["Coverage"]


class Coverage:
    """Looks at every optimizer that trainings are made with.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> coverage = Coverage(SGDRule())
        >>> watched = coverage.watching(Trials(torch.optim.SGD))
        >>> optimizer = watched.make_optimizer([torch.nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.9, dampening=0)
        >>> coverage.untested
        ('dampening', 'weight_decay', 'nesterov', 'maximize', 'foreach', 'fused')
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._kinds: dict[type[torch.optim.Optimizer], Mapping[str, Any]] = {}  # and what is in one at its defaults
        self._set: set[str] = set()
        self._seen: set[str] = set()

    def watching(self, trials: Trials) -> Trials:
        """``trials``, whose optimizers are looked at when they are made."""
        self._set |= set(trials.scheduled)
        make = trials.make_optimizer

        @functools.wraps(make, updated=())
        def made(groups: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
            optimizer = make(groups, **options)
            self._look(optimizer, options)
            return optimizer

        return replace(trials, make_optimizer=made)

    def _look(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        kind = type(optimizer)
        if kind not in self._kinds:
            self._kinds[kind] = made_anew(kind, optimizer.param_groups[0])
        anew = self._kinds[kind]
        for name, default in constructor_options(kind).items():
            groups = [group[name] for group in optimizer.param_groups if name in group]
            attribute, value = found_value(optimizer, name)
            if not attribute and (attribute := self._rule.attributes.get(name, "")):
                value = getattr(optimizer, attribute, default)
            # What a constructor makes of its default, where that is something else, is no other value.
            aside = [default if attribute in anew and is_same(value, anew[attribute]) else value] if attribute else []
            given = [options[name]] if name in options else []
            if groups or aside:
                self._seen.add(name)
            if any(default is REQUIRED or not is_same(value, default) for value in (*groups, *aside, *given)):
                self._set.add(name)

    @property
    def _options(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for kind in self._kinds for name in constructor_options(kind)))

    @property
    def untested(self) -> tuple[str, ...]:
        """Options that stood at their defaults in all trainings, but those of which the rule models nothing else."""
        alone = {name for name, values in self._rule.fixed.items() if len(values) < 2}
        return tuple(name for name in self._options if name not in self._set | alone)

    @property
    def unmodelled(self) -> tuple[str, ...]:
        """Options that the rule does not name: recording refuses them where they are not at their defaults."""
        named = {*self._rule.options, *self._rule.fixed, *self._rule.attributes}
        return tuple(name for name in self._options if name not in named)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Options that are neither in a group nor an attribute of their name: recording may not see their values."""
        return tuple(name for name in self._options if name not in self._seen)
