"""Checkpoints that somebody else saved, taken into a store that checks itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from explaind_core.checkpoints.checkpoint_store import CHECKPOINTS, CheckpointStore
from explaind_core.checkpoints.state_dicts import Checkpoints, read_checkpoint
from explaind_core.errors import StoreError
from explaind_core.naming import qualified_name
from explaind_core.progress import track
from explaind_core.store import MANIFEST_NAME, VERSION, exists, is_folder, locate, names_in
from explaind_core.training_step import provenance

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
        path: a folder that does not exist yet (or is empty), or an address that fsspec knows.
        checkpoints: state dicts in order, or safetensors files in order; or a folder of safetensors files, whose names
            differ in one number that tells the order. Pickled files are never opened.
        model: the architecture, which all of them must fit.
        labels: of the checkpoints, one each; by default the number in the file's name, or the position in the list.
        progress: show a bar.

    Returns:
        Where the store lies.

    Raises:
        StoreError: there is something at ``path``; a checkpoint is missing, damaged or of another model.
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
    if exists(store.path) and (not is_folder(store.path) or names_in(store.path)):
        raise StoreError(
            "there is something at this path already",
            where=store.path,
            expected="a new or empty folder",
            remedy="choose another path",
        )
    manifest = {"format": CHECKPOINTS, "version": VERSION, "run": store.begin(), "labels": list(found.labels)}
    manifest |= {"model": qualified_name(type(model)), "provenance": provenance()}
    numbered = enumerate(zip(found.sources, found.labels, strict=True))
    for index, (source, label) in track(numbered, len(found.labels), "importing", enabled=progress):
        store.write_tensors(store.checkpoint_path(index), {"label": label}, read_checkpoint(source, label))
    store.write_json(MANIFEST_NAME, manifest)  # the last: a folder without it is no store
    return store.path
