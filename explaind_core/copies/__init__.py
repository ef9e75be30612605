"""Private copies of models: structure, parameters and buffers, and nothing else that a module holds on to.

It may import errors and naming.
"""

from __future__ import annotations

from explaind_core.copies.backward_hooks import without_backward_hooks
from explaind_core.copies.module_copy import plain_copy

__all__ = ["plain_copy", "without_backward_hooks"]
