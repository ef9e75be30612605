"""What is wrong with the first batch is said at the first batch, before hours are spent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import RecordingError

X, Y = torch.randn(8, 4), torch.randint(3, (8,))


def setting():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()


@pytest.mark.parametrize("what", ["tensor", "number", "name"])
def test_the_value_of_a_loss_is_no_loss(tmp_path, what):
    model, optimizer, loss = setting()
    value = loss(model(X), Y)
    given = {"tensor": value, "number": value.item(), "name": "cross_entropy"}[what]
    with pytest.raises(RecordingError, match="value, and no function" if what != "name" else "no function"):
        explaind.Recorder(tmp_path / "run", model, optimizer, given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["zero_grad behind backward", "no backward", "detached"])
def test_a_first_step_without_any_gradient_is_refused(tmp_path, how):
    model, optimizer, loss = setting()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        value = loss(model(X), Y)
        if how == "zero_grad behind backward":
            value.backward()
            optimizer.zero_grad()
        if how == "detached":
            (value.detach().requires_grad_() * 2).backward()
        before = model.weight.detach().clone()
        recorder.batch(X, Y, ids=range(8))
        with pytest.raises(RecordingError, match="no parameter has a gradient") as refused:
            optimizer.step()
        assert "step 1" in str(refused.value)
        assert torch.equal(model.weight, before)
        recorder.discard_batch()
        loss(model(X), Y).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    assert len(run.steps) == 1
    explaind.attribute(run, X[:2], progress=False)


def test_a_later_step_may_have_nothing_to_learn_from(tmp_path):
    model, optimizer, loss = setting()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            if recorder.steps == 0:
                loss(model(X), Y).backward()
            recorder.batch(X, Y, ids=range(8))
            optimizer.step()
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) == 2


def test_gradients_of_zero_are_gradients(tmp_path):
    model, optimizer, loss = setting()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        (loss(model(X), Y) * 0).backward()
        recorder.batch(X, Y, ids=range(8), weight=0.0)
        optimizer.step()
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) == 1


@pytest.mark.parametrize("targets", [Y, torch.randn(8, 4)])
def test_inputs_and_targets_declared_one_for_the_other(tmp_path, targets):
    torch.manual_seed(0)
    model = nn.Linear(4, 4 if targets.is_floating_point() else 3)
    loss = nn.MSELoss() if targets.is_floating_point() else nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(X), targets).backward()
        with pytest.raises(RecordingError, match="one for the other"):
            recorder.batch(targets, X, ids=range(8))
        recorder.batch(X, targets, ids=range(8))
        optimizer.step()
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) == 1


def test_an_autoencoder_and_inputs_that_the_loop_prepares_are_taken(tmp_path):
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 4), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for inputs in (X, X * 2):  # the second is declared otherwise than it was passed
            optimizer.zero_grad()
            loss(model(inputs), X).backward()
            recorder.batch(X, X, ids=range(8))
            optimizer.step()
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) == 2


@pytest.mark.parametrize("count", [1, 40])
def test_a_validation_with_gradients_before_the_training_pass(tmp_path, count):
    """The random state of a step's dropout is that of the pass over its batch, whichever passes came before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    x, others = X.double(), torch.randn(8, 4).double()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            for k in range(count):
                loss(model(others + k), Y)  # nobody wrote no_grad()
            loss(model(x), Y).backward()
            recorder.batch(x, Y, ids=range(8))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    split = explaind.attribute(run, x[:2], keep=("train", "test"), nodes=2, progress=False)
    summed = explaind.attribute(run, x[:2], keep=("test",), nodes=2, progress=False)
    assert float(abs(split.kernel.sum("train") - summed.kernel).max()) < 1e-12


class Sequence(nn.Module):
    """A recurrent layer; time comes first where ``first`` says so, for the layer or for whoever calls the model."""

    def __init__(self, kind, *, transposed, last):
        super().__init__()
        self.r = kind(4, 6) if kind is not nn.TransformerEncoderLayer else kind(4, 2, 8, dropout=0.0)
        self.head = nn.Linear(6 if kind is not nn.TransformerEncoderLayer else 4, 3)
        self.transposed, self.last = transposed, last

    def forward(self, x):
        x = x.transpose(0, 1) if self.transposed else x
        h = self.r(x)
        h = h[0] if isinstance(h, tuple) else h
        h = self.head(h)
        return h[-1] if self.last else h.transpose(0, 1) if self.transposed else h


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.TransformerEncoderLayer])
def test_time_first_inputs_of_equal_axes(tmp_path, kind, transposed, last):
    torch.manual_seed(0)
    model = Sequence(kind, transposed=transposed, last=last)
    x, y = torch.randn(6, 6, 4), torch.randint(3, (6,) if last else (6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(x), y).backward()
        if transposed:
            recorder.batch(x, y, ids=range(6))
            optimizer.step()
        else:
            with pytest.raises(RecordingError, match="second axis"):
                recorder.batch(x, y, ids=range(6))
        assert model.training
