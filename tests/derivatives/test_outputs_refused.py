"""What cannot be explained, and what an error says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import Activation, Chosen, LogProbabilities, Loss, Outputs
from explaind_core.derivatives.outputs import flat_rows
from explaind_core.errors import QuestionError
from support.attribution_oracles import record
from support.explained_outputs import TARGETS, ask, check, log_loss, margin


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.pair = nn.Linear(4, 4), nn.Identity()

    def forward(self, x):
        self.pair((x, x))
        return self.layer(self.layer(x))


@pytest.fixture
def repeated(tmp_path):
    torch.manual_seed(0)
    return record(
        tmp_path / "run", Repeated().double(), lambda ps: torch.optim.SGD(ps, lr=0.1), torch.randn(8, 4).double(),
        torch.randint(4, (8,)), steps=1, loss=lambda output, target: F.cross_entropy(output, target),
    )  # fmt: skip


REFUSED = {
    "unknown module": (Activation("3"), "the model has no module '3'", "one of ['0', '1', '2']", "3"),
    "too few targets": (Loss(TARGETS[:2]), "targets and inputs do not have the same number of samples", 3, {2}),
    "targets without rows": (Loss(torch.tensor(1)), "targets and inputs do not have the same number", 3, {0}),
    "columns": (Outputs([0, 3, -4]), "output columns are out of range", "0 <= column < 3", [3, -4]),
    "columns of log probabilities": (
        LogProbabilities([3]),
        "output columns are out of range",
        "0 <= column < 3",
        [3],
    ),
    "the samples' axis": (
        LogProbabilities(axis=0),
        "the output has no such class axis",
        "an axis of (3, 3) behind the samples' own",
        0,
    ),
    "no such axis": (LogProbabilities(axis=2), "the output has no such class axis", None, 2),
    "no classes": (Chosen([0, 1, 2], of=margin), "the output has no such class axis", None, -1),
    "too few chosen": (Chosen([0, 1]), "columns and inputs do not have the same number of samples", 3, 2),
    "chosen for all at once": (Chosen(1), "columns and inputs do not have the same number of samples", 3, 0),
    "chosen out of range": (Chosen([0, 1, 3]), "a chosen column is out of range", "0 <= column < 3", 3),
    "chosen by token": (
        Chosen([[0, 1]] * 3),
        "there is not one chosen column for each place of the output",
        (3,),
        (3, 2),
    ),
    "chosen of an unknown module": (Chosen([0, 1, 2], of=Activation("3")), "the model has no module '3'", None, "3"),
    "chosen of a tuple": (
        Chosen([0, 1, 2], of=lambda call, inputs: (call(inputs),)),
        "the output is not a tensor",
        None,
        "tuple",
    ),
    "no output": (7, "output is nothing that can be explained", None, "int"),
    "a tuple": (lambda call, inputs: (call(inputs),), "the output is not a tensor", None, "tuple"),
    "a mean": (lambda call, inputs: call(inputs).mean(), "the output does not have one row per sample", "[3, ...]", ()),
    "too many rows": (
        lambda call, inputs: call(inputs).repeat(2, 1),
        "the output does not have one row per sample",
        "[3, ...]",
        (6, 3),
    ),
    "a class": (
        lambda call, inputs: call(inputs).argmax(1),
        "the output has no derivative",
        "a floating-point dtype",
        torch.int64,
    ),
    "loss of several numbers": (
        Loss(TARGETS, lambda output, _target: output),
        "the loss does not return one number per sample",
        "a 0-d tensor, or shape (3,)",
        (3, 3),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_explained_is_refused(name):
    output, what, expected, got = REFUSED[name]
    with pytest.raises(QuestionError) as error:
        ask(output)
    assert error.value.what.startswith(what)
    assert error.value.got == got
    assert expected is None or error.value.expected == expected


def test_chosen_columns_are_whole_numbers_and_not_negative():
    with pytest.raises(QuestionError, match="the chosen columns are not whole numbers") as error:
        Chosen([0.0, 1.0])
    assert (error.value.expected, error.value.got) == ("int64", torch.float32)
    with pytest.raises(QuestionError, match="the chosen columns are not whole numbers"):
        Chosen([True, False])
    with pytest.raises(QuestionError, match="a chosen column is negative") as error:
        Chosen([0, -100])  # what torch's losses ignore
    assert error.value.got == -100
    assert "padding" in error.value.remedy


def test_log_probabilities_of_whole_numbers_are_refused():
    with pytest.raises(QuestionError, match="the output has no derivative"):
        flat_rows(LogProbabilities().values(nn.Identity(), lambda x: x, torch.tensor([[1, 2]]), slice(0, 1)), 1)


def test_an_unknown_loss_is_asked_for(repeated):
    with pytest.raises(QuestionError, match="the run's loss is not known") as error:
        ask(Loss(TARGETS), of=repeated)
    assert error.value.remedy == "say Loss(targets, loss=...) or open_run(..., loss=...)"


def test_the_loss_may_be_given_when_the_run_is_opened(repeated):
    opened = explaind.open_run(repeated.path, model=Repeated().double(), loss=nn.CrossEntropyLoss())
    check(Loss(TARGETS), log_loss, of=opened)


def test_a_module_that_runs_twice_has_no_one_activation(repeated):
    with pytest.raises(QuestionError, match=r"the module 'layer' ran 2 times in one forward pass"):
        ask(Activation("layer"), of=repeated)


def test_an_activation_that_is_no_tensor_is_refused(repeated):
    with pytest.raises(QuestionError, match="the output is not a tensor"):
        ask(Activation("pair"), of=repeated)


@pytest.mark.parametrize("inputs", [torch.zeros(0, 4), (torch.zeros(2, 4), torch.zeros(3)), "text", torch.tensor(1.0)])
def test_inputs_that_are_no_batch_are_refused(inputs):
    with pytest.raises(QuestionError, match="the test inputs are not a batch"):
        ask(None, inputs=inputs)
