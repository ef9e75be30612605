"""ExPLAIND for any PyTorch run: record it, check that the sum closes, ask any question along named axes.

The names below are the public API; everything else may change.
"""

from __future__ import annotations

from typing import Any

from explaind_core import errors, operators
from explaind_core.attribution import Plan, Verification, attribute, plan, verify
from explaind_core.checkpoints import attribute_checkpoints, import_checkpoints
from explaind_core.decomposition import decompose, fit_inferred
from explaind_core.derivatives import Activation, Chosen, Function, LogProbabilities, Loss, Output, Outputs
from explaind_core.questions import Sample
from explaind_core.recording import Recorder
from explaind_core.results import closure_error, open_result
from explaind_core.rules import InferredRule, LinearFilter, RecordedStep, StepCoefficients, UpdateRule, hookimpl
from explaind_core.run import Run, open_run
from explaind_core.scores import (
    by_parameter,
    importance,
    kernel_slices,
    parameter_importance,
    plan_similarity,
    relative_regularization,
    similarity,
    spread_residual,
    top_samples,
)
from explaind_core.store import StoreSize, digest, store_size
from explaind_core.training_step import PerRow, Shared

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
    "PerRow",
    "Plan",
    "RecordedStep",
    "Recorder",
    "Run",
    "Sample",
    "Shared",
    "StepCoefficients",
    "StoreSize",
    "UpdateRule",
    "Verification",
    "attribute",
    "attribute_checkpoints",
    "by_parameter",
    "closure_error",
    "decompose",
    "digest",
    "errors",
    "fit_inferred",
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
