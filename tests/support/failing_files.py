"""Files below one folder of which every call can fail, be cut, be delayed, or be the last before a kill.

What the system is asked goes through :class:`FailingFiles`: it counts the calls of each kind, lets the one that a
:class:`Fault` names go wrong, and knows what was synced. A kill is a call after which no other one reaches the files,
so that nothing cleans up behind it. A loss of power leaves of all that was not synced, name by name and file by file,
the old, the new, or a part.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.unreliable_storage import ClientError

KINDS = ("read", "write", "name", "sync")
#: Before the call, in the middle of it, after it. The first four raise, the next three kill.
HOWS = ("fail", "full", "cut", "late", "kill", "cut and kill", "kill late", "delay")
FOR_GOOD = 10**9


class Killed(BaseException):
    """The process is no more."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong: call number ``at`` of a kind, and the ``times - 1`` behind it."""

    kind: str
    at: int
    how: str
    times: int = 1


class Faults:
    """Counts calls and lets one go wrong; where the process is dead all others, too."""

    def __init__(self):
        self.lock, self.fault, self.dead = threading.Lock(), None, False
        self.seen, self.injected, self.hit = Counter(), Counter(), False

    def arm(self, fault):
        self.fault, self.hit = fault, False
        self.seen.clear()

    def call(self, kind, act, half=None, undo=None):
        """``act``, as the fault has it; ``half`` does a part of it, ``undo`` gives back what nobody will get."""
        with self.lock:
            if self.dead:
                raise Killed
            number, fault = self.seen[kind], self.fault
            self.seen[kind] += 1
            if fault is None or fault.kind != kind or not fault.at <= number < fault.at + fault.times:
                how = None
            else:
                how, self.hit = fault.how, True
                self.injected[f"{kind}: {how}"] += 1
                self.dead = "kill" in how and how != "kill late"
        if how is None:
            return act()
        if how == "delay":
            time.sleep(0.0003)
            return act()
        if how in ("cut", "cut and kill") and half is not None:
            half()
        if how in ("late", "kill late"):
            found = act()
            if undo is not None:
                undo(found)
        if "kill" in how:
            self.dead = True
            raise Killed
        if kind == "storage":
            raise TimeoutError("no answer") if how == "late" else ClientError("503 slow down")
        number = errno.ENOSPC if how in ("full", "cut") else errno.EIO
        raise OSError(number, os.strerror(number))


class _Node:
    """A file or a folder, whatever it is called: what of it is on disk."""

    def __init__(self, kept=b"", *, folder=False):
        self.kept, self.folder = kept, folder


