"""Sparse checkpoints alone: taken into a store that checks itself, and attributed by segment and layer.

It may import strategies, derivatives, run, store and what these may import.
"""

from __future__ import annotations

from explaind_core.checkpoints.attribute_checkpoints import attribute_checkpoints
from explaind_core.checkpoints.import_checkpoints import import_checkpoints

__all__ = ["attribute_checkpoints", "import_checkpoints"]
