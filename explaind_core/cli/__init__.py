"""The shell: ``explaind COMMAND``.

It may import everything; what takes long to load is loaded by the command that needs it.
"""

from __future__ import annotations

from explaind_core.cli.app import main

__all__ = ["main"]
