"""What a run says of itself, and how large it will be."""

from __future__ import annotations

import platform
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.testing import record_example
from explaind_core.training_step.environment import git_commit


def train(path, *, steps=6, seed=0, order=None, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, targets = torch.randn(32, 8), torch.randn(32, 3)
    with explaind.Recorder(path, model, optimizer, nn.MSELoss(), snapshot_every=2, **options) as recorder:
        before = recorder.bytes_per_step
        for s in order or range(steps):
            ids = torch.arange(4 * s, 4 * s + 4)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            optimizer.step()
        recorder.flush()
        after = recorder.bytes_per_step
    return model, optimizer, (inputs[:4], targets[:4]), before, after


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
def test_a_run_is_no_larger_than_was_said(tmp_path, mode):
    model, optimizer, batch, before, after = train(tmp_path / "run", mode=mode, compression=None)
    said = explaind.store_size(model, optimizer, 6, mode=mode, snapshot_every=2, batch=batch)
    run = explaind.open_run(tmp_path / "run", model=model)
    files = [run.store.step_path(s).stat().st_size for s in run.steps]
    assert max(files) <= said.per_step == before
    assert after == pytest.approx(np.mean(files))
    assert run.store.start_path.stat().st_size <= said.fixed
    assert max(p.stat().st_size for p in (run.path / "snapshots").iterdir()) <= said.snapshot
    assert run.bytes <= said.total == pytest.approx(run.bytes, abs=32000 * 16)
    assert str(said).startswith("at most ")


def test_compression_makes_a_run_smaller(tmp_path):
    sizes = [train(tmp_path / str(c), compression=c)[-1] for c in ("blosc", None)]
    assert sizes[0] < sizes[1]


def test_a_run_that_cannot_fit_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 10**6))
    with pytest.raises(errors.StoreError, match=r"may not fit on the disk[\s\S]*1000 steps[\s\S]*1 MB free"):
        train(tmp_path / "run", expected_steps=1000)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", expected_steps=6)


def test_what_a_run_says_of_itself(tmp_path):
    train(tmp_path / "run", seed=17)
    found = explaind.open_run(tmp_path / "run").description
    assert found.format == 2
    assert found.optimizers[0][0] == "torch.optim.adamw.AdamW"
    assert found.optimizers[0][1][0]["betas"] == (0.9, 0.999)
    assert found.provenance["seed"] == 17
    assert found.provenance["threads"] == torch.get_num_threads()
    assert found.provenance["libraries"]["torch"] == torch.__version__
    assert found.provenance["libraries"]["python"] == platform.python_version()
    assert (found.steps, found.complete, found.parameters) == (6, True, 8 * 40 + 40 + 80 + 120 + 3)
    assert "git_commit" in str(found)


def test_the_fingerprint_of_the_data_tells_batches_and_their_order(tmp_path):
    orders = {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 2, 1], "d": [0, 1]}
    for name, order in orders.items():
        train(tmp_path / name, order=order)
    data = {name: explaind.open_run(tmp_path / name).description.data for name in orders}
    assert data["a"] == data["b"]
    assert len(set(data.values())) == 3
    assert explaind.open_run(tmp_path / "a", until=2).description.data == data["d"]


def test_several_optimizers_each_say_their_own(tmp_path):
    model = nn.Linear(3, 2)
    optimizers = [torch.optim.SGD([model.weight], lr=0.5), torch.optim.AdamW([model.bias], lr=0.1)]
    with explaind.Recorder(tmp_path / "run", model, optimizers, nn.MSELoss()) as recorder:
        model(torch.ones(4, 3)).sum().backward()
        recorder.batch(torch.ones(4, 3), None, ids=range(4))
        for optimizer in optimizers:
            optimizer.step()
    found = explaind.open_run(tmp_path / "run").description.optimizers
    assert [(name.rpartition(".")[2], groups[0]["lr"]) for name, groups in found] == [("SGD", 0.5), ("AdamW", 0.1)]


def test_the_commit_is_read_from_gits_own_files(tmp_path):
    def git(*arguments, folder=tmp_path / "repo"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        made = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True)
        return made.stdout.strip()

    (tmp_path / "repo" / "inner").mkdir(parents=True)
    git("init", "-q")
    assert git_commit(tmp_path / "repo") is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert git_commit(tmp_path / "repo" / "inner") == head
    git("pack-refs", "--all")
    assert git_commit(tmp_path / "repo") == head
    git("worktree", "add", "-q", tmp_path / "tree", "-b", "other")
    assert git_commit(tmp_path / "tree") == head
    git("checkout", "-q", "--detach")
    assert git_commit(tmp_path / "repo") == head


def test_a_run_of_version_1_says_what_it_can(tmp_path):
    from support.old_versions import DATA

    found = explaind.open_run(DATA / "version1").description
    assert (found.format, found.run, found.data, found.provenance) == (1, None, None, None)
    assert str(found)


def test_nothing_of_a_run_without_steps_is_missing(tmp_path):
    train(tmp_path / "run", steps=0)
    assert explaind.open_run(tmp_path / "run").description.optimizers == (("torch.optim.adamw.AdamW", None),)
    assert record_example(steps=1).description.steps == 1
