"""Where a run comes from: versions, machine, seed and commit, as they stood when recording began."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from explaind_core.run import Run

__all__ = ["RunDescription", "git_commit", "provenance"]


def provenance() -> dict[str, Any]:
    """What the manifest keeps of the present, as JSON.

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
    """The commit that is checked out where ``folder`` lies, read from git's own files; None where there is none.

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


@dataclass(frozen=True)
class RunDescription:
    """What a run says of itself. What earlier versions of the format did not keep is None.

    Attributes:
        format: its version. run: the run's own name. steps, complete, mode: as of :class:`explaind_core.Run`.
        model, loss: qualified names. optimizers: class name -> hyper-parameters of every group when recording began.
        rules: the qualified names of their rules. parameters: how many numbers the model has. bytes: on disk.
        data: a digest over the contents, ids and order of all batches up to the last step.
        provenance: versions, platform, seed, threads, time and git commit when recording began.

    Example:
        >>> from explaind_core.testing import record_example
        >>> print(record_example(steps=2).description)
        format       2
        ...
        optimizers   torch.optim.adamw.AdamW: lr=0.01, betas=(0.9, 0.999), ...
        ...
    """

    format: int
    run: str | None
    steps: int
    complete: bool
    mode: str
    model: str
    parameters: int
    loss: str | None
    optimizers: tuple[tuple[str, tuple[Mapping[str, Any], ...] | None], ...]
    rules: tuple[str, ...]
    data: str | None
    bytes: int
    provenance: Mapping[str, Any] | None

    @classmethod
    def of(cls, run: Run) -> RunDescription:
        """The description of a run."""
        manifest, last = run.manifest, run.steps[-1] if run.steps else 0
        groups = run.hyper(1) if run.steps else None
        optimizers = []
        for index, each in enumerate(run.optimizers):
            own = groups and [g for g in groups if g.get("optimizer", 0) == index]
            plain = own and tuple({k: v for k, v in g.items() if k not in ("params", "optimizer")} for g in own)
            optimizers.append((each["optimizer"], plain or None))
        return cls(
            manifest["version"],
            manifest.get("run"),
            len(run.steps),
            run.complete,
            run.mode,
            manifest["model"],
            sum(p.shape.numel() for p in run.parameters.values()),
            None if manifest["loss"] is None else manifest["loss"]["name"],
            tuple(optimizers),
            tuple(each["rule"]["name"] for each in run.optimizers),
            run.step_header(last).get("data") if last else None,
            run.bytes,
            manifest.get("provenance"),
        )

    def __str__(self) -> str:
        rows = {
            "format": self.format,
            "run": self.run,
            "steps": f"{self.steps}{'' if self.complete else ', recording was not ended in order'}",
            "mode": self.mode,
            "model": f"{self.model}, {self.parameters:,} parameters",
            "loss": self.loss,
            "optimizers": "; ".join(f"{name}: {_groups(groups)}" for name, groups in self.optimizers),
            "rules": ", ".join(self.rules),
            "data": self.data,
            "bytes": f"{self.bytes:,}",
        }
        for key, value in (self.provenance or {}).items():
            rows[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        return "\n".join(f"{key:<12} {value}" for key, value in rows.items())


def _groups(groups: tuple[Mapping[str, Any], ...] | None) -> str:
    return " | ".join(", ".join(f"{k}={v}" for k, v in group.items()) for group in groups or ()) or "-"
