"""Imports of what is installed, never of what happens to lie in the folder that a process was started in."""

from __future__ import annotations

import importlib
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

__all__ = ["from_installed", "import_installed", "installed_path"]

#: ``sys.path`` is one for all threads.
_ONE_AT_A_TIME = threading.RLock()


def installed_path() -> list[str]:
    """Where installed modules lie: ``sys.path`` without the current folder.

    The current folder stays where an installation put it there: an editable one, by a ``.pth`` file.

    Returns:
        Absolute paths, in order.

    Example:
        >>> all(os.path.isabs(folder) for folder in installed_path())
        True
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was deleted, and nothing can lie there
        return [entry for entry in sys.path if os.path.isabs(entry)]
    kept = here in _put_by_installations(here)
    return [entry for entry in sys.path if os.path.isabs(entry) and (kept or os.path.realpath(entry) != here)]


def _put_by_installations(here: str) -> set[str]:
    """The folders that ``.pth`` files of this environment name."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    found = set()
    for folder in {os.path.realpath(folder) for folder in folders} - {here}:
        for file in sorted(Path(folder).glob("*.pth")):
            with suppress(OSError, ValueError):  # as Python itself passes over what it cannot read
                lines = (line.strip() for line in file.read_text().splitlines())
                found |= {os.path.realpath(os.path.join(folder, line)) for line in lines if line}
    return found


@contextmanager
def from_installed() -> Iterator[None]:
    """Let imports find what is installed, and nothing in the current folder.

    Yields:
        Nothing.

    Example:
        >>> with from_installed():
        ...     "" in sys.path
        False
    """
    with _ONE_AT_A_TIME:
        before, shown = sys.path, installed_path()
        sys.path = list(shown)
        try:
            yield
        finally:
            before += [entry for entry in sys.path if entry not in shown]  # what a package added for itself
            sys.path = before


def import_installed(module: str) -> ModuleType:
    """A module that is loaded already, or one that is installed.

    Args:
        module: its full name.

    Returns:
        The module.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> import_installed("json.decoder").__name__
        'json.decoder'
    """
    loaded = sys.modules.get(module)
    if loaded is not None:
        return loaded
    with from_installed():
        return importlib.import_module(module)
