"""ExPLAIND for any PyTorch run: record it, check that the sum closes, ask any question along named axes.

The names below are the public API; everything else may change.
"""

from __future__ import annotations

from typing import Any

from explaind_core import errors, operators
from explaind_core.attribute import attribute, closure_error
from explaind_core.checkpoints import attribute_checkpoints
from explaind_core.coefficients import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.decompose import decompose
from explaind_core.hookspecs import hookimpl
from explaind_core.imported import import_checkpoints
from explaind_core.inferred import InferredRule
from explaind_core.outputs import Activation, Chosen, Function, LogProbabilities, Loss, Output, Outputs
from explaind_core.plan import Plan, plan
from explaind_core.rankings import by_parameter, parameter_importance, top_samples
from explaind_core.recorder import Recorder
from explaind_core.restrictions import Sample
from explaind_core.run import Run, open_run
from explaind_core.scores import importance, relative_regularization, spread_residual
from explaind_core.similarity import similarity
from explaind_core.similarity_plan import plan_similarity
from explaind_core.sizes import StoreSize, store_size
from explaind_core.slices import kernel_slices
from explaind_core.storage import open_result
from explaind_core.verify import Verification, verify

__all__ = [
    "Activation",
    "Chosen",
    "Function",
    "InferredRule",
    "LinearFilter",
    "LogProbabilities",
    "Loss",
    "Output",
    "Outputs",
    "Plan",
    "RecordedStep",
    "Recorder",
    "Run",
    "Sample",
    "StepCoefficients",
    "StoreSize",
    "UpdateRule",
    "Verification",
    "attribute",
    "attribute_checkpoints",
    "by_parameter",
    "closure_error",
    "decompose",
    "errors",
    "hookimpl",
    "import_checkpoints",
    "importance",
    "kernel_slices",
    "open_result",
    "open_run",
    "operators",
    "parameter_importance",
    "plan",
    "plan_similarity",
    "relative_regularization",
    "similarity",
    "spread_residual",
    "store_size",
    "top_samples",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # brings hypothesis along, which only plugin authors need
        import explaind_core.testing as testing

        return testing
    if name == "symbolic":  # brings sympy along, which only proofs need
        import explaind_core.symbolic as symbolic

        return symbolic
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
