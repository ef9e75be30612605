"""Hypothesis against a rule: trainings are drawn until one is not explained.

It may import recording, decomposition, run, rules and what these may import; symbolic where a rule is proved.
"""

from __future__ import annotations

from explaind_core.conformance.cases import Case
from explaind_core.conformance.one_case import Conformance, run_case
from explaind_core.conformance.search import check_trials, check_update_rule
from explaind_core.conformance.verdict import Verdict, check_plugin

__all__ = [
    "Case",
    "Conformance",
    "Verdict",
    "check_plugin",
    "check_trials",
    "check_update_rule",
    "run_case",
]
