"""The tape: a run's decomposition backwards, exactly as it is forwards, and nothing left behind."""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import explaind_core as explaind
from explaind_core.decomposition.decompose import Decomposer, StepDecomposition
from explaind_core.decomposition.tape import Tape
from explaind_core.errors import StoreError
from support.axes_runs import example

#: A clock, a momentum, matrices in the optimizer's state, one vector over everything, another point of evaluation,
#: parameters that miss a gradient, a filter that is switched off and on again, and a prehistory.
RUNS = [
    ("adamw", "missing"), ("nesterov", "rates"), ("muon", "plain"), ("shampoo", "plain"), ("lbfgs", "plain"),
    ("schedule-free", "plain"), ("schedule-free", "evaluated"), ("rmsprop", "frozen momentum"), ("nesterov", "used"),
    ("ademamix", "plain"), ("amsgrad", "used"),
]  # fmt: skip


@lru_cache
def forwards(case: tuple[str, str]) -> list[StepDecomposition]:
    return list(explaind.decompose(example(*case)))


def assert_same_tensors(one, other) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[n], other[n]) for n in one)


def read_out(declared, like: torch.Tensor) -> list[torch.Tensor]:
    """What a step's coefficients make of given vectors."""
    u = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = tuple((k + 2) * u for k in range(declared.filter.order))
    out, after = declared.filter.advance(states, declared.gradient_operator.apply(u))
    others = (declared.coupled_decay, declared.decoupled_decay)
    return [declared.preconditioner.apply(out), *after, *(operator.apply(u) for operator in others)]


def assert_same_step(one: StepDecomposition, other: StepDecomposition) -> None:
    for field in ("step", "error", "errors", "rounding", "drift", "correction"):
        assert getattr(one, field) == getattr(other, field), field
    for field in ("theta_before", "theta", "gradients", "taken_at"):
        assert_same_tensors(getattr(one, field), getattr(other, field))
    assert list(one.updates) == list(other.updates)
    for a, b in zip(one.updates.values(), other.updates.values(), strict=True):
        parts = [{k: v for k, v in vars(u).items() if isinstance(v, torch.Tensor)} for u in (a, b)]
        assert_same_tensors(*parts)
        assert (a.missed, a.moved) == (b.missed, b.moved)
    assert list(one.coefficients) == list(other.coefficients)
    for name, a in one.coefficients.items():
        like = one.theta[name] if name in one.theta else torch.cat([u.kernel.flatten() for u in one.updates.values()])
        found, expected = (read_out(declared, like) for declared in (a, other.coefficients[name]))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", RUNS, ids="-".join)
def test_the_steps_come_backwards_as_they_went_forwards(case):
    """For every number of steps that are held at a time; and once more, along the same tape."""
    there = forwards(case)
    assert {f.name for f in dataclasses.fields(StepDecomposition)} == {
        "step", "updates", "theta_before", "theta", "error", "rounding", "drift", "correction", "coefficients",
        "gradients", "taken_at", "errors",
    }  # fmt: skip
    for segment in range(1, len(there) + 2):
        with Tape(example(*case), len(there), segment=segment) as tape:
            for _ in range(2):
                back = list(tape.backwards())
                assert [step.step for step in back] == [step.step for step in reversed(there)]
                for one, other in zip(back, reversed(there), strict=True):
                    assert_same_step(one, other)


@pytest.mark.parametrize("last", [1, 2, 3, 4])
@pytest.mark.parametrize("segment", [None, 1, 2, 3, 4, 9])
def test_a_tape_may_end_early_and_tells_the_steps_it_has_seen(last, segment):
    case, seen = ("nesterov", "used"), []
    with Tape(example(*case), last, segment=segment, seen=lambda step: seen.append(step.step)) as tape:
        assert seen == list(range(1, last + 1))
        back = list(tape.backwards())
    assert [step.step for step in back] == list(range(last, 0, -1))
    for one, other in zip(back, reversed(forwards(case)[:last]), strict=True):
        assert_same_step(one, other)


def test_a_walk_that_was_left_early_does_not_disturb_the_next_one():
    there = forwards(("adamw", "missing"))
    with Tape(example("adamw", "missing"), 4, segment=2) as tape:
        for steps in (1, 2, 3, 4):
            walk = tape.backwards()
            for other in reversed(there[4 - steps :]):
                assert_same_step(next(walk), other)
            walk.close()


@pytest.mark.parametrize(("segment", "again"), [(2, 2), (3, 3), (4, 0)])
def test_no_more_steps_are_held_than_a_segment_has(segment, again, monkeypatch):
    """What is held is told by those that were made and are not yet gone; the last segment is not made again."""
    alive, made = weakref.WeakSet(), []
    steps = Decomposer.steps

    def counted(self, **options):
        for step in steps(self, **options):
            alive.add(step.updates["2.bias"])
            made.append(step.step)
            yield step

    monkeypatch.setattr(Decomposer, "steps", counted)
    largest = []
    with Tape(example("nesterov", "rates"), 4, segment=segment, seen=lambda _: largest.append(len(alive))) as tape:
        largest += [len(alive) for _ in tape.backwards()]
    assert len(largest) == 8
    assert max(largest) <= segment + 1
    assert made == [1, 2, 3, 4, *range(1, again + 1)]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go, but for those of the recorded run."""
    example("adamw", "missing")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_nothing_is_left_on_disk(temporary):
    with Tape(example("adamw", "missing"), 4, segment=1) as tape:
        (folder,) = temporary.iterdir()
        assert folder.name.startswith("explaind-tape-")
        assert len([p for p in folder.rglob("*.safetensors") if p.is_file()]) == 4
        list(tape.backwards())
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_on_disk_after_an_error_on_the_way_back(temporary):
    def interrupted() -> None:
        with Tape(example("adamw", "missing"), 4) as tape:
            for _ in tape.backwards():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_on_disk_after_an_error_on_the_way_there(temporary):
    kept = []

    def interrupt(step: StepDecomposition) -> None:
        if step.step == 3:
            kept.extend(temporary.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tape(example("adamw", "missing"), 4, segment=1, seen=interrupt)
    assert len(kept) == 1
    assert not Path(kept[0]).exists()
    assert list(temporary.iterdir()) == []


def test_a_state_that_was_taken_away_is_missed():
    with Tape(example("adamw", "missing"), 4, segment=2) as tape:
        tape._path(0).unlink()
        with pytest.raises((StoreError, FileNotFoundError), match="0"):
            list(tape.backwards())
