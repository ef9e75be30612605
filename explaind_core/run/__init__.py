"""A recorded run: read from its store, replayed, computed again, put back.

It may import rules, training_step, store and what these may import.
"""

from __future__ import annotations

from explaind_core.run.explained_steps import OptimizerFactory
from explaind_core.run.replay import Replay, ReplayedStep
from explaind_core.run.run import Run, open_run

__all__ = ["OptimizerFactory", "Replay", "ReplayedStep", "Run", "open_run"]
