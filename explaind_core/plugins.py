"""The registry of plugins, under the name that scripts know it by; it lives in :mod:`explaind_core.rules`."""

from __future__ import annotations

from explaind_core.rules import *  # noqa: F403
