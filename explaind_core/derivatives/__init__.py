"""The explained function and its derivatives; a gradient as shares of its samples. It knows no run.

It may import training_step and rules, and what these may import.
"""

from __future__ import annotations

from explaind_core.derivatives.examination import examine
from explaind_core.derivatives.explained_function import ExplainedFunction, FunctionAtStep
from explaind_core.derivatives.factored_gradients import slices
from explaind_core.derivatives.outputs import (
    Activation,
    Chosen,
    Function,
    LogProbabilities,
    Loss,
    Output,
    Outputs,
    as_output,
)
from explaind_core.derivatives.quadrature import Quadrature, climb
from explaind_core.derivatives.sample_gradients import SampleGradients

__all__ = [
    "Activation",
    "Chosen",
    "ExplainedFunction",
    "Function",
    "FunctionAtStep",
    "LogProbabilities",
    "Loss",
    "Output",
    "Outputs",
    "Quadrature",
    "SampleGradients",
    "as_output",
    "climb",
    "examine",
    "slices",
]
