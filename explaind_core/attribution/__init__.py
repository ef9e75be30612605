"""attribute, plan, verify: a question, its strategy, its labelled answer.

It may import strategies, questions, results and what these may import.
"""

from __future__ import annotations

from explaind_core.attribution.attribute import answer, attribute, contributions
from explaind_core.attribution.frame import Frame
from explaind_core.attribution.plan import GUESSED_NODES, Plan, plan, plan_of
from explaind_core.attribution.verify import Verification, verify

__all__ = [
    "GUESSED_NODES",
    "Frame",
    "Plan",
    "Verification",
    "answer",
    "attribute",
    "contributions",
    "plan",
    "plan_of",
    "verify",
]
