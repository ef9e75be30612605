"""A loss of power: of what was never synced anything may be gone, empty or cut."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hypothesis import strategies as st


class Power:
    """Sees what is synced; :meth:`fail` leaves of all else what is drawn."""

    def __init__(self, monkeypatch):
        self.contents, self.names = {}, {}
        original = os.fsync

        def fsync(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                self.names[path] = {p.name: p.stat().st_ino for p in path.iterdir()}
            else:
                self.contents[status.st_ino] = path.read_bytes()
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    def _named(self, path, top):
        """Whether a file's name, and those of the folders down to it, are on disk."""
        found = path
        while found != top.parent:
            if self.names.get(found.parent, {}).get(found.name) != found.stat().st_ino:
                return False
            found = found.parent
        return True

    def fail(self, folder, draw):
        """Returns the files that are not as they were written."""
        lost, folder = [], folder.resolve()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            now, kept = path.read_bytes(), self.contents.get(path.stat().st_ino)
            if kept is None or not now.startswith(kept):  # of an earlier file, whose number this one has
                kept = b""
            if not self._named(path, folder) and draw(st.booleans()):
                path.unlink()
            else:
                cut = draw(st.sampled_from(["whole", "kept", "half"]))
                size = {"whole": len(now), "kept": len(kept), "half": (len(kept) + len(now)) // 2}[cut]
                path.write_bytes(now[:size])
            if not path.exists() or path.read_bytes() != now:
                lost.append(path)
        return lost
