"""What a plugin declares, and how it is found: the rule, its coefficients, its operators.

It may import errors, naming, tensors and trees; it knows no optimizer, no run and no model.
"""

from __future__ import annotations

from explaind_core.rules.filter_start import checked_count, started_states
from explaind_core.rules.filters import FilterState, LinearFilter
from explaind_core.rules.handed_over import hand_over, handed_over
from explaind_core.rules.held_options import REQUIRED, constructor_options, found_value, is_same, made_anew
from explaind_core.rules.hookspecs import hookimpl
from explaind_core.rules.inferred import DECAYS, InferredRule, fitted_by
from explaind_core.rules.installed import import_installed
from explaind_core.rules.joint import JOINED_BY, OWNER, JointRule, check_joinable, each_optimizer, each_rule, joined
from explaind_core.rules.linear_operator import LinearOperator, as_operator
from explaind_core.rules.operators import OfReadout, apply_each, is_elementwise
from explaind_core.rules.registry import RegisteredRule, Registry, default_registry
from explaind_core.rules.rule import OptimizerState, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.rules.secant import closed
from explaind_core.rules.trials import PRESENCE, SHAPES, MakeOptimizer, Shapes, Trials

__all__ = [
    "DECAYS",
    "JOINED_BY",
    "OWNER",
    "PRESENCE",
    "REQUIRED",
    "SHAPES",
    "FilterState",
    "InferredRule",
    "JointRule",
    "LinearFilter",
    "LinearOperator",
    "MakeOptimizer",
    "OfReadout",
    "OptimizerState",
    "RecordedStep",
    "RegisteredRule",
    "Registry",
    "Shapes",
    "StepCoefficients",
    "Trials",
    "UpdateRule",
    "apply_each",
    "as_operator",
    "check_joinable",
    "checked_count",
    "closed",
    "constructor_options",
    "default_registry",
    "each_optimizer",
    "each_rule",
    "fitted_by",
    "found_value",
    "hand_over",
    "handed_over",
    "hookimpl",
    "import_installed",
    "is_elementwise",
    "is_same",
    "joined",
    "made_anew",
    "started_states",
]
