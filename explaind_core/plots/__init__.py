"""Pictures of results and scores.

It may import scores and results; matplotlib is loaded when a picture is made.
"""

from __future__ import annotations

from explaind_core.plots.figure_3a import COLOURS, figure_3a, save

__all__ = ["COLOURS", "figure_3a", "save"]
