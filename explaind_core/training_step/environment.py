"""The machine that trains: what decides about the last bits of a computation, and where a run comes from."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["differences", "environment", "git_commit", "provenance", "threads"]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads, instruction set and settings, as JSON.

    Args:
        device: where the model lies.

    Returns:
        What differs where two machines differ in the last bits: names -> strings, numbers and booleans.

    Example:
        >>> environment(torch.device("cpu"))["torch"] == torch.__version__
        True
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words.

    Args:
        then: the environment of the recording.
        now: that of the present.

    Returns:
        A clause for each difference, joined by commas.

    Example:
        >>> differences({"torch": "2.6", "threads": 2}, {"torch": "2.13", "threads": 2})
        'torch 2.6 then and 2.13 now'
    """
    found = [f"{k} {then.get(k)} then and {now.get(k)} now" for k in now if then.get(k) != now[k]]
    return ", ".join(found) or "none in versions, threads, processor and settings"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads: sums in another order have other last bits.

    Args:
        count: how many; what it was before is set again on leaving.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    present = torch.get_num_threads()
    if count == present:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(present)


def provenance() -> dict[str, Any]:
    """What the manifest keeps of the present.

    Returns:
        Time, commit, versions, platform, seed and threads, as JSON holds them.

    Example:
        >>> sorted(provenance())
        ['created', 'git_commit', 'libraries', 'platform', 'seed', 'threads']
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(Path.cwd()),
        "libraries": {
            "explaind-core": version("explaind-core"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "seed": torch.initial_seed(),
        "threads": torch.get_num_threads(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out, read from git's own files.

    Args:
        folder: in the working tree, at any depth.

    Returns:
        40 or 64 hexadecimal digits; None where there is no repository.

    Example:
        >>> git_commit(Path("/")) is None
        True
    """
    try:
        top = next((p / ".git" for p in (folder, *folder.parents) if (p / ".git").exists()), None)
        if top is None:
            return None
        if top.is_file():  # a worktree, or a submodule: "gitdir: where"
            top = (top.parent / top.read_text().removeprefix("gitdir:").strip()).resolve()
        common = top / "commondir"
        folders = [top, *([(top / common.read_text().strip()).resolve()] if common.is_file() else [])]
        head = (top / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return _commit(head)
        name = head.removeprefix("ref: ")
        for place in folders:
            if (place / name).is_file():
                return _commit((place / name).read_text().strip())
            packed = place / "packed-refs"
            for line in packed.read_text().splitlines() if packed.is_file() else ():
                if line.endswith(f" {name}"):
                    return _commit(line.split()[0])
    except (OSError, ValueError):  # no repository that we may read
        pass
    return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) else None
