"""What the JSON of a run's files must look like, one pattern for each kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explaind_core.store.json_schema import (
    ANY_NUMBER,
    COUNT,
    DEVICE,
    DEVICES,
    JSON,
    NUMBER,
    POSITIVE,
    THREADS,
    TREE,
    Both,
    Every,
    OneOf,
    Only,
    Row,
)
from explaind_core.store.tensor_file import DTYPES

__all__ = ["BATCH", "CLOSED", "LINE", "SNAPSHOT", "START", "manifest_pattern", "step_pattern"]

#: What is stored of steps.
_MODES = ("steps", "parameters", "snapshots")

_RULE: Any = {
    "name": str,
    "package": str,
    "version?": str,
    "inferred?": bool,
    "closed_by_secant?": bool,
    "settings?": Every(JSON),
}
_LOSS: Any = {"name": str, "settings?": Every(JSON)}
_ENVIRONMENT: Any = {"threads": THREADS, **dict.fromkeys(("torch?", "cpu?", "device?"), str)}
#: What every manifest holds; the run's name is there from version 2 on.
_MANIFEST: Any = {
    "format": str,
    "version": int,
    "run?": str,
    "created_with?": str,
    "torch?": str,
    "mode?": OneOf(_MODES),
    "snapshot_every?": POSITIVE,
    "environment?": _ENVIRONMENT,
    "provenance?": {"libraries": Every(str), "git_commit": (None, str), "seed?": JSON, "threads?": THREADS},
    "model": str,
    "modules?": Every(Row((str, str, str))),
    "optimizer": str,
    "optimizer_defaults?": [str],
    "rule": _RULE,
    "optimizers?": [{"optimizer": str, "optimizer_defaults?": [str], "rule": _RULE}],
    "loss": (None, _LOSS),
    "evaluates_elsewhere?": bool,
    "outside?": [str],
    "penalty?": (None, _LOSS),
    "train_size": (None, COUNT),
    "parameters": [
        {"name": str, "shape": [COUNT], "dtype": str, "trained": bool},
    ],
    "buffers": [str],
}
_FORWARD: Any = Only(
    {
        "training": bool,
        "exceptions": [str],
        "autocast": (None, OneOf(f"torch.{name}" for name in DTYPES)),
        "device_type": OneOf(DEVICES),
        "rng": [DEVICE],
        "scale": NUMBER,
    }
)
#: What the header of every step holds.
_STEP: Any = {
    "step?": POSITIVE,
    "groups": [Both({"params": [str]}, TREE)],
    "batches": [
        {
            "key": str,
            "weight": NUMBER,
            "reread?": bool,
            "rows?": Only({"shared": [COUNT], "owned": [COUNT]}),
            "forward?": (None, _FORWARD),
        }
    ],
    "gradient_factor": NUMBER,
    "clips?": [(Row((OneOf(("norm",)), ANY_NUMBER, ANY_NUMBER)), Row((OneOf(("value",)), ANY_NUMBER)))],
    "closure_losses?": [ANY_NUMBER],
    "stepped?": [COUNT],
    "calls?": COUNT,
    "lines?": COUNT,
    "data?": str,
    "unfed?": [str],
    "theta_hash?": str,
    "buffer_hash?": str,
    "gradient_hash?": str,
    "buffers_before?": [str],
    "threads?": THREADS,
    "recipe?": Only({"divides?": bool, "loss_outside?": bool}),
}
#: What a step must hold to be computed again.
_AGAIN: dict[str, Any] = {
    "steps": {},
    "parameters": {"unfed": [str], "gradient_hash": str},
    "snapshots": {"unfed": [str], "theta_hash": str, "buffer_hash": str},
}
#: The header of the start, and of a snapshot: the optimizer's state, parameter name -> entries.
START: Any = {"state": Every(TREE), "manifest?": dict}
SNAPSHOT: Any = {"state": Every(TREE), "trained?": [str], "generations?": list}
#: The header of a batch's file.
BATCH: Any = {"inputs": TREE, "targets": TREE}
CLOSED: Any = {"steps": COUNT, "lines?": COUNT, "snapshots?": [COUNT], "generation?": str}
#: A line of metrics.
LINE: Any = Both({"step": COUNT}, Every(ANY_NUMBER))


def manifest_pattern(manifest: Mapping[str, Any]) -> Any:
    """What a manifest holds.

    Args:
        manifest: of which version and mode, if it says so.

    Returns:
        A pattern.
    """
    named = {} if manifest.get("version") == 1 else {"run": str}
    return _MANIFEST | named | ({"environment": _ENVIRONMENT} if manifest.get("mode", "steps") != "steps" else {})


def step_pattern(mode: str) -> Any:
    """What the header of a step of a run holds.

    Args:
        mode: of the run.

    Returns:
        A pattern.

    Example:
        >>> "theta_hash" in step_pattern("snapshots"), "theta_hash" in step_pattern("steps")
        (True, False)
    """
    return _STEP | _AGAIN[mode]
