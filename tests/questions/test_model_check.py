"""A run that is opened with other code of the same shapes is refused by the first question."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core.errors import QuestionError

X, Y = torch.randn(8, 4), torch.randint(3, (8,))


class Net(nn.Module):
    """One class of two codes; ``code`` says which."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(F.tanh(self.a(x)))


class Other(Net):
    def forward(self, x):
        return self.b(F.silu(self.a(x)))


class Same(Net):
    def forward(self, x):
        hidden = self.a(x).tanh()
        return self.b(hidden)


def sequential(middle):
    return lambda: nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 3))


#: what was recorded, what it is opened with, and what of it an error names
OTHERS = {
    "an activation": (sequential(nn.Tanh()), sequential(nn.SiLU()), r"module '1': recorded Tanh\(\), opened SiLU\(\)"),
    "a setting": (sequential(nn.GELU()), sequential(nn.GELU(approximate="tanh")), "recorded GELU"),
    "a slope": (sequential(nn.LeakyReLU(0.1)), sequential(nn.LeakyReLU(0.3)), "negative_slope=0.3"),
    "functional code": (Net, Other, "opened Other"),
}


def recorded(path, make, loss=None):
    torch.manual_seed(0)
    model = make()
    loss = nn.CrossEntropyLoss() if loss is None else loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    initial = copy.deepcopy(model)
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(X), Y).backward()
            recorder.batch(X, Y, ids=range(8))
            optimizer.step()
    return initial


@pytest.mark.parametrize("ask", [explaind.verify, explaind.attribute, explaind.similarity, explaind.plan])
@pytest.mark.parametrize("name", OTHERS)
def test_other_code_of_the_same_shapes_is_refused(tmp_path, name, ask):
    make, other, named = OTHERS[name]
    recorded(tmp_path / "run", make)
    torch.manual_seed(0)
    run = explaind.open_run(tmp_path / "run", model=other())
    options = {} if ask is explaind.plan else {"progress": False}
    with pytest.raises(QuestionError, match=named):
        ask(run, X[:2], **options)
    run.accept_model()
    if ask is not explaind.similarity:  # which splits gradients, that are others
        ask(run, X[:2], **options)


@pytest.mark.parametrize("make", [sequential(nn.Tanh()), Net])
def test_the_same_model_is_asked_nothing(tmp_path, make, monkeypatch):
    recorded(tmp_path / "run", make)
    monkeypatch.setattr("explaind_core.questions.model_check.SampleGradients", None)
    explaind.verify(explaind.open_run(tmp_path / "run", model=make()), X[:2], progress=False)


def test_other_code_of_the_same_function_is_taken(tmp_path):
    recorded(tmp_path / "run", Net)
    explaind.verify(explaind.open_run(tmp_path / "run", model=Same()), X[:2], progress=False)


def test_a_run_whose_loss_is_not_known_cannot_be_compared(tmp_path):
    recorded(tmp_path / "run", Net, lambda z, y: F.cross_entropy(z, y))
    run = explaind.open_run(tmp_path / "run", model=Same())
    with pytest.raises(QuestionError, match="another model") as refused:
        explaind.verify(run, X[:2], progress=False)
    assert "accept_model" in str(refused.value)


def test_the_code_of_a_class_that_changed_under_its_name(tmp_path, monkeypatch):
    recorded(tmp_path / "run", Net)
    monkeypatch.setattr(Net, "forward", Other.forward)
    with pytest.raises(QuestionError, match="whose code differs"):
        explaind.verify(explaind.open_run(tmp_path / "run", model=Net()), X[:2], progress=False)
