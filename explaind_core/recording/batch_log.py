"""Which samples a step's gradient is of: declared by the loop, checked, and stored once per content."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from explaind_core import trees
from explaind_core.data import IndexedDataset
from explaind_core.errors import QuestionError, RecordingError
from explaind_core.store import RunStore
from explaind_core.tensors import copied
from explaind_core.training_step import BatchContent, ForwardState, InputRows, read_again

__all__ = ["BatchLog"]


class BatchLog:
    """The batches declared since the last step.

    Args:
        store: where contents go.
        train_size: the number of training samples, which ids lie below; None where it is not known.
        inputs: how they are kept: ``"stored"``, ``"reread"``, or the dataset that they will be read again from.

    Attributes:
        entries: one per micro-batch: where its content lies (``key``) and its ``weight``.
        ids: the sample ids of each, int64 ``[n]``.
        forwards: how the model stood when each was passed through, None where no pass was seen.
        keeps_contents: whether contents are kept until the step is over.
        contents: inputs and targets of each, where they are kept.
        reread: what tells a batch that is not stored, but will be read again: draws and hashes of its samples.
    """

    def __init__(self, store: RunStore, train_size: int | None, inputs: str | IndexedDataset = "stored") -> None:
        if not isinstance(inputs, IndexedDataset) and inputs not in ("stored", "reread"):
            raise QuestionError(
                "how are inputs kept?",
                where="Recorder(..., inputs=)",
                expected="'stored', 'reread', or the IndexedDataset that they will be read again from",
                got=inputs,
            )
        self._store, self._train_size = store, train_size
        self._stored, self._dataset = inputs == "stored", inputs if isinstance(inputs, IndexedDataset) else None
        self.reread: list[dict[str, Tensor]] = []
        self._seen_hashes: set[str] = set()
        self.entries: list[dict[str, Any]] = []
        self.ids: list[Tensor] = []
        self.forwards: list[ForwardState | None] = []
        self._scales: list[float] = []
        self.keeps_contents = False
        self.contents: list[BatchContent] = []
        self.rows: list[InputRows] = []

    def clear(self) -> None:
        """Forget what was declared."""
        self.entries, self.ids, self.forwards, self._scales, self.contents = [], [], [], [], []
        self.reread, self.rows = [], []

    def tensors(self) -> dict[str, Tensor]:
        """What a step file holds of the batches.

        Returns:
            The ids, the random states and what is needed to read a batch again, by their names in the file.
        """
        found = {f"ids/{index}": ids for index, ids in enumerate(self.ids)}
        for index, forward in enumerate(self.forwards):
            if forward is None:
                continue
            found |= {f"rng/{index}/{device}": state for device, state in forward.rng.items()}
            found |= {f"outputs/{index}/{name}": entries for name, entries in forward.outputs.items()}
        for index, said in enumerate(self.rows):
            found |= {f"owners/{index}/{leaf}": owners for leaf, owners in said.owners.items()}
        for index, known_by in enumerate(self.reread):
            found |= {f"{name}/{index}": tensor for name, tensor in known_by.items()}
        return found

    def headers(self) -> list[dict[str, Any]]:
        """What a step's header holds of the batches.

        Returns:
            The entries, with how the model stood.
        """
        return [
            entry if forward is None else {**entry, "forward": forward.header()}
            for entry, forward in zip(self.entries, self.forwards, strict=True)
        ]

    def fingerprint(self, before: str) -> str:
        """A digest over the contents, ids and weights of all batches so far.

        Args:
            before: that of the last step.

        Returns:
            That of the coming one, 32 hexadecimal digits.
        """
        digest = xxh3_128(before.encode())
        for entry, ids in zip(self.entries, self.ids, strict=True):
            digest.update(f"{entry['key']} {entry['weight']!r} ".encode())
            digest.update(ids.numpy().tobytes())
        return str(digest.hexdigest())

    def assign_passes(self, after: ForwardState | None, scale: float | None = None) -> None:
        """Give every batch its pass, once the gradient is there.

        A batch is declared behind its pass, or before it. In the second case no pass stands before the first batch and
        one stands behind each; where neither holds, no pass is known to be of a batch.

        Args:
            after: the pass behind the last batch, if one was seen.
            scale: what a gradient scaler told the optimizer; None where it told nothing.
        """
        if scale is not None:
            self._scales = [scale] * len(self._scales)
        if self.forwards and self.forwards[0] is None:
            behind = [*self.forwards[1:], after]
            self.forwards = behind if all(behind) else [None] * len(behind)
        self.forwards = [
            None if forward is None else replace(forward, scale=scale)
            for forward, scale in zip(self.forwards, self._scales, strict=True)
        ]

    def drop_repeats(self, first: int, step: int) -> None:
        """Drop the entries from ``first`` on: a closure that is evaluated again declares its batch again.

        Args:
            first: the number of entries that were declared before.
            step: the number of the coming step, for the error.

        Raises:
            RecordingError: they are not the batch that was declared before.
        """
        again = list(zip(self.entries[first:], self.ids[first:], strict=True))
        before = list(zip(self.entries[:first], self.ids[:first], strict=True))
        same = len(again) == len(before) and all(
            e == f and torch.equal(i, j) for (e, i), (f, j) in zip(again, before, strict=True)
        )
        if again and not same:
            raise RecordingError(
                "the closure declared another batch when it was evaluated again",
                where=f"step {step}",
                expected="the same samples at every evaluation within one optimizer.step(closure)",
                remedy="draw the batch outside the closure",
            )
        del self.entries[first:], self.ids[first:], self.forwards[first:], self._scales[first:], self.contents[first:]
        del self.reread[first:], self.rows[first:]

    def declare(
        self,
        inputs: Any,
        targets: Any,
        ids: Any,
        weight: float,
        step: int,
        forward: ForwardState | None = None,
        scale: float = 1.0,
        draws: Any = None,
    ) -> None:
        """Check one micro-batch and store its content; see :meth:`explaind_core.Recorder.batch`.

        Args:
            inputs: what the model was called with.
            targets: the loss's second argument.
            ids: one integer per sample.
            weight: the factor of its loss.
            step: the number of the coming step, for errors.
            forward: how the model stood when it was passed through, if that was seen.
            scale: the factor of a gradient scaler beyond the weight.
            draws: which draws of the samples, where they are read again.

        Raises:
            RecordingError: ids are not one integer per sample, or out of range; the content cannot be stored.
        """
        where = f"batch of step {step}"
        try:
            ids = torch.as_tensor(ids).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecordingError(
                "ids must be one integer per sample",
                where=where,
                expected="a 1-d sequence of integers",
                got=f"{type(ids).__name__}: {error}",
            ) from error
        if ids.ndim != 1 or ids.dtype.is_floating_point or ids.is_complex() or ids.dtype == torch.bool:
            raise RecordingError(
                "ids must be one integer per sample",
                where=where,
                expected="a 1-d sequence of integers",
                got=f"shape {tuple(ids.shape)}, dtype {ids.dtype}",
            )
        inputs, said = InputRows.split(inputs)
        said.check(len(ids), where)
        owned = [t for i, t in enumerate(trees.leaves(inputs)) if i not in said.shared and i not in said.owners]
        for name, tensors in (("inputs", owned), ("targets", trees.leaves(targets))):
            for tensor in tensors[:1]:
                if tensor.ndim == 0 or len(tensor) != len(ids):
                    raise RecordingError(
                        f"ids and {name} do not have the same number of samples",
                        where=where,
                        expected=f"{len(tensor) if tensor.ndim else 'a batch axis and its number of'} ids",
                        got=f"{len(ids)} ids",
                        remedy="say explaind.Shared(tensor) of an input that belongs to no sample (a mask, edges), "
                        "explaind.PerRow(tensor, sample) of one whose rows belong to samples (the nodes of graphs)"
                        if name == "inputs"
                        else None,
                    )
        bad = ids[(ids < 0) | (ids >= (self._train_size if self._train_size is not None else math.inf))]
        if len(bad):
            raise RecordingError(
                f"{len(bad)} ids are out of range",
                where=where,
                expected="0 <= id" + (f" < {self._train_size} (train_size)" if self._train_size is not None else ""),
                got=bad[:5].tolist(),
                remedy="pass the positions of the samples in the training set",
            )
        given = BatchContent.of(inputs, targets)
        # Copies: inputs and targets may be one tensor, or overlap (an autoencoder, a language model).
        content = BatchContent(given.structure, {key: copied(tensor) for key, tensor in given.tensors.items()})
        ids = copied(ids.to(torch.int64))
        if not self._stored:
            self._note_reread(content, ids, draws, step)
        elif content.hash not in self._seen_hashes and not self._store.has_batch(content.hash):
            self._store.write_tensors(self._store.batch_path(content.hash), content.structure, content.tensors)
        self._seen_hashes.add(content.hash)
        entry = {"key": content.hash, "weight": float(weight)} | ({} if self._stored else {"reread": True})
        self.entries.append(entry | ({"rows": said.header()} if said else {}))
        self.rows.append(said)
        self.ids.append(ids)
        self.forwards.append(forward)
        if self.keeps_contents:
            self.contents.append(content)
        self._scales.append(float(scale))

    def _note_reread(self, content: BatchContent, ids: Tensor, draws: Any, step: int) -> None:
        """Note what tells a batch that is not stored; the first one is read again at once."""
        if draws is not None:
            draws = copied(torch.as_tensor(draws).to(torch.int64))
            if draws.shape != ids.shape:
                raise RecordingError(
                    "draws and ids do not have the same number of samples",
                    where=f"batch of step {step}",
                    expected=tuple(ids.shape),
                    got=tuple(draws.shape),
                )
        rows = content.row_hashes(len(ids))
        if self._dataset is not None and not self._seen_hashes:
            read_again(self._dataset, ids, draws, content.hash, rows, step=step)
        self.reread.append({"rows": rows} | ({} if draws is None else {"draws": draws}))
