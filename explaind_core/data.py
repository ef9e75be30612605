"""Batches that say which samples they hold: ids that travel with the items, through workers, samplers and collation.

A sample's id is its position in the training set. It is attached where the item is read, in whichever process that
is, and comes out beside the batch; no sampler is asked, and no order is assumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from explaind_core.errors import RecordingError

__all__ = ["Collated", "DrawnBatch", "IndexedBatch", "IndexedDataset", "IndexedItem", "indexed_loader", "with_ids"]

#: So many draws an epoch may have: a draw is ``epoch * DRAWS + position``.
DRAWS = 2**32


class IndexedItem(NamedTuple):
    """One item as it was read.

    Attributes:
        id: its position in the training set.
        draw: the number of the reading where items are drawn at random, 0 otherwise.
        item: what the dataset holds there.
    """

    id: int
    draw: int
    item: Any


class IndexedBatch(NamedTuple):
    """A batch and its samples.

    Attributes:
        ids: int64 ``[n]``.
        inputs: of the model.
        targets: of the loss.
    """

    ids: Tensor
    inputs: Any
    targets: Any


class DrawnBatch(NamedTuple):
    """A batch of items that were drawn at random.

    Attributes:
        ids: int64 ``[n]``.
        inputs: of the model.
        targets: of the loss.
        draws: which reading of each: int64 ``[n]``.
    """

    ids: Tensor
    inputs: Any
    targets: Any
    draws: Tensor


class IndexedDataset(Dataset[IndexedItem]):
    """A map-style dataset whose items come with their index.

    With a ``seed``, items are read reproducibly even where reading them is random (augmentation): item (id, draw) is
    read under a state of Python's, numpy's (legacy) and torch's generators that is made of (seed, draw, id) alone. It
    comes out the same bit by bit in any worker and order, and the global generators are left as they were.

    Args:
        dataset: anything with ``dataset[i]`` and a length.
        seed: of the random numbers that reading an item takes.
        collate: makes a batch of a list of items, as a DataLoader's ``collate_fn``; torch's by default.
        targets: the key, or keys, of the targets in a batch that is a mapping; without it a batch is a pair
            (inputs, targets).

    Raises:
        RecordingError: its samples have no positions.

    Example:
        >>> data = IndexedDataset([(torch.tensor([float(i)]), i % 2) for i in range(4)])
        >>> data[3]
        IndexedItem(id=3, draw=0, item=(tensor([3.]), 1))
        >>> data.batch(torch.tensor([3, 0]))
        IndexedBatch(ids=tensor([3, 0]), inputs=tensor([[3.],
                [0.]]), targets=tensor([1, 0]))
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        targets: str | Sequence[str] | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise RecordingError(
                "the samples of this dataset have no positions",
                where=type(dataset).__name__,
                expected="a map-style dataset: dataset[i]",
                remedy="let every item carry its own id, and pass that to recorder.batch(..., ids=...)",
            )
        self.dataset, self.seed = dataset, seed
        self.collate = default_collate if collate is None else collate
        self.targets = targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> IndexedItem:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        index = int(index)
        if index < 0:  # a position is one number
            index += len(self)
        return IndexedItem(index, draw, self._read(index, draw))

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[IndexedItem]:
        """Many at once, where the dataset can do that."""
        together = getattr(self.dataset, "__getitems__", None)
        if together is None or self.seed is not None:
            return [self[key] for key in keys]
        plain = [int(key[0] if isinstance(key, tuple) else key) for key in keys]
        return [IndexedItem(i, 0, item) for i, item in zip(plain, together(plain), strict=True)]

    def _read(self, index: int, draw: int) -> Any:
        if self.seed is None:
            return self.dataset[index]
        with _RandomState(self.seed, draw, index):
            return self.dataset[index]

    def batch(self, ids: Tensor, draws: Tensor | None = None) -> IndexedBatch | DrawnBatch:
        """Read the batch of some samples (again).

        Args:
            ids: int64 ``[n]``.
            draws: which reading of each, where there is a seed: int64 ``[n]``, 0 by default.

        Returns:
            The batch, with draws where there is a seed.
        """
        numbers = torch.zeros_like(ids) if draws is None else draws
        items = [self._read(i, d) for i, d in zip(ids.tolist(), numbers.tolist(), strict=True)]
        return self._packed(ids, numbers, self.collate(items))

    def _packed(self, ids: Tensor, draws: Tensor, data: Any) -> IndexedBatch | DrawnBatch:
        inputs, targets = split_targets(data, self.targets)
        return IndexedBatch(ids, inputs, targets) if self.seed is None else DrawnBatch(ids, inputs, targets, draws)


