"""The ways to the same numbers: forward, reverse, features, adjoint; and which one is cheapest.

It may import questions, results, decomposition, derivatives, run and what these may import.
"""

from __future__ import annotations

from explaind_core.strategies.adjoint import Adjoint, State
from explaind_core.strategies.choose import Choice, choose, run_bytes
from explaind_core.strategies.features import HELD, EntryFeatures, horizon
from explaind_core.strategies.forward import StepContribution, _integrate, _tangents, refine
from explaind_core.strategies.gram_products import Matrices, cosines, gram_products
from explaind_core.strategies.reverse import feature_map, products
from explaind_core.strategies.stepwise import row_bytes, stepwise

__all__ = [
    "HELD",
    "Adjoint",
    "Choice",
    "EntryFeatures",
    "Matrices",
    "State",
    "StepContribution",
    "_integrate",
    "_tangents",
    "choose",
    "cosines",
    "feature_map",
    "gram_products",
    "horizon",
    "products",
    "refine",
    "row_bytes",
    "run_bytes",
    "stepwise",
]
