"""Checkpoints: state dicts in memory, or safetensors files, checked against a model; nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from upath import UPath

from explaind_core.checkpoints.checkpoint_store import CheckpointStore, StoredCheckpoint
from explaind_core.errors import NonFiniteError, QuestionError, StoreError
from explaind_core.store import is_folder, locate, names_in, opened, reason
from explaind_core.training_step import ParameterInfo

__all__ = ["Checkpoints", "StateDict", "read_checkpoint"]

#: Endings of checkpoints that hold pickled code, which is never run here.
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

StateDict = Mapping[str, Tensor]
Source = StateDict | Path | StoredCheckpoint


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints that were found to fit the model, read again whenever they are asked for.

    Attributes:
        sources: where they are.
        labels: one each.
        parameters: name -> shape and dtype.
        buffers: what the model's buffers are held at.
        named: the name of a stored entry in the plain model.
    """

    sources: Sequence[Source]
    labels: Sequence[int | str]
    parameters: Mapping[str, ParameterInfo]
    buffers: StateDict
    named: Callable[[str], str]

    @classmethod
    def of(
        cls,
        checkpoints: Any,
        labels: Any,
        model: nn.Module,
        buffers: StateDict | None,
        named: Callable[[str], str] = str,
    ) -> Checkpoints:
        """Read every checkpoint once and check it, so that no error comes late.

        Args:
            checkpoints: see :func:`explaind_core.attribute_checkpoints`.
            labels: one each, or None; see there.
            model: whose parameters and buffers they must hold.
            buffers: given in place of the last checkpoint's; see there.
            named: what an entry is called in the model, where checkpoints were saved from a wrapper of it.

        Returns:
            The checkpoints, none of them held in memory.

        Raises:
            StoreError: a file is missing, damaged or not a safetensors file; a checkpoint does not fit the model.
            NonFiniteError: a parameter is not finite.
            QuestionError: fewer than two checkpoints, or labels that do not fit them.
        """
        sources, found = _sources(checkpoints)
        if len(sources) < 2:
            raise QuestionError(
                "a path needs two checkpoints", where="checkpoints", expected="at least 2", got=len(sources)
            )
        if labels is not None:
            found = list(labels)
            if len(found) != len(sources) or len(set(found)) < len(found):
                raise QuestionError(
                    "the labels are not one for each checkpoint",
                    where="labels",
                    expected=f"{len(sources)} different ones",
                    got=found,
                )
        known = set(model.state_dict())
        parameters = {n: ParameterInfo(p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        last: StateDict = {}
        for source, label in zip(sources, found, strict=True):
            last = {named(n): t for n, t in read_checkpoint(source, label).items()}
            _check(last, label, parameters, known)
        given = None if buffers is None else {named(n): t for n, t in buffers.items()}
        held = {n: _buffer(n, b, n in known, last, given, found[-1]) for n, b in model.named_buffers()}
        return cls(sources, found, parameters, held, named)

    def theta(self, index: int) -> dict[str, Tensor]:
        """One checkpoint's parameters.

        Args:
            index: its number; -1 is the last.

        Returns:
            Parameter name -> tensor.
        """
        state = {self.named(n): t for n, t in read_checkpoint(self.sources[index], self.labels[index]).items()}
        return {n: state[n].detach() for n in self.parameters}


def _sources(checkpoints: Any) -> tuple[list[Source], list[int | str]]:
    if isinstance(checkpoints, str | os.PathLike | UPath):
        folder = locate(checkpoints)
        store = CheckpointStore(folder)
        labels = store.labels()
        return _folder(folder) if labels is None else ([StoredCheckpoint(store, i) for i in range(len(labels))], labels)
    if not isinstance(checkpoints, Sequence) or not all(
        isinstance(c, Mapping | str | os.PathLike) for c in checkpoints
    ):
        raise QuestionError(
            "these are no checkpoints",
            where="checkpoints",
            expected="a folder, or a list of state dicts or paths",
            got=type(checkpoints).__name__
            if not isinstance(checkpoints, Sequence)
            else sorted({type(c).__name__ for c in checkpoints}),
        )
    return [c if isinstance(c, Mapping) else Path(c) for c in checkpoints], list(range(len(checkpoints)))


def _folder(folder: Path) -> tuple[list[Source], list[int | str]]:
    """The safetensors files of a folder in the order of the one number that their names differ in."""
    remedy = "give a list of paths, in order, with labels="
    if not is_folder(folder):
        raise StoreError("there is no such folder of checkpoints", where=folder, remedy=remedy)
    names = names_in(folder)
    pickled = [name for name in names if Path(name).suffix in _PICKLED]
    if pickled:
        raise StoreError(
            "the folder holds checkpoints that are not safetensors files",
            where=folder,
            expected="*.safetensors",
            got=pickled[:3],
            remedy="opening them would run code; write them with safetensors.torch.save_file, or move them away",
        )
    paths = [folder / name for name in names if name.endswith(".safetensors")]
    for path in paths:
        _check_plain(path, remedy)
    numbers = [[int(x) for x in re.findall(r"\d+", p.stem)] for p in paths]
    varying = [i for i, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    alike = len({re.sub(r"\d+", "#", p.stem) for p in paths}) <= 1
    if len(paths) > 1 and (not alike or len(varying) != 1 or len({n[varying[0]] for n in numbers}) < len(paths)):
        raise StoreError(
            "the names of the checkpoints do not tell their order",
            where=folder,
            expected="names that differ in one number",
            got=sorted(p.name for p in paths)[:3],
            remedy=remedy,
        )
    order = sorted(range(len(paths)), key=lambda i: numbers[i][varying[0]] if varying else 0)
    return [paths[i] for i in order], [numbers[i][varying[0]] if varying else i for i in order]


def _check_plain(path: Path, remedy: str) -> None:
    """Refuse what is found in a folder and is no file of it."""
    try:
        with opened(path):
            pass
    except OSError as error:
        raise StoreError(
            f"a checkpoint of the folder cannot be read: {reason(error)}",
            where=path,
            expected="a plain file",
            remedy=remedy,
        ) from error


def read_checkpoint(source: Source, label: int | str) -> StateDict:
    """Read one checkpoint.

    Args:
        source: a state dict, a safetensors file, or an entry of a store.
        label: what it is called, for the error.

    Returns:
        Its state dict.

    Raises:
        StoreError: a file is missing, damaged or not a safetensors file.
    """
    if isinstance(source, StoredCheckpoint):
        return source.read()
    if not isinstance(source, Path):
        return source
    try:
        with opened(source, follow_links=True):  # named by the caller; but a pipe is not waited for
            pass
        with safetensors.safe_open(source, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(
            f"checkpoint {label} cannot be read: {reason(error) if isinstance(error, OSError) else error}",
            where=source,
            expected="a safetensors file",
            remedy="copy it again; a pickled one is never opened: write it with safetensors.torch.save_file",
        ) from error


def _check(state: StateDict, label: int | str, parameters: Mapping[str, ParameterInfo], known: set[str]) -> None:
    """Refuse a checkpoint that is not of this model, or not finite."""
    given = {n: (tuple(t.shape), str(t.dtype)) for n, t in state.items() if n in parameters}
    wanted = {n: (tuple(p.shape), str(p.dtype)) for n, p in parameters.items()}
    foreign = [n for n in state if n not in known]
    differing = [n for n in wanted if given.get(n) != wanted[n]] + foreign
    if differing:
        name = differing[0]
        raise StoreError(
            f"checkpoint {label} is of another model: {len(differing)} entries differ",
            where=f"entry {name!r}",
            expected=wanted.get(name, "no such entry"),
            got=given.get(name, "an entry that the model does not have" if name in foreign else "no such entry"),
            remedy="build the architecture and the dtype that were saved",
        )
    for name in parameters:
        if not torch.isfinite(state[name]).all():
            raise NonFiniteError(f"checkpoint {label} holds a NaN or an infinity", where=f"parameter {name!r}")


def _buffer(name: str, own: Tensor, stored: bool, last: StateDict, given: StateDict | None, label: int | str) -> Tensor:
    """A buffer's value: the one given, else the last checkpoint's; the model's own where none is ever stored."""
    value = (given or {}).get(name, last.get(name, None if stored else own))
    if value is None or value.shape != own.shape:
        raise StoreError(
            "the last checkpoint does not hold a buffer of the model",
            where=f"checkpoint {label}, buffer {name!r}",
            expected=tuple(own.shape),
            got="no such entry" if value is None else tuple(value.shape),
            remedy="pass buffers={name: tensor}",
        )
    return value.detach().clone()
