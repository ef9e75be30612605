"""Where a run comes from: versions, machine, seed and commit, as they stood when recording began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from explaind_core.errors import printable
from explaind_core.run.step_records import StepRecords

__all__ = ["RunDescription"]


@dataclass(frozen=True)
class RunDescription:
    """What a run says of itself. What earlier versions of the format did not keep is None.

    Attributes:
        format: its version.
        run: the run's own name.
        steps: how many.
        complete: whether the recording ended in order.
        mode: what was stored, as of :class:`explaind_core.Run`.
        model: its qualified name.
        parameters: how many numbers the model has.
        loss: its qualified name.
        optimizers: (class name, hyper-parameters of every group when recording began) each.
        rules: the qualified names of their rules.
        data: a digest over the contents, ids and order of all batches up to the last step.
        bytes: on disk.
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
    def of(cls, run: StepRecords) -> RunDescription:
        """The description of a run.

        Args:
            run: any.

        Returns:
            What it says of itself; printed, a table.
        """
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
        return "\n".join(f"{printable(key):<12} {printable(value)}" for key, value in rows.items())


def _groups(groups: tuple[Mapping[str, Any], ...] | None) -> str:
    return " | ".join(", ".join(f"{k}={v}" for k, v in group.items()) for group in groups or ()) or "-"
