"""ExPLAIND for any PyTorch run: record it, check that the sum closes, ask any question along named axes.

The names below are the public API; everything else may change.
"""

from __future__ import annotations

from explaind_core import errors, operators
from explaind_core.coefficients import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.decompose import decompose
from explaind_core.hookspecs import hookimpl
from explaind_core.recorder import Recorder
from explaind_core.run import Run, open_run

__all__ = [
    "LinearFilter",
    "RecordedStep",
    "Recorder",
    "Run",
    "StepCoefficients",
    "UpdateRule",
    "decompose",
    "errors",
    "hookimpl",
    "open_run",
    "operators",
]
