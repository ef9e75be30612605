"""Whether what a run's files say fits together: names that are referred to exist, and numbers count what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.errors import StoreError
from explaind_core.rules import OWNER
from explaind_core.training_step import ParameterInfo

__all__ = ["check_batch", "check_manifest", "check_start", "check_state", "check_step"]

_REMEDY = "do not use this store: it was not written by explaind"


def check_manifest(manifest: Mapping[str, Any], *, where: Path) -> None:
    """Refuse a manifest that contradicts itself.

    Args:
        manifest: as its pattern wants it.
        where: it lies.

    Raises:
        StoreError: a parameter stands there twice, or there is no optimizer.
    """
    names = [parameter["name"] for parameter in manifest["parameters"]]
    none = "optimizers is empty" if manifest.get("optimizers") == [] else None
    _refuse("the manifest", where, _repeated("parameters", names), none)


def check_start(declared: Mapping[str, Any], parameters: Mapping[str, ParameterInfo], *, where: Path) -> None:
    """Refuse a start that holds other parameters than the manifest declares, before anything is read.

    Args:
        declared: the shape and dtype of each of its tensors.
        parameters: as the manifest has them.
        where: it lies.

    Raises:
        StoreError: a parameter is missing, or of another shape or dtype.
    """
    for name, info in parameters.items():
        expected, got = (tuple(info.shape), info.dtype), declared.get(f"theta/{name}")
        if got != expected:
            raise StoreError(
                "the start of the run does not fit the manifest",
                where=f"{where}, parameter {name!r}",
                expected=expected,
                got=got or "no such tensor",
                remedy=_REMEDY,
            )


def check_step(
    header: Mapping[str, Any], s: int, parameters: Mapping[str, ParameterInfo], optimizers: int, *, where: Path
) -> None:
    """Refuse a step's header that contradicts the manifest, or itself.

    Args:
        header: as its pattern wants it.
        s: the step's number.
        parameters: of the run.
        optimizers: how many the run has.
        where: the step lies.

    Raises:
        StoreError: it is another step's; it names a parameter or an optimizer that is none, or one twice.
    """
    names = [name for group in header["groups"] for name in group["params"]]
    owners = [group.get(OWNER) for group in header["groups"]] if optimizers > 1 else []
    numbers = [*owners, *header.get("stepped", ())]
    bad = [number for number in numbers if type(number) is not int or not 0 <= number < optimizers]
    other = header.get("step", s) != s
    _refuse(
        f"the header of step {s}",
        where,
        f"step is {header['step']} where {s} was expected" if other else None,
        _unknown("groups", names, parameters),
        _repeated("groups", names),
        _unknown("unfed", header.get("unfed", ()), names),
        f"stepped or a group's optimizer is {bad[0]!r} where there are {optimizers}, counted from 0" if bad else None,
    )


def check_batch(
    entry: Mapping[str, Any],
    ids: Tensor,
    rng: Mapping[str, Tensor],
    owners: Mapping[str, Tensor],
    *,
    where: Path,
    place: str,
) -> None:
    """Refuse a micro-batch whose tensors are not those that its entry refers to.

    Args:
        entry: of the step's header, as its pattern wants it.
        ids: of its samples.
        rng: the random states by device.
        owners: of rows, by the numbers of their tensors.
        where: the step lies.
        place: of the entry in the header.

    Raises:
        StoreError: one is missing, or of another kind.
    """
    states, rows = (entry.get("forward") or {}).get("rng", []), (entry.get("rows") or {}).get("owned", [])
    unnumbered = not all(leaf.isdecimal() for leaf in owners)
    no_ids = any(t.dtype != torch.int64 or t.ndim != 1 for t in (ids, *owners.values()))
    no_state = any(t.dtype != torch.uint8 or t.ndim != 1 for t in rng.values())
    _refuse(
        "the header of the step",
        where,
        _unknown(f"{place}.forward.rng", states, rng),
        _unknown(f"{place}.rows.owned", map(str, rows), owners),
        f"{place} has rows of something else than a tensor's number" if unnumbered else None,
        f"{place} has ids that are no list of whole numbers" if no_ids else None,
        f"{place} has a random state that is none" if no_state else None,
    )


def check_state(state: Mapping[str, Any], parameters: Mapping[str, ParameterInfo], *, what: str, where: Path) -> None:
    """Refuse an optimizer's state that is not one of the run's parameters.

    Args:
        state: parameter name -> entries.
        parameters: of the run.
        what: it is, for the error.
        where: it lies.

    Raises:
        StoreError: a name is no parameter's; its entries are no mapping; a sparse entry has another shape than the
            parameter, which, made dense, may be of any size.
    """
    flat = [f"state.{name} is no mapping" for name, entries in state.items() if not isinstance(entries, Mapping)]
    unlike = [
        f"state.{name} has a sparse entry of the shape {tuple(t.shape)}"
        for name, entries in state.items()
        for t in trees.leaves(entries)
        if t.layout != torch.strided and name in parameters and t.shape != parameters[name].shape
    ]
    _refuse(what, where, _unknown("state", state, parameters), *flat[:1], *unlike[:1])


def _refuse(what: str, where: Path, *faults: str | None) -> None:
    found = [fault for fault in faults if fault]
    if found:
        raise StoreError(f"{what} contradicts itself or the manifest: {found[0]}", where=where, remedy=_REMEDY)


def _unknown(place: str, names: Iterable[str], known: Iterable[str]) -> str | None:
    held = set(known)
    missing = [name for name in names if name not in held]
    return f"{place} names {missing[0][:100]!r}, which is not there" if missing else None


def _repeated(place: str, names: list[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return f"{place} names {name[:100]!r} twice"
        seen.add(name)
    return None
