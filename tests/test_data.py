"""Loaders that name the samples of their batches, and items that are drawn again bit by bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler, default_collate

import explaind_core as explaind
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


# ---------------------------------------------------------------------- runs whose inputs are read again
class Augmented(Squares):
    """Samples with noise, in double precision: they can be read again only under the same random state."""

    def __init__(self, n, shift=0.0):
        super().__init__(n)
        self.points = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift

    def __getitem__(self, i):
        return self.points[i] + 0.1 * torch.randn(3, dtype=torch.float64) + random.random(), i % 2


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def record(path, dataset, epochs=2, **options):
    model, loss = network(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    loader = indexed_loader(dataset, batch_size=4, shuffle=True)
    with explaind.Recorder(path, model, optimizer, loss, **options) as recorder:
        for _ in range(epochs):
            for ids, inputs, targets, *draws in loader:
                optimizer.zero_grad()
                (loss(model(inputs), targets) / 2).backward()
                recorder.batch(inputs, targets, ids=ids, weight=0.5, draws=draws[0] if draws else None)
                half = slice(0, len(ids) // 2 + 1)
                (loss(model(inputs[half]), targets[half]) / 2).backward()
                part = (ids[half], *(d[half] for d in draws))
                recorder.batch(inputs[half], targets[half], ids=part[0], weight=0.5, draws=part[1] if draws else None)
                optimizer.step()
    return path


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
def test_runs_whose_inputs_are_read_again_are_the_same_runs(tmp_path, mode):
    data = IndexedDataset(Augmented(10), seed=3)
    stored = explaind.open_run(record(tmp_path / "stored", data), model=network())
    path = record(tmp_path / "reread", data, inputs=data, mode=mode)
    assert not (path / "batches").exists()
    again = explaind.open_run(path, model=network(), dataset=IndexedDataset(Augmented(10), seed=3))
    for s in stored.steps:
        for one, other in zip(stored.batch(s).micro, again.batch(s).micro, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.targets, other.targets)
            assert one.weight == other.weight
    inputs = torch.randn(2, 3, dtype=torch.float64)
    results = [
        explaind.attribute(run, inputs, keep=("train", "test"), output=explaind.Chosen([0, 1]), nodes=2, progress=False)
        for run in (stored, again)
    ]
    assert results[0].identical(results[1].assign_attrs(results[0].attrs))


def test_samples_that_are_not_as_they_were_are_named(tmp_path):
    data = IndexedDataset(Augmented(10), seed=3)
    path = record(tmp_path / "run", data, inputs="reread")
    with pytest.raises(errors.QuestionError, match="were not stored"):
        explaind.open_run(path).batch(1)
    changed = Augmented(10)
    changed.points[7] += 1e-9
    run = explaind.open_run(path, dataset=IndexedDataset(changed, seed=3))
    wrong = [s for s in run.steps if 7 in run.sample_ids(s)]
    assert wrong
    for s in run.steps:
        if s not in wrong:
            run.batch(s)
            continue
        with pytest.raises(errors.StoreError, match="not as they were") as refused:
            run.batch(s)
        assert f"step {s}: samples [7]" in str(refused.value)
        assert "1 of " in str(refused.value)
    with pytest.raises(errors.StoreError, match="not as they were"):
        explaind.open_run(path, dataset=IndexedDataset(Augmented(10), seed=4)).batch(1)
    with pytest.raises(errors.StoreError, match="not as they were"):  # another draw
        explaind.open_run(path, dataset=IndexedDataset(Augmented(10))).batch(1)
    with pytest.raises(errors.StoreError, match="cannot be read again: IndexError"):
        explaind.open_run(path, dataset=IndexedDataset(torch.zeros(1, 3), seed=3)).batch(1)
    narrow = IndexedDataset(Augmented(10), seed=3, collate=lambda rows: [t.float() for t in default_collate(rows)])
    with pytest.raises(errors.StoreError, match="not as they were"):
        explaind.open_run(path, dataset=narrow).batch(1)


def test_what_cannot_be_read_again_is_refused_at_the_first_batch(tmp_path):
    with pytest.raises(errors.StoreError, match="not as they were"):  # noise without a seed
        record(tmp_path / "a", IndexedDataset(Augmented(10)), inputs=IndexedDataset(Augmented(10)))
    with pytest.raises(errors.QuestionError, match="how are inputs kept"):
        record(tmp_path / "b", Augmented(10), inputs="nowhere")
    data = IndexedDataset(Augmented(10), seed=0)
    model = network()
    recorder = explaind.Recorder(tmp_path / "c", model, torch.optim.SGD(model.parameters(), 0.1), inputs=data)
    with pytest.raises(errors.RecordingError, match="draws and ids"):
        recorder.batch(torch.zeros(2, 3), torch.zeros(2), ids=[0, 1], draws=[0])
