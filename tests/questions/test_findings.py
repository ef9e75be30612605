"""What is found on the way to an answer: joined, said by results, and kept nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import xarray as xr
from torch import nn

import explaind_core as explaind
from explaind_core.attribution.attribute import answer
from explaind_core.derivatives import SampleGradients
from explaind_core.questions.findings import Findings
from explaind_core.questions.question import Question
from explaind_core.results import result_writer as appending
from explaind_core.strategies import shares

FOUND = Findings("before step 3", (0.5, 1.0), 3, True, 0.25)


def test_nothing_found_is_nothing_said():
    assert Findings().attributes() == {}
    assert (Findings() | Findings()) == Findings()
    assert (FOUND | Findings()) == (Findings() | FOUND) == FOUND


def test_findings_are_joined():
    later = Findings("before step 5", (0.7, 2.0), 4, False, 0.125)
    assert FOUND | later == Findings("before step 5", (0.5, 2.0), 7, True, 0.25)
    assert later | FOUND == Findings("before step 3", (0.5, 2.0), 7, True, 0.25)


def test_what_was_looked_for_and_is_zero_is_said():
    assert Findings(entries_clipped=0, unattributed_gradient=0.0).attributes() == {
        "entries_clipped": 0, "unattributed_gradient": 0.0,
    }  # fmt: skip


def test_findings_are_read_back_from_attributes():
    assert Findings.of(FOUND.attributes() | {"optimizer": "SGD"}) == FOUND
    assert Findings.of({"optimizer": "SGD"}) == Findings()


# ------------------------------------------------------------------ a walk
INPUTS = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KEEP = ("step", "train", "test")


@pytest.fixture(params=[True, False], ids=["trained in training mode", "trained in evaluation mode"])
def run(request, tmp_path):
    """Batch normalisation, and entries that are clipped one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().train(request.param)
    model(torch.randn(6, 3).double())
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(24, 3).double(), torch.randint(2, (24,))
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(5):
            ids = torch.randperm(24)[:6]
            optimizer.zero_grad()
            loss(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            recorder.clip_grad_value_(0.05)
            optimizer.step()
    return explaind.open_run(tmp_path / "run", model=model)


@pytest.mark.parametrize("strategy", ["features", "adjoint"])
def test_results_say_it_in_memory_on_disk_and_taken_up(run, strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(appending, "BLOCK", 2)
    options = {"keep": KEEP, "nodes": 1, "progress": False, "strategy": strategy, "unattributed": "carry"}
    memory = explaind.attribute(run, INPUTS, **options)
    clipped = memory.attrs["entries_clipped"]
    assert clipped > 0
    assert memory.attrs["unattributed_gradient"] < 1e-12
    assert memory.attrs["gradient_factor"] == pytest.approx([1, 1])
    stored = explaind.attribute(run, INPUTS, out=tmp_path / "result.zarr", **options).load()
    if strategy == "features":  # block by block: it says what the first one said
        assert 0 < stored.attrs.pop("entries_clipped") < memory.attrs.pop("entries_clipped")
        assert stored.attrs.pop("unattributed_gradient") <= memory.attrs.pop("unattributed_gradient")
    xr.testing.assert_identical(stored, memory)


def test_a_question_that_is_asked_twice_says_the_same_twice(run):
    """Nothing of the first answer is left in it."""
    question = Question.ask(run, INPUTS, keep=KEEP, nodes=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.keep = ()
    once, again = answer(question, progress=False), answer(question, progress=False)
    assert once.attrs["entries_clipped"] > 0
    xr.testing.assert_identical(once, again)


@pytest.mark.parametrize("strategy", ["features", "adjoint"])
def test_the_mode_that_gives_the_recorded_gradients_is_looked_for_once_a_walk(run, strategy, monkeypatch):
    """Not at every step, nor for every block of test samples; and the run itself stays as it is."""
    made = []

    class Spy(SampleGradients):
        def __init__(self, model, *arguments, **options):
            made.append(model.training)
            super().__init__(model, *arguments, **options)

    monkeypatch.setattr(shares, "SampleGradients", Spy)
    monkeypatch.setattr(type(run), "batch", _forgetful(type(run).batch))
    before = {name: value for name, value in vars(run).items() if isinstance(value, bool)}
    before["outputs_accepted"] = True  # of the model, and of no question: compared once a run
    for _ in range(2):
        made.clear()
        options = {"keep": ("train", "test"), "memory": 6000, "nodes": 1, "strategy": strategy, "progress": False}
        if strategy == "features":
            options.pop("memory")
        found = explaind.attribute(run, INPUTS, **options)
        right = made[-1]
        passes = explaind.plan(run, INPUTS, **{k: v for k, v in options.items() if k != "progress"}).passes
        assert explaind.closure_error(found) < 1e-12
        assert passes == (3 if strategy == "adjoint" else 1)
        assert made[: 5 * passes + (not right)] == [True] * (not right) + [right] * (5 * passes)
    assert before == {name: value for name, value in vars(run).items() if isinstance(value, bool)}


def _forgetful(batch):
    """Batches of which it was not recorded in which mode the model was."""

    def read(self, step):
        found = batch(self, step)
        return dataclasses.replace(found, micro=[dataclasses.replace(m, forward=None) for m in found.micro])

    return read
