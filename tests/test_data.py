"""Loaders that name the samples of their batches, and items that are drawn again bit by bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from explaind_core import errors
from explaind_core.data import DRAWS, IndexedDataset, indexed_loader, with_ids


class Squares(torch.utils.data.Dataset):
    """Item i is (i, i^2): it says by itself which one it is."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert isinstance(i, int)
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.tensor([float(i)]), i * i


class Together(Squares):
    """Reads many items at once."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class Noisy(Squares):
    """Augmentation with all three global generators."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()]), y


def last_first(rows):
    inputs, targets = zip(*reversed(rows), strict=True)
    return torch.stack(inputs), torch.tensor(targets)


def in_order(rows):
    inputs, targets = zip(*rows, strict=True)
    return torch.stack(inputs), torch.tensor(targets)


SAMPLERS = {
    "sequential": lambda data: SequentialSampler(data),
    "shuffled": lambda data: RandomSampler(data),
    "replacement": lambda data: RandomSampler(data, replacement=True, num_samples=2 * len(data)),
    "weighted": lambda data: WeightedRandomSampler([1.0, *[0.1] * (len(data) - 1)], 2 * len(data)),
}


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    drop_last=st.booleans(),
    make=st.sampled_from([Squares, Together]),
    collate=st.sampled_from([None, in_order]),
    seed=st.sampled_from([None, 0]),
)
def test_batches_name_their_samples(n, batch_size, sampler, drop_last, make, collate, seed):
    data = make(n)
    options = {"batch_size": batch_size, "drop_last": drop_last, "collate_fn": collate}
    torch.manual_seed(n)
    named = list(indexed_loader(data, sampler=SAMPLERS[sampler](data), seed=seed, **options))
    torch.manual_seed(n)
    plain = list(DataLoader(data, sampler=SAMPLERS[sampler](data), **options))
    assert len(named) == len(plain)
    for batch, (inputs, targets) in zip(named, plain, strict=True):
        assert torch.equal(batch.inputs, inputs)
        assert torch.equal(batch.targets, targets)
        assert batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == inputs.flatten().long().tolist()


def test_a_collator_that_reorders_is_not_noticed_but_ids_stay_with_their_items():
    # What a collator does inside a batch is its own business: ids are in the order in which it was given the items.
    [batch] = indexed_loader(Squares(3), batch_size=3, collate_fn=last_first)
    assert batch.ids.tolist() == [0, 1, 2]
    assert batch.inputs.flatten().tolist() == [2, 1, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_drawn_again_bit_by_bit(workers):
    data = IndexedDataset(Noisy(7), seed=5)
    torch.manual_seed(0)
    sampler = RandomSampler(data, replacement=True, num_samples=11)
    loader = indexed_loader(data, batch_size=3, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    epochs = [list(loader) for _ in range(2)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    seen = {}
    for epoch, batches in enumerate(epochs):
        assert torch.cat([b.draws for b in batches]).tolist() == list(range(epoch * DRAWS, epoch * DRAWS + 11))
        for batch in batches:
            again = IndexedDataset(Noisy(7), seed=5).batch(batch.ids, batch.draws)
            assert torch.equal(again.inputs, batch.inputs)
            for i, x in zip(batch.ids.tolist(), batch.inputs, strict=True):
                seen.setdefault(i, []).append(tuple(x.tolist()))
    assert all(len(set(found)) == len(found) for found in seen.values())  # every draw is another one
    other = IndexedDataset(Noisy(7), seed=6).batch(epochs[0][0].ids, epochs[0][0].draws)
    assert not torch.equal(other.inputs, epochs[0][0].inputs)


def test_drawing_leaves_the_global_generators_alone():
    data = IndexedDataset(Noisy(7), seed=5)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = random.random(), np.random.rand(), torch.rand(2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    data[2], data[1, 8]
    found = random.random(), np.random.rand(), torch.rand(2)
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
    assert torch.equal(data[2, 9].item[0], data[2, 9].item[0])
    assert not torch.equal(data[2, 9].item[0], data[2, 10].item[0])


def test_a_failing_item_leaves_them_alone_as_well():
    data, before = IndexedDataset(Noisy(7), seed=5), torch.get_rng_state()
    with pytest.raises(IndexError):
        data[7]
    assert torch.equal(before, torch.get_rng_state())


def test_positions_are_counted_from_the_front():
    assert IndexedDataset(Squares(5))[-1].id == 4


def test_mappings_and_their_targets():
    data = [{"x": torch.tensor(float(i)), "y": i, "z": -i} for i in range(4)]
    [one] = indexed_loader(data, batch_size=4, targets="y")
    assert set(one.inputs) == {"x", "z"}
    assert one.targets.tolist() == [0, 1, 2, 3]
    [two] = indexed_loader(data, batch_size=4, targets=["y", "z"])
    assert set(two.inputs) == {"x"}
    assert {n: t.tolist() for n, t in two.targets.items()} == {"y": [0, 1, 2, 3], "z": [0, -1, -2, -3]}


def test_what_has_no_ids_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from range(3)

    with pytest.raises(errors.RecordingError, match="have no positions"):
        indexed_loader(Stream(), batch_size=2)
    with pytest.raises(errors.RecordingError, match="does not make batches"):
        with_ids(DataLoader(Squares(3), batch_size=None))
    with pytest.raises(errors.RecordingError, match="has its own"):
        indexed_loader(IndexedDataset(Squares(3)), batch_size=2, seed=1)
    with pytest.raises(errors.RecordingError, match="what are the inputs"):
        list(indexed_loader([torch.zeros(3)], batch_size=1))
    with pytest.raises(errors.RecordingError, match=r"no targets \['y'\]"):
        list(indexed_loader([{"x": 1}], batch_size=1, targets="y"))
