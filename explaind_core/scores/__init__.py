"""The paper's Definitions 4.2 to 4.4, and rankings, of results and of runs.

It may import attribution, strategies and what these may import.
"""

from __future__ import annotations

from explaind_core.scores.importance import importance, relative_regularization, spread_residual
from explaind_core.scores.kernel_slices import kernel_slices
from explaind_core.scores.rankings import by_parameter, parameter_importance, top_samples
from explaind_core.scores.similarity import similarity
from explaind_core.scores.similarity_plan import plan_similarity

__all__ = [
    "by_parameter",
    "importance",
    "kernel_slices",
    "parameter_importance",
    "plan_similarity",
    "relative_regularization",
    "similarity",
    "spread_residual",
    "top_samples",
]
