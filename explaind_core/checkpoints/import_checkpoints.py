"""Checkpoints that somebody else saved, taken into a store that checks itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from explaind_core.checkpoints.checkpoint_store import CHECKPOINTS, UNFINISHED_NAME, CheckpointStore
from explaind_core.checkpoints.state_dicts import Checkpoints, read_checkpoint
from explaind_core.errors import StoreError
from explaind_core.naming import qualified_name
from explaind_core.progress import track
from explaind_core.store import MANIFEST_NAME, UNFINISHED, VERSION, exists, is_folder, locate, names_in
from explaind_core.training_step import fingerprint, provenance

__all__ = ["import_checkpoints"]


def import_checkpoints(
    path: str | os.PathLike[str],
    checkpoints: Any,
    model: nn.Module,
    *,
    labels: Sequence[int | str] | None = None,
    progress: bool = True,
) -> Path:
    """Take checkpoints of a training that was not recorded into a store with checksums.

    :func:`explaind_core.attribute_checkpoints` takes the store instead of the checkpoints.

    Args:
        path: a folder that does not exist yet (or is empty), or an address that fsspec knows. An import of the same
            checkpoints that was killed is gone on with.
        checkpoints: state dicts in order, or safetensors files in order; or a folder of safetensors files, whose names
            differ in one number that tells the order. Pickled files are never opened.
        model: the architecture, which all of them must fit.
        labels: of the checkpoints, one each; by default the number in the file's name, or the position in the list.
        progress: show a bar.

    Returns:
        Where the store lies.

    Raises:
        StoreError: there is something else at ``path``; a checkpoint is missing, damaged or of another model.
        NonFiniteError, QuestionError: a parameter is not finite; fewer than two checkpoints, or labels that do not fit.

    Example:
        >>> import tempfile, torch, explaind_core as explaind
        >>> model, folder = torch.nn.Linear(2, 1), tempfile.TemporaryDirectory()
        >>> states = [{n: t * s for n, t in model.state_dict().items()} for s in (1.0, 0.5, 0.25)]
        >>> path = import_checkpoints(f"{folder.name}/store", states, model, labels=[0, 100, 200], progress=False)
        >>> result = explaind.attribute_checkpoints(path, model, torch.ones(1, 2), progress=False)
        >>> result.step.values.tolist()
        [100, 200]
        >>> folder.cleanup()
    """
    found = Checkpoints.of(checkpoints, labels, model, None)
    store = CheckpointStore(locate(path))
    manifest = {"format": CHECKPOINTS, "version": VERSION, "labels": list(found.labels)}
    manifest |= {"model": qualified_name(type(model)), "provenance": provenance()}
    begun = store.unfinished()
    if begun is None:
        # What a kill leaves of that file's writing has something between that nobody can guess.
        names = names_in(store.path)
        others = [name for name in names if not (name.startswith(UNFINISHED_NAME) and name.endswith(UNFINISHED))]
        if exists(store.path) and (not is_folder(store.path) or others):
            raise StoreError(
                "there is something at this path already",
                where=store.path,
                expected="a new or empty folder, or half an import of the same checkpoints",
                remedy="choose another path",
            )
        begun = {**manifest, "run": store.begin()}
        store.write_json(UNFINISHED_NAME, begun)
    store.sync_name()
    for key in ("labels", "model"):
        if begun[key] != manifest[key]:
            raise _others(store.path, key, begun[key], manifest[key])
    numbered = enumerate(zip(found.sources, found.labels, strict=True))
    for index, (source, label) in track(numbered, len(found.labels), "importing", enabled=progress):
        state, there = read_checkpoint(source, label), store.imported(index)
        if there is None:
            store.write_tensors(store.checkpoint_path(index), {"label": label}, state)
        elif fingerprint(there) != fingerprint(state):
            raise _others(store.path, f"checkpoint {label}", "other values", "these")
    store.sync(everything=True)
    store.write_json(MANIFEST_NAME, begun)  # the last: a folder without it is half an import
    store.finish()
    return store.path


def _others(path: Path, what: str, there: object, given: object) -> StoreError:
    return StoreError(
        f"there is half an import of other checkpoints at this path: {what}",
        where=path,
        expected=there,
        got=given,
        remedy="give the checkpoints, labels and model that it was begun with; or delete it, or choose another path",
    )
