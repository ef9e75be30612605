"""What the trained model returned is kept, and compared with what the model returns that a run is opened with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.naming import plain
from explaind_core.training_step import differ_beyond_rounding, output_entries

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
MODES = ["steps", "parameters", "snapshots"]


def helper(x):
    return x.tanh()


class Net(nn.Module):
    """Its ``forward`` calls a function, reads an attribute, and takes an argument that is no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.temperature = nn.Linear(4, 8), nn.Linear(8, 3), 1.0

    def forward(self, x, scale=1.0):
        return self.b(helper(self.a(x))) * (scale / self.temperature)


def record(path, model, *, steps=5, call=None, anneal=False, mode="steps", before=False, declared=None, micro=1,
           loss=None):  # fmt: skip
    call = call or (lambda x: model(x))
    initial, loss = copy.deepcopy(plain(model)), loss or nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with explaind.Recorder(path, model, optimizer, loss, mode=mode, snapshot_every=4) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            if anneal:
                model.temperature *= 0.9
            for ids in torch.arange(12).chunk(micro):
                x = X[ids]
                told = {"inputs": x if declared is None else declared(x), "targets": Y[ids], "ids": ids}
                if before:
                    recorder.batch(**told, weight=1 / micro)
                (loss(call(x), Y[ids]) / micro).backward()
                if not before:
                    recorder.batch(**told, weight=1 / micro)
            optimizer.step()
    return initial


def ask(path, model):
    run = explaind.open_run(path, model=model, loss=nn.CrossEntropyLoss())
    return explaind.verify(run, X[:2], progress=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro", [1, 3])
def test_a_function_that_forward_calls(tmp_path, monkeypatch, mode, micro):
    initial = record(tmp_path / "run", Net(), mode=mode, micro=micro)
    ask(tmp_path / "run", initial)
    monkeypatch.setitem(globals(), "helper", torch.nn.functional.silu)
    with pytest.raises(QuestionError, match="other outputs") as refused:
        ask(tmp_path / "run", initial)
    assert "step 1:" in str(refused.value)
    run = explaind.open_run(tmp_path / "run", model=initial)
    run.accept_model()
    if mode == "steps":
        explaind.verify(run, X[:2], progress=False)


def test_an_attribute_that_training_changed(tmp_path):
    model = Net()
    model.temperature = 1 / 0.9
    initial = record(tmp_path / "run", model, anneal=True)  # 1 at step 1
    initial.temperature = 1.0
    with pytest.raises(QuestionError, match="the same outputs at step 1") as refused:
        ask(tmp_path / "run", initial)
    assert "make it a buffer" in str(refused.value)


def test_an_argument_that_was_passed_and_not_declared(tmp_path):
    model = Net()
    initial = record(tmp_path / "run", model, call=lambda x: model(x, scale=0.5))
    with pytest.raises(QuestionError, match="declare all of them"):
        ask(tmp_path / "run", initial)
    model = copy.deepcopy(initial)
    record(tmp_path / "told", model, call=lambda x: model(x, scale=0.5), declared=lambda x: {"x": x, "scale": 0.5})
    run = explaind.open_run(tmp_path / "told", model=initial)
    explaind.verify(run, {"x": X[:2], "scale": 0.5}, progress=False)


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 102926336])
def test_entries_reach_from_the_first_to_the_last(size):
    large = torch.arange(min(size, 100), dtype=torch.float64)
    large = large if size <= 100 else torch.full((1,), 3.0).expand(size)
    found = output_entries(large)["output"]
    assert len(found) == min(size, 64)
    assert size > 100 or size == 0 or (found[0], found[-1]) == (0, size - 1)


@pytest.mark.parametrize("off", [0.0, 0.5, 2.0])
def test_rounding_is_no_other_function(off):
    entries, unit = torch.randn(64, dtype=torch.float64), 2.0**-23
    kept, now = {"a": torch.ones(2), "b": entries}, {"a": torch.ones(2), "b": entries * (1 + off * 1024 * unit)}
    assert (differ_beyond_rounding(kept, now, unit) > 0) == (off > 1)


@pytest.mark.parametrize(
    "now", [torch.ones(3), torch.tensor([1.0, float("nan"), 1, 1]), torch.tensor([1.0, 1, 1, float("-inf")])]
)
def test_another_shape_or_another_infinity_differs(now):
    assert differ_beyond_rounding({"output": torch.ones(4)}, {"output": now}, 1e-7) == float("inf")


def test_the_same_infinities_are_the_same():
    masked = torch.tensor([1.0, float("-inf"), 2.0])
    assert differ_beyond_rounding({"a": masked}, {"a": masked.clone()}, 1e-7) == 0.0


def test_what_only_one_returns_says_nothing():
    logits, loss = torch.ones(3), torch.tensor(0.1)
    told = output_entries({"loss": loss, "logits": logits})
    assert differ_beyond_rounding(told, output_entries({"logits": logits}), 1e-7) == 0.0
    assert differ_beyond_rounding(told, output_entries({"logits": 2 * logits}), 1e-7) == 1.0
    assert differ_beyond_rounding(output_entries((loss, logits)), output_entries((logits,)), 1e-7) == 0.0


class Noisy(nn.Module):
    """Dropout, running statistics, and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return {"logits": self.body(x)}


def first_logit(call, x):
    return call(x)["logits"][..., 0]


def logits_loss(z, y):
    return nn.functional.cross_entropy(z["logits"], y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_draws_random_numbers_and_moves_buffers_is_taken(tmp_path, mode, before, compiled):
    torch.manual_seed(0)
    model = Noisy()
    initial = copy.deepcopy(model)
    called = torch.compile(model, backend="eager") if compiled else model
    record(tmp_path / "run", called, mode=mode, before=before, loss=logits_loss)
    run = explaind.open_run(tmp_path / "run", model=initial, loss=logits_loss)
    explaind.attribute(run, X[:2], keep=("test",), output=first_logit, progress=False)
    kept = run.batch(1).micro[0].forward.outputs
    assert before or {name: len(entries) for name, entries in kept.items()} == {"logits": 36}


def test_outputs_are_kept_at_the_start_behind_snapshots_and_between(tmp_path):
    initial = record(tmp_path / "run", Net(), steps=11)
    run = explaind.open_run(tmp_path / "run", model=initial)
    kept = [s for s in run.steps if run.batch(s).micro[0].forward.outputs]
    assert kept == [1, 2, 4, 5, 8, 9]


def test_an_evaluation_behind_the_pass_is_not_what_was_trained(tmp_path):
    model = Noisy()
    initial = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with explaind.Recorder(tmp_path / "run", model, optimizer, logits_loss) as recorder:
        for _ in range(3):
            model.eval()(X[:5])
            value = logits_loss(model.train()(X), Y)
            model.eval()(X[5:])
            with torch.no_grad():
                model(X)
            value.backward()
            recorder.batch(X, Y, ids=range(12))
            optimizer.step()
            optimizer.zero_grad()
    run = explaind.open_run(tmp_path / "run", model=initial, loss=logits_loss)
    explaind.attribute(run, X[:2], keep=("test",), output=first_logit, progress=False)