def split_targets(data: Any, targets: str | Sequence[str] | None) -> tuple[Any, Any]:
    """The inputs and the targets in a collated batch (see :class:`IndexedDataset`).

    Args:
        data: a batch as it was collated.
        targets: see :class:`IndexedDataset`.

    Returns:
        (inputs, targets).

    Raises:
        RecordingError: it is neither a pair nor a mapping with those keys.

    Example:
        >>> split_targets({"x": 1, "y": 2}, "y")
        ({'x': 1}, 2)
    """
    if targets is None:
        if isinstance(data, tuple | list) and len(data) == 2:
            return data[0], data[1]
        raise RecordingError(
            "what are the inputs and the targets of a batch?",
            expected="a pair (inputs, targets)",
            got=type(data).__name__,
            remedy="name the targets in a mapping, targets='labels'; or let collate make a pair",
        )
    names = [targets] if isinstance(targets, str) else list(targets)
    missing = [n for n in names if not isinstance(data, Mapping) or n not in data]
    if missing:
        raise RecordingError(
            f"the batch has no targets {missing}",
            expected=f"a mapping with the keys {names}",
            got=sorted(data) if isinstance(data, Mapping) else type(data).__name__,
            remedy="name those that it has: targets=...",
        )
    inputs = {key: value for key, value in data.items() if key not in names}
    return inputs, data[names[0]] if isinstance(targets, str) else {n: data[n] for n in names}


class _RandomState:
    """Within it, the global generators stand where (seed, draw, id) puts them; behind it, where they stood before."""

    def __init__(self, *key: int) -> None:
        self._digest = blake2b(repr(key).encode(), digest_size=16).digest()

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = int.from_bytes(self._digest[:8], "little")
        random.seed(seed)
        np.random.seed(np.frombuffer(self._digest, dtype=np.uint32))
        # Not torch.manual_seed, which seeds accelerators as well: a forked worker must not touch them.
        torch.default_generator.manual_seed(seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])
        torch.set_rng_state(self._before[2])


# ---------------------------------------------------------------------- loaders
class DrawSampler:
    """A batch sampler's batches, each index with the number of its draw. It runs in the main process, in order.

    Args:
        batches: the batch sampler.
    """

    def __init__(self, batches: Any) -> None:
        self.batches, self.epoch = batches, -1

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name in ("batches", "epoch"):  # not yet there: a copy is being made
            raise AttributeError(name)
        return getattr(self.batches, name)

    def set_epoch(self, epoch: int) -> None:
        """Number the draws to come as those of this epoch.

        Args:
            epoch: its number, counted from 0.
        """
        self.epoch = epoch - 1
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.epoch += 1
        draw = self.epoch * DRAWS
        for batch in self.batches:
            yield [(index, draw + k) for k, index in enumerate(batch)]
            draw += len(batch)


