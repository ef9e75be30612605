"""The pluggy specification: what a plugin may implement.

A plugin is any module (or object) behind an entry point of the group ``explaind``; the built-in rules
use the same door. In its ``pyproject.toml``::

    [project.entry-points.explaind]
    my_package = "my_package.explaind_plugin"
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy
import torch

from explaind_core.rules.rule import UpdateRule
from explaind_core.rules.trials import Trials

__all__ = [
    "ENTRY_POINT_GROUP",
    "explaind_trials",
    "explaind_update_rule",
    "explaind_update_rules",
    "hookimpl",
    "hookspec",
]

ENTRY_POINT_GROUP = "explaind"

hookspec = pluggy.HookspecMarker("explaind")
hookimpl = pluggy.HookimplMarker("explaind")


@hookspec
def explaind_update_rules() -> Sequence[UpdateRule]:  # type: ignore[empty-body]
    """List the rules that this plugin brings; each says by ``optimizers`` which classes it speaks for."""


@hookspec
def explaind_trials(rule: UpdateRule) -> Sequence[Trials] | None:
    """Say how the conformance kit draws trainings for ``rule``, or None for a rule of somebody else.

    Optional: without it the kit guesses from the names and default values of the optimizer's options.
    """


@hookspec
def explaind_update_rule(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return the rule for ``optimizer``, or None. For plugins that must look at the instance to decide."""
