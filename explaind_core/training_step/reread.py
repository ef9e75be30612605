"""A batch's inputs and targets, read again from the dataset instead of the store: they must be as they were seen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from explaind_core.data import IndexedDataset
from explaind_core.errors import ExplaindError, QuestionError, StoreError
from explaind_core.training_step.batch_content import BatchContent

__all__ = ["read_again"]


def read_again(
    dataset: IndexedDataset | None, ids: Tensor, draws: Tensor | None, key: str, rows: Tensor, *, step: int
) -> tuple[Any, Any]:
    """Inputs and targets of a micro-batch that was not stored.

    Args:
        dataset: where to read it; None where there is none.
        ids: which samples, int64 ``[n]``.
        draws: which draw of each, int64 ``[n]``; None where they are the same at every reading.
        key: the :attr:`BatchContent.hash` that it had.
        rows: the :meth:`BatchContent.row_hashes` that it had.
        step: whose batch it is, for errors.

    Returns:
        ``(inputs, targets)``.

    Raises:
        QuestionError: there is no dataset.
        StoreError: a sample cannot be read, or is not as it was.
    """
    if dataset is None:
        raise QuestionError(
            "the inputs of this run were not stored, and are to be read again",
            where=f"the batch of step {step}",
            remedy="open_run(..., dataset=explaind_core.data.IndexedDataset(...)), with its seed and collator; while "
            "recording, Recorder(..., inputs=dataset)",
        )
    where = f"the batch of step {step}"
    try:
        batch = dataset.batch(ids, draws)
    except ExplaindError:
        raise
    except Exception as error:
        raise StoreError(
            f"the samples cannot be read again: {type(error).__name__}: {error}",
            where=f"{where}: samples {_some(ids)}",
            remedy="open the run with the dataset that it was recorded with",
        ) from error
    content = BatchContent.of(batch.inputs, batch.targets, where)
    if content.hash != key:
        other = ids[content.row_hashes(len(ids)) != rows]
        raise StoreError(
            "samples that were read again are not as they were when the run was recorded",
            where=f"{where}: samples {_some(other)}" if len(other) else where,
            expected="the content that was recorded, bit by bit"
            if len(other)
            else "names, dtypes and shapes as recorded",
            got=f"{len(other)} of {len(ids)} samples differ" if len(other) else "the same numbers, arranged otherwise",
            remedy="open the run with the dataset, seed, collator and targets that it was recorded with; randomness in "
            "the dataset must come from the global generators of Python, numpy (legacy) or torch",
        )
    return batch.inputs, batch.targets


def _some(ids: Tensor) -> str:
    shown = ids[:5].tolist()
    return f"{shown}{' ...' if len(ids) > 5 else ''}"
