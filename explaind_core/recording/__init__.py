"""The Recorder: what a loop declares and what its optimizers do, step by step into the store.

It may import run, store, training_step, rules and what these may import.
"""

from __future__ import annotations

from explaind_core.recording.recorder import Recorder

__all__ = ["Recorder"]
