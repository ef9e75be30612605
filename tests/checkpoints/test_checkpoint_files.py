"""Where checkpoints and their buffers are taken from: folders, paths, state dicts; at most two are held at a time."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from explaind_core.checkpoints import state_dicts as statedicts
from explaind_core.errors import StoreError
from support.checkpoint_points import INPUTS, ask, closure_error, save, states


@pytest.mark.parametrize("name", ["step-{}.safetensors", "7b-{}-of3.safetensors", "{:06d}.safetensors"])
def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path, name):
    result = ask(save(tmp_path, name=name), nodes=2)
    assert result.identical(ask(labels=[2, 9, 10, 100], nodes=2))
    assert result.identical(ask(str(tmp_path), nodes=2))


def test_other_files_beside_them_do_not_matter(tmp_path):
    (save(tmp_path) / "config.json").write_text("{}")
    assert ask(tmp_path, nodes=1).step.values.tolist() == [9, 10, 100]
    assert ask(tmp_path, nodes=1, labels="abcd").step.values.tolist() == ["b", "c", "d"]


def test_paths_are_taken_in_the_order_given(tmp_path):
    paths = [save(tmp_path) / f"step-{s}.safetensors" for s in (2, 9, 10, 100)]
    assert ask(paths, nodes=2).identical(ask(nodes=2))
    assert ask([str(path) for path in paths[::-1]], nodes=2).identical(ask(states()[::-1], nodes=2))


def test_at_most_two_checkpoints_are_held_at_a_time(tmp_path, monkeypatch):
    read, alive = statedicts.read_checkpoint, []

    def watched(source, label):
        state = {n: t.clone() for n, t in read(source, label).items()}  # not a view of a file that is mapped
        gc.collect()
        held = sum(any(ref() is not None for ref in refs) for refs in alive)
        assert held < 2, "a third checkpoint is read while two are held"
        alive.append([weakref.ref(t) for t in state.values()])
        return state

    monkeypatch.setattr(statedicts, "read_checkpoint", watched)
    reference = ask(nodes=1)
    count = len(alive)
    assert ask(save(tmp_path), labels=range(4), nodes=1).identical(reference)
    assert len(alive) == 2 * count >= 16


class Buffered(nn.Module):
    """Running statistics, a buffer that is not stored, and tied weights."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((4,), 3.0), persistent=False)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


@pytest.fixture
def buffered():
    torch.manual_seed(0)
    model = Buffered().double()
    found = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.train()(torch.randn(8, 4, dtype=torch.float64))
        found.append(copy.deepcopy(model.state_dict()))
    return model.eval(), found


def test_buffers_are_those_of_the_last_checkpoint(buffered, tmp_path):
    model, found = buffered
    result = ask(found, model=Buffered().double(), nodes=3)
    np.testing.assert_allclose(result.final, model(INPUTS).detach(), atol=1e-15)
    model.load_state_dict(found[0] | {n: t for n, t in found[-1].items() if "running" in n})
    np.testing.assert_allclose(result.initial, model(INPUTS).detach(), atol=1e-15)
    assert closure_error(result) <= 1e-13
    # A tied parameter counts once, under its first name; safetensors files hold it once, too.
    assert result.layer.values.tolist() == ["first", "norm", "second"]
    untied = [{n: t for n, t in state.items() if n != "second.weight"} for state in found]
    assert ask(save(tmp_path, untied, numbers=(0, 1, 2)), model=Buffered().double(), nodes=3).identical(result)


def test_buffers_may_be_given(buffered):
    model, found = buffered
    statistics = {n: torch.rand_like(t) + 0.5 for n, t in found[0].items() if "running" in n}
    result = ask(found, model=Buffered().double(), nodes=1, buffers=statistics)
    model.load_state_dict(found[-1] | statistics)
    np.testing.assert_allclose(result.final, model(INPUTS).detach(), atol=1e-15)
    bare = [{n: t for n, t in state.items() if "running" not in n and "tracked" not in n} for state in found]
    with pytest.raises(StoreError, match="the last checkpoint does not hold a buffer of the model") as error:
        ask(bare, model=Buffered().double(), buffers=statistics)
    assert error.value.where == "checkpoint 2, buffer 'norm.num_batches_tracked'"
    count = {"norm.num_batches_tracked": torch.tensor(1)}
    assert ask(bare, model=Buffered().double(), nodes=1, buffers=statistics | count).equals(result)
