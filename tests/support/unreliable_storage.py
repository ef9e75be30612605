"""A storage elsewhere whose calls fail as they are told to: ``unreliable://``, kept in memory."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

CALLS = ("info", "ls", "cat_file", "pipe_file", "rm", "rm_file", "rmdir", "_open")


class ClientError(Exception):
    """What a storage's own package raises: no OSError."""


class Unreliable(MemoryFileSystem):
    """Call number ``first`` and the ``times - 1`` behind it fail, before or after they did what they were asked."""

    protocol = "unreliable"
    store = {}  # noqa: RUF012 (the class's own, as its parent has it)
    pseudo_dirs = [""]  # noqa: RUF012
    made, first, times, late, inside = 0, None, 0, False, False
    faults = None  # of support.failing_files: asked at every call

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("unreliable://"))

    @classmethod
    @contextmanager
    def failing(cls, first, times, *, late=False):
        cls.made, cls.first, cls.times, cls.late = 0, first, times, late
        try:
            yield cls
        finally:
            cls.first = None


def _alone(kind, act):
    kind.inside = True
    try:
        return act()
    finally:
        kind.inside = False


def _failing(name):
    method = getattr(MemoryFileSystem, name)

    @wraps(method)
    def call(self, *args, **kwargs):
        kind = type(self)
        if kind.inside:  # of one call of the library the storage sees one
            return method(self, *args, **kwargs)
        if kind.faults is not None:
            return kind.faults.call("storage", lambda: _alone(kind, lambda: method(self, *args, **kwargs)))
        kind.made += 1
        fails = kind.first is not None and kind.first <= kind.made - 1 < kind.first + kind.times
        if fails and not kind.late:
            raise ClientError(f"{name}: 503 slow down")
        found = _alone(kind, lambda: method(self, *args, **kwargs))
        if fails:
            raise TimeoutError(f"{name}: no answer")
        return found

    return call


for _name in CALLS:
    setattr(Unreliable, _name, _failing(_name))


class UnreliablePath(MemoryPath):
    """The address of such a file."""


fsspec.register_implementation("unreliable", Unreliable, clobber=True)
register_implementation("unreliable", UnreliablePath, clobber=True)
