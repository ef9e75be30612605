"""Modes that store less: what is kept on disk, and how long."""

from __future__ import annotations

import gc
import json
import os

from torch import nn

from explaind_core.run.recompute import Recomputation
from support.mode_loops import MODES, reading, recorded
from support.mode_trainings import Training


def stretches(folder):
    return [p for p in folder.iterdir() if p.name.startswith("explaind-steps-")]


def test_at_most_two_stretches_are_kept_and_each_walk_computes_each_once(tmp_path, monkeypatch):
    path = recorded(tmp_path / "run", "snapshots", count=9)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    computed = []
    original = Recomputation._run_again
    monkeypatch.setattr(
        Recomputation, "_run_again", lambda self, start: computed.append(start) or original(self, start)
    )
    run = reading(path)
    for s in [*run.steps, *reversed(run.steps)]:
        run.theta(s)
        run.gradients(s)
        assert len(stretches(tmp_path / "temporary")) <= 2
    assert computed == [0, 3, 6, 0]
    run.close()
    assert not stretches(tmp_path / "temporary")
    run.gradients(2)
    assert stretches(tmp_path / "temporary")
    del run
    gc.collect()
    assert not stretches(tmp_path / "temporary")


def test_only_snapshots_hold_parameters(tmp_path):
    training = Training(model=lambda: nn.Sequential(nn.Linear(5, 400), nn.GELU(), nn.Linear(400, 3)))
    sizes = {}
    for mode in ("steps", *MODES):
        path = recorded(tmp_path / mode, mode, training, count=7)
        sizes[mode] = sum(os.path.getsize(p) for p in path.glob("steps/*/*")) / 7 / (4 * 3603)
    assert 1.9 < sizes["steps"] < 2.6
    assert 0.9 < sizes["parameters"] < 1.5
    assert sizes["snapshots"] < 0.3
    assert json.loads((path / "manifest.json").read_text())["mode"] == "snapshots"
