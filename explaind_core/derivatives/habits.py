"""What evaluations of f do beside returning values."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Habits"]


@dataclass
class Habits:
    """What evaluations of f do beside returning values, as :func:`explaind_core.derivatives.examine` found.

    Attributes:
        draws: they draw from global random generators.
        keeps: they leave attributes of modules changed.
        writes: they write into buffers.
        needs_gradients: they take gradients themselves.
    """

    draws: bool = False
    keeps: bool = False
    writes: bool = False
    needs_gradients: bool = False