class Disk:
    """What lies below a folder, and what of that a loss of power leaves for certain."""

    def __init__(self, top):
        self.top, self.now, self.kept = str(top), {}, {}

    def inside(self, path):
        return path == self.top or path.startswith(self.top + "/")

    def synced(self, path, *, folder):
        if not folder:
            if path in self.now:
                self.now[path].kept = Path(path).read_bytes()
            return
        below = lambda names: {p for p in names if os.path.dirname(p) == path}  # noqa: E731
        for name in below(self.kept) - below(self.now):
            del self.kept[name]
        self.kept |= {name: self.now[name] for name in below(self.now)}

    def everything(self, folder=None):
        """All that is below a folder is on disk: somebody copied it and waited, or it was read from disk just now."""
        top = str(folder or self.top)
        below = [p for p in {*self.now, *self.kept} if p.startswith(top + "/")]
        for path in below:
            self.now.pop(path, None), self.kept.pop(path, None)
        for path in Path(top).rglob("*"):
            node = _Node(folder=True) if path.is_dir() else _Node(path.read_bytes())
            self.now[str(path)] = self.kept[str(path)] = node
        if folder is not None:
            self.now[top] = self.kept[top] = _Node(folder=True)

    def fail(self, draw):
        """A loss of power; ``draw(n)`` is one of 0..n-1. Returns how many files are not as they were."""
        changed = 0
        for path in sorted(p for p, node in self.now.items() if node.folder and self.kept.get(p) is not node):
            if draw(2):
                changed += os.path.lexists(path)
                shutil.rmtree(path, ignore_errors=True)
                for name in [p for p in {*self.now, *self.kept} if p == path or p.startswith(path + "/")]:
                    self.now.pop(name, None), self.kept.pop(name, None)
        for path in sorted({*self.now, *self.kept}):
            new, old = self.now.get(path), self.kept.get(path)
            if (new or old).folder:
                continue
            node = new if new is old or draw(2) else old
            was = Path(path).read_bytes() if os.path.lexists(path) else None
            found = self._left(node, was if node is new else None, draw)
            if found != was:
                changed += 1
                if found is None:
                    os.unlink(path)
                else:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    Path(path).write_bytes(found)
        self.everything()
        return changed

    def _left(self, node, written, draw):
        if node is None or written is None or written == node.kept:
            return None if node is None else node.kept
        half = written[: (len(node.kept) + len(written)) // 2]
        zeros = written[: len(node.kept)] + bytes(max(0, len(written) - len(node.kept)))
        return (written, node.kept, half, zeros)[draw(4)]


class _File:
    """An open file, written through so that a kill finds what was written."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __iter__(self):
        return iter(self._file)

    def __del__(self):
        self._file.close()

    def _put(self, data):
        done = self._file.write(data)
        self._file.flush()
        return done

    def write(self, data):
        half = bytes(data)[: len(bytes(data)) // 2]
        return self._faults.call("write", lambda: self._put(data), lambda: self._put(half))

    def writelines(self, parts):
        for part in parts:
            self.write(part)

    def truncate(self, size=None):
        return self._faults.call("write", lambda: self._file.truncate(size))

    def read(self, *size):
        return self._faults.call("read", lambda: self._file.read(*size))

    def readinto(self, buffer):
        return self._faults.call("read", lambda: self._file.readinto(buffer))


#: What is asked of the system, by its name in ``os``.
_NAMES = ("unlink", "remove", "mkdir", "rmdir", "rename", "replace", "link")
_READS = ("listdir", "scandir", "stat", "lstat")


class FailingFiles:
    """The file layer below ``top``, from :meth:`installed` on."""

    def __init__(self, top, faults):
        self.faults, self.disk = faults, Disk(top)
        self._real = {name: getattr(os, name) for name in (*_NAMES, *_READS, "open", "fsync")}
        self._io_open, self._busy = io.open, threading.local()

    @contextlib.contextmanager
    def installed(self, patch):
        patch.setattr(io, "open", self._opened)
        patch.setattr(os, "open", self._os_open)
        patch.setattr(os, "fsync", self._fsync)
        for name in (*_NAMES, *_READS):
            patch.setattr(os, name, self._wrapped(name))
        yield self

    @contextlib.contextmanager
    def off(self):
        """What the test itself asks of the files."""
        before, self._busy.on = getattr(self._busy, "on", False), True
        try:
            yield
        finally:
            self._busy.on = before

    def _path(self, path, dir_fd=None):
        """In full, None where it is none of ours."""
        if getattr(self._busy, "on", False):
            return None
        if isinstance(path, int):
            try:
                found = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return None
        else:
            found = os.fspath(path)
            if isinstance(found, bytes):
                return None
            if dir_fd is not None and dir_fd >= 0:
                found = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), found)
            found = os.path.abspath(found)
        return found if self.disk.inside(found) else None

    def _call(self, kind, act, undo=None):
        def alone():
            with self.off():
                return act()

        return self.faults.call(kind, alone, undo=undo)

    def _opened(self, file, mode="r", *args, **kwargs):
        path = self._path(file)
        if path is None:
            return self._io_open(file, mode, *args, **kwargs)
        if isinstance(file, int):
            found = self._io_open(file, mode, *args, **kwargs)
        else:
            writes = set(mode) & set("wax+")

            def act():
                found = self._io_open(file, mode, *args, **kwargs)
                if writes:
                    self.disk.now.setdefault(path, _Node())
                return found

            found = self._call("write" if writes else "read", act, lambda found: found.close())
        return _File(found, self.faults) if "b" in mode else found

    def _os_open(self, path, flags, *args, dir_fd=None, **kwargs):
        place = self._path(path, dir_fd)

        def act():
            found = self._real["open"](path, flags, *args, dir_fd=dir_fd, **kwargs)
            if place is not None and flags & os.O_CREAT:
                self.disk.now.setdefault(place, _Node())
            return found

        if place is None:
            return act()
        return self._call("write" if flags & (os.O_WRONLY | os.O_RDWR) else "read", act, os.close)

    def _fsync(self, descriptor):
        path = self._path(descriptor)
        if path is None:
            return self._real["fsync"](descriptor)

        def act():
            self.disk.synced(path, folder=stat.S_ISDIR(os.fstat(descriptor).st_mode))

        return self._call("sync", act)

    def _wrapped(self, name):
        real, kind = self._real[name], "read" if name in _READS else "name"

        def call(path=".", *args, **kwargs):
            place = self._path(path, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            if place is None:
                return real(path, *args, **kwargs)

            def act():
                found = real(path, *args, **kwargs)
                if name in ("unlink", "remove", "rmdir"):
                    self.disk.now.pop(place, None)
                elif name == "mkdir":
                    self.disk.now[place] = _Node(folder=True)
                elif name in ("rename", "replace"):
                    self._renamed(place, os.path.abspath(args[0]))
                elif name == "link":
                    self.disk.now[os.path.abspath(args[0])] = self.disk.now[place]
                return found

            return self._call(kind, act)

        return call

    def _renamed(self, old, new):
        now = self.disk.now
        for path in [p for p in now if p == old or p.startswith(old + "/")]:
            now[new + path[len(old) :]] = now.pop(path)
