"""The ways to the same numbers: forward, reverse, features, adjoint; and which one is cheapest.

It may import questions, results, decomposition, derivatives, run and what these may import.
"""

from __future__ import annotations

from explaind_core.strategies.choose import choose, insisted_on
from explaind_core.strategies.entry_features import HELD, EntryFeatures, horizon
from explaind_core.strategies.forward import StepContribution, _integrate, _tangents, refine
from explaind_core.strategies.gram_products import Matrices, cosines, gram_products
from explaind_core.strategies.probe import Probe, first_needed, peak_memory, replayed, timed
from explaind_core.strategies.reverse import feature_map, row_bytes
from explaind_core.strategies.shares import GradientSplitter
from explaind_core.strategies.strategy import Choice, Strategy, run_bytes

__all__ = [
    "HELD",
    "Choice",
    "EntryFeatures",
    "GradientSplitter",
    "Matrices",
    "Probe",
    "StepContribution",
    "Strategy",
    "_integrate",
    "_tangents",
    "choose",
    "cosines",
    "feature_map",
    "first_needed",
    "gram_products",
    "horizon",
    "insisted_on",
    "peak_memory",
    "refine",
    "replayed",
    "row_bytes",
    "run_bytes",
    "timed",
]
