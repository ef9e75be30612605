"""similarity()'s memory: blocks, passes, what is forgotten, and what must fit."""

from __future__ import annotations

import tempfile
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.question import Question
from explaind_core.scores import second_moments
from explaind_core.strategies import entry_features as entries
from support.axes_oracle import influences
from support.axes_runs import DATA, INPUTS, OPTIMIZERS, TARGETS, example, network, record_batches
from support.similarity_oracle import (
    GRAM,
    MODULE,
    ask,
    assert_same,
    cosines,
    oracle,
)


def least(**question) -> int:
    """The least memory that is enough, to a few bytes."""
    for memory in range(64, 9000, 64):
        try:
            ask(("nesterov", "plain"), nodes=1, memory=memory, **question)
        except QuestionError:
            continue
        return memory
    raise AssertionError


@pytest.mark.parametrize("over", [GRAM, ("step", "parameter", "train"), ("step", "parameter", "output")])
@pytest.mark.parametrize("per", [(), ("layer",)])
def test_little_memory_means_more_passes_and_smaller_blocks_and_the_same_numbers(over, per, monkeypatch):
    seen = {"entries": [], "rows": set(), "columns": set()}

    class Spy(entries.EntryFeatures):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen["entries"].append(self.count)

    def feature_map(question, function, before, after, names, block, points, columns):
        found = original(question, function, before, after, names, block, points, columns)
        seen["rows"].add(block.stop - block.start)
        seen["columns"].add(next(iter(found.values())).shape[1])
        return found

    original = MODULE.feature_map
    monkeypatch.setattr(second_moments, "EntryFeatures", Spy)
    monkeypatch.setattr(MODULE, "feature_map", feature_map)
    monkeypatch.setattr(MODULE, "HELD", 1)
    truth = oracle("nesterov", "plain", 1)
    for steps in (None, {"a": [1, 3], "b": [4]}):
        assert_same(
            ask(("nesterov", "plain"), over=over, per=per, nodes=1, memory=700, steps=steps),
            cosines(truth, over, per, steps=steps),
        )
    assert seen["rows"] == seen["columns"] == {1}
    assert seen["entries"] == ([2] * 8 if "train" in over else [])

    for found in seen.values():
        found.clear()
    ask(("nesterov", "plain"), over=over, per=per, nodes=1)
    assert seen["rows"] == {3}
    assert seen["columns"] == ({2} if "output" in over else {1})
    assert seen["entries"] == ([8] if "train" in over else [])


def test_a_few_outputs_at_a_time_where_all_of_them_do_not_fit(monkeypatch):
    """Three samples fit with one column, not with two."""
    widths = set()
    original = MODULE.feature_map

    def feature_map(*arguments):
        found = original(*arguments)
        widths.add(next(iter(found.values())).shape[:2])
        return found

    monkeypatch.setattr(MODULE, "feature_map", feature_map)
    over = ("step", "parameter", "output")
    found = ask(("nesterov", "plain"), over=over, nodes=1, memory=4 * 5 * 20 * 8)
    assert widths == {(3, 1)}
    assert_same(found, cosines(oracle("nesterov", "plain", 1), over))


@pytest.mark.parametrize("train", [None, [4]])
def test_a_pass_may_have_no_sample_in_a_micro_batch(train):
    found = ask(("nesterov", "micro"), nodes=1, memory=2400, train=train)
    assert_same(found, cosines(oracle("nesterov", "micro", 1), GRAM, train=train))


@pytest.mark.parametrize(("over", "bytes_"), [(GRAM, 2 * 3 * 20 * 8), (("step", "parameter"), 4 * 20 * 8)])
def test_what_one_sample_takes_must_fit(over, bytes_):
    assert bytes_ <= least(over=over) < bytes_ + 64
    with pytest.raises(QuestionError) as error:
        ask(("nesterov", "plain"), over=over, memory=bytes_ - 1)
    assert error.value.what == "the question does not fit into the memory budget"
    assert "one t" in error.value.where
    assert "memory=" in error.value.remedy


def test_the_matrices_must_fit():
    inputs = torch.zeros(50, 3).double()
    with pytest.raises(QuestionError, match="memory budget") as error:
        ask(("descent", "plain"), inputs=inputs, memory=3 * 8 * 50 * 50 - 1)
    assert "50 test samples" in error.value.where
    with pytest.raises(QuestionError, match="memory budget"):
        ask(("descent", "plain"), inputs=inputs, per="layer", memory=3 * 8 * 50 * 50 * 2 - 1)


def test_tensors_that_are_asked_for_must_fit():
    with pytest.raises(QuestionError, match="memory budget"):
        ask(("descent", "plain"), over=("gradient_step", "parameter", "train"), memory=2000)


