"""The setting of a study that there is not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Of a study that there is not."""

    seed: int = 0
    sizes: tuple[int, ...] = (1, 2)