class Collated:
    """Collates items without their ids, and packs both.

    Args:
        collate: makes a batch of a list of items.
        pack: ``pack(ids, draws, batch)``, what a loader yields.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], pack: Callable[[Tensor, Tensor, Any], Any]) -> None:
        self.collate, self.pack = collate, pack

    def __call__(self, items: Sequence[IndexedItem]) -> Any:
        """The packed batch of these items."""
        ids, draws = (torch.tensor([item[k] for item in items], dtype=torch.int64) for k in (0, 1))
        return self.pack(ids, draws, self.collate([item.item for item in items]))


def with_ids(
    loader: DataLoader[Any],
    pack: Callable[[Tensor, Tensor, Any], Any] | None = None,
    *,
    seed: int | None = None,
    targets: str | Sequence[str] | None = None,
) -> DataLoader[Any]:
    """The same loader, batches and workers, with each batch's samples named.

    Args:
        loader: over a map-style dataset (an :class:`IndexedDataset`, or one that will be wrapped).
        pack: what is yielded, ``pack(ids, draws, batch)``; an :class:`IndexedBatch` or :class:`DrawnBatch` by default.
        seed: as for :class:`IndexedDataset`, where the loader's dataset is none.
        targets: likewise.

    Returns:
        A loader.

    Raises:
        RecordingError: its samples have no positions, or it does not make batches.

    Example:
        >>> loader = DataLoader([(torch.tensor([float(i)]), i % 2) for i in range(3)], batch_size=2)
        >>> [batch.ids.tolist() for batch in with_ids(loader)]
        [[0, 1], [2]]
    """
    if loader.batch_sampler is None:
        raise RecordingError(
            "the loader does not make batches", expected="a batch_size or a batch_sampler", got="batch_size=None"
        )
    dataset, collate = loader.dataset, loader.collate_fn
    if not isinstance(dataset, IndexedDataset):
        dataset = IndexedDataset(dataset, seed=seed, collate=collate, targets=targets)
    options = {
        name: getattr(loader, name)
        for name in ("num_workers", "pin_memory", "timeout", "worker_init_fn", "generator", "prefetch_factor")
    }
    options |= {
        name: getattr(loader, name)
        for name in ("multiprocessing_context", "persistent_workers", "pin_memory_device", "in_order")
        if hasattr(loader, name)  # younger than the oldest torch that is supported, or about to go
    }
    return DataLoader(
        dataset,
        batch_sampler=loader.batch_sampler if dataset.seed is None else DrawSampler(loader.batch_sampler),
        collate_fn=Collated(collate, pack or dataset._packed),
        **options,
    )


def indexed_loader(
    dataset: Any, *, seed: int | None = None, targets: str | Sequence[str] | None = None, **options: Any
) -> DataLoader[Any]:
    """A DataLoader that yields ``(ids, inputs, targets)``; with a seed, ``(ids, inputs, targets, draws)``.

    Args:
        dataset: map-style, or an :class:`IndexedDataset`, which brings its own seed, targets and collation.
        seed: see :class:`IndexedDataset`.
        targets: see :class:`IndexedDataset`.
        options: of ``torch.utils.data.DataLoader``: batch_size, shuffle, sampler, num_workers, collate_fn, ...

    Returns:
        A loader.

    Raises:
        RecordingError: an option is given that the :class:`IndexedDataset` has already, a seed, targets or a
            collate_fn.

    Example:
        >>> data = [(torch.tensor([float(i)]), i % 2) for i in range(4)]
        >>> for ids, inputs, targets in indexed_loader(data, batch_size=3):
        ...     print(ids.tolist(), inputs.flatten().tolist(), targets.tolist())
        [0, 1, 2] [0.0, 1.0, 2.0] [0, 1, 0]
        [3] [3.0] [1]
    """
    if isinstance(dataset, IndexedDataset):
        given = {"seed": seed, "targets": targets, "collate_fn": options.get("collate_fn")}
        twice = [name for name, value in given.items() if value is not None]
        if twice:
            raise RecordingError("the IndexedDataset has its own", where="indexed_loader", got=twice)
        options["collate_fn"] = dataset.collate
    elif isinstance(dataset, IterableDataset):
        IndexedDataset(dataset)  # refuses it
    return with_ids(DataLoader(dataset, **options), seed=seed, targets=targets)
