"""The linear operators that a rule is written with, under the name that plugins know them by.

They are those of :mod:`explaind_core.rules.operators`.
"""

from __future__ import annotations

from explaind_core.rules.operators import *  # noqa: F403