class Largest(TorchDispatchMode):
    """The most entries of any tensor made."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return found


def test_nothing_is_held_for_all_training_samples_and_parameters_or_test_samples():
    """With 24 test samples, 24 training samples, two outputs and a tensor of 48 entries."""
    generator = torch.Generator().manual_seed(2)
    data, targets = torch.randn(24, 3, generator=generator).double(), torch.randint(2, (24,), generator=generator)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    batches = [list(range(a, a + 8)) for a in (0, 8, 16)]
    run = record_batches(model, OPTIMIZERS["nesterov"], data, targets, batches)
    inputs = torch.randn(24, 3, generator=generator).double()
    with Largest() as largest:
        found = explaind.similarity(run, inputs, nodes=1, memory=3 * 8 * 24**2, progress=False)
    with Largest() as at_once:
        whole = explaind.similarity(run, inputs, nodes=1, progress=False)
    assert_same(found, whole.values)
    assert at_once.size >= max(24 * 48, 24 * 2 * 48)
    assert largest.size < min(24 * 48, 24 * 24, 24 * 2 * 48)


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    run = example("adamw")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    class Broken(entries.EntryFeatures):
        def blocks(self, split, **options):
            seen.extend(tmp_path.rglob("moments"))
            if split.step == 3:
                raise KeyboardInterrupt
            return super().blocks(split, **options)

    ask(run)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(second_moments, "EntryFeatures", Broken)
    with pytest.raises(KeyboardInterrupt):
        ask(run)
    assert seen
    assert not list(tmp_path.iterdir())


@lru_cache
def long_run(kind: str):
    """Steps of one sample: 60 of them, or 20 whose momentum forgets within some ten."""
    optimizers = {
        "slow": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.99)),
        "two states": OPTIMIZERS["ademamix"],
        "sixty": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.3),
    }
    options = {
        "schedule": {"schedule": [{"momentum": 0.9 if s < 6 else 0.02 + 0.05 * (s % 3)} for s in range(1, 21)]},
        "missing": {"missing": {s: ["2.bias"] for s in range(10, 18)}},
    }
    make = optimizers.get(kind, lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.05))
    batches = [[s % 9] for s in range(60 if kind == "sixty" else 20)]
    return record_batches(network(), make, DATA, TARGETS, batches, **options.get(kind, {}))


def first_that_matters(run, first: int) -> int:
    """The step of the first gradient that the momenta of the steps behind it leave more than a rounding of."""
    left = [np.prod([run.hyper(s)[0]["momentum"] for s in range(i + 1, first)]) for i in range(1, first + 1)]
    return 1 + int(np.argmax(np.array(left) > np.finfo(float).eps / first))


@pytest.mark.parametrize(
    ("kind", "first"), [("fast", 2), ("fast", 19), ("schedule", 15), ("schedule", 19), ("sixty", 59)]
)
def test_gradients_that_were_forgotten_are_not_taken_and_the_result_says_so(kind, first, monkeypatch):
    run, taken = long_run(kind), []

    class Spy(entries.EntryFeatures):
        def blocks(self, split, **options):
            taken.append(split.step)
            return super().blocks(split, **options)

    monkeypatch.setattr(second_moments, "EntryFeatures", Spy)
    question = {"steps": slice(first, first + 2), "nodes": 1}
    found = ask(run, **question)
    start = first_that_matters(run, first)
    assert start == {"fast": 5 if first == 19 else 1, "sixty": 25}.get(kind, start)
    assert taken == list(range(start, first + 2))
    if start > 1:
        assert found.attrs["tail_dropped"] == f"below rounding before step {start}"
    else:
        assert "tail_dropped" not in found.attrs

    taken.clear()
    monkeypatch.setattr(second_moments, "horizon", lambda _: 1)
    whole = ask(run, **question)
    assert taken == list(range(1, first + 2))
    assert "tail_dropped" not in whole.attrs
    assert_same(found, whole.values, 1e-13)


@pytest.mark.parametrize("kind", ["missing", "slow", "two states"])
def test_what_is_not_forgotten_is_taken(kind):
    """A parameter without gradients forgets nothing; 0.9^18 is no rounding; filters of two states are not bounded."""
    found = ask(long_run(kind), steps=[19, 20], nodes=1)
    assert "tail_dropped" not in found.attrs
    question = Question.ask(long_run(kind), INPUTS, keep=("test", "train"), steps=[19])
    assert entries.horizon(question) == 1


def test_a_dropped_tail_is_the_oracles_to_rounding():
    run = long_run("fast")
    found = ask(run, steps=[17, 18], nodes=1)
    assert "tail_dropped" in found.attrs
    assert_same(found, cosines(influences(run, INPUTS, 1), GRAM, steps=[17, 18]))
