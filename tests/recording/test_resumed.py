"""Resumed equals uninterrupted: in everything that a run says of itself, file by file and bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.run.run import Run
from support.mode_loops import MODES
from support.mode_trainings import cnn

N = 12
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
LOSS = nn.CrossEntropyLoss()
#: Of a run, and not of its training.
OF_THE_RECORDING = {"run", "provenance"}


def begin():
    torch.manual_seed(0)
    model = cnn()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def go_on(recorder, model, optimizer, numbers, *, frozen_from):
    """Ragged batches, a schedule, clipping and a log; statistics that stand still from some step on."""
    for s in numbers:
        torch.manual_seed(100 + s)
        model.train(s < frozen_from)
        ids = torch.randint(N, (4 + s % 2,))
        optimizer.param_groups[0]["lr"] = 0.01 / s
        optimizer.zero_grad()
        LOSS(model(X[ids]), Y[ids]).backward()
        recorder.batch(X[ids], Y[ids], ids=ids)
        recorder.clip_grad_norm_(0.5)
        recorder.log(rate=0.01 / s)
        optimizer.step()


def interrupted(path, mode, stops, last, frozen_from):
    """Recorded up to each of the steps ``stops``, resumed there, and again up to ``last``."""
    done = 0
    for stop in (*stops, last):
        model, optimizer = begin()
        if done:
            explaind.open_run(path, model=begin()[0], loss=LOSS).restore(model, optimizer)
        options = {"mode": mode, "snapshot_every": 3, "resume": bool(done)}
        with explaind.Recorder(path, model, optimizer, LOSS, **options) as recorder:
            go_on(recorder, model, optimizer, range(done + 1, stop + 1), frozen_from=frozen_from)
        done = stop
    return explaind.open_run(path, model=begin()[0], loss=LOSS)


def assert_same_file(one: Run, other: Run, path_of) -> None:
    found, expected = (run.store.read_tensors(path_of(run.store), what="it") for run in (one, other))
    strip = {"manifest", "generations"}  # where it was gone on with is what tells them apart
    headers = [{k: v for k, v in file.header.items() if k not in strip} for file in (found, expected)]
    assert json.dumps(headers[0], sort_keys=True) == json.dumps(headers[1], sort_keys=True)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize("mode", ["steps", *MODES])
@pytest.mark.parametrize("stops", [(4,), (2, 3, 6)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, mode, stops):
    """The statistics of the normalisation moved before a stop and stand still behind it: later steps know them."""
    last, frozen_from = 7, 4
    whole = interrupted(tmp_path / "whole", mode, (), last, frozen_from)
    parts = interrupted(tmp_path / "parts", mode, stops, last, frozen_from)
    manifests = [{k: v for k, v in run.manifest.items() if k not in OF_THE_RECORDING} for run in (parts, whole)]
    assert manifests[0] == manifests[1]
    assert_same_file(parts, whole, lambda store: store.start_path)
    for s in whole.steps:
        assert_same_file(parts, whole, lambda store, s=s: store.step_path(s))
    assert parts.store.found_steps() == whole.store.found_steps()
    assert {*parts.store.found_snapshots()} == {*whole.store.found_snapshots(), *stops}  # where it was resumed as well
    for s in whole.store.found_snapshots():
        assert_same_file(parts, whole, lambda store, s=s: store.snapshot_path(s))
    assert [p.name for p in parts.store.found_batches()] == [p.name for p in whole.store.found_batches()]
    assert parts.metrics.identical(whole.metrics)
    assert parts.complete
    for s in whole.steps:
        for what in ("theta", "buffers", "gradients"):
            found, expected = getattr(parts, what)(s), getattr(whole, what)(s)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], expected[n]) for n in expected), (what, s)
