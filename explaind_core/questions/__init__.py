"""What is asked, checked and resolved: axes, restrictions, windows, memory; and the shape of its answer.

It may import decomposition, derivatives, run and what these may import.
"""

from __future__ import annotations

from explaind_core.questions.arguments import (
    AXES,
    Argument,
    AttributionArguments,
    CommonArguments,
    PathArguments,
    question_of,
    spelled_out,
)
from explaind_core.questions.findings import Findings
from explaind_core.questions.layers import Layer, LayerSpec, resolve_layers
from explaind_core.questions.memory import check_fits
from explaind_core.questions.parameter_axis import Places
from explaind_core.questions.question import GRADIENT_AXES, Question
from explaind_core.questions.restrictions import Sample, Segment, Window, segments_of
from explaind_core.questions.values import Ends, finite_values, reduced
from explaind_core.questions.windows import Contribution, WindowSum

__all__ = [
    "AXES",
    "GRADIENT_AXES",
    "Argument",
    "AttributionArguments",
    "CommonArguments",
    "Contribution",
    "Ends",
    "Findings",
    "Layer",
    "LayerSpec",
    "PathArguments",
    "Places",
    "Question",
    "Sample",
    "Segment",
    "Window",
    "WindowSum",
    "check_fits",
    "finite_values",
    "question_of",
    "reduced",
    "resolve_layers",
    "segments_of",
    "spelled_out",
]
