"""What can be explained: outputs, losses, activations, any callable; and what is refused."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from attribution_oracles import assert_equal, dense, modules, record
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import Activation, Function, Loss, Outputs
from explaind_core.errors import QuestionError
from explaind_core.run import Run
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([2, 0, 1])
EVERYTHING = ("step", "layer", "test", "output")


@lru_cache
def run() -> Run:
    return record_example(3)


def ask(output, *, of: Run | None = None, inputs=INPUTS, **question):
    return explaind.attribute(of or run(), inputs, output=output, **({"nodes": 2, "progress": False} | question))


def check(output, reference, *, of: Run | None = None, inputs=INPUTS):
    """``output`` against the oracle of ``reference(call, inputs)``."""
    truth = dense(of or run(), inputs, 2, reference)
    result = ask(output, of=of, inputs=inputs)
    assert_equal(result, truth.expected(EVERYTHING, modules(truth), (of or run()).steps))
    return result


@pytest.mark.parametrize("columns", [[0], [2, 0], [-1]])
def test_columns_select_outputs(columns):
    check(Outputs(columns), lambda call, inputs: call(inputs)[:, columns])


def test_no_output_is_all_outputs():
    assert ask(None).identical(ask(Outputs()))


def test_outputs_of_several_axes_are_flattened(tmp_path):
    """A sequence model returns [n, tokens, classes]; J = tokens x classes."""
    torch.manual_seed(0)
    sequences, targets = torch.randn(12, 2, 4, dtype=torch.float64), torch.randint(3, (12, 2))
    recorded = record(
        tmp_path / "run", nn.Linear(4, 3).double(), lambda ps: torch.optim.AdamW(ps, lr=0.1), sequences, targets,
        loss=lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()), steps=2,
    )  # fmt: skip
    result = check(None, None, of=recorded, inputs=sequences[:3])
    assert result.sizes["output"] == 6
    check(Outputs([4]), lambda call, inputs: call(inputs)[:, 1, 1], of=recorded, inputs=sequences[:3])


def log_loss(call, inputs):
    return -call(inputs).log_softmax(1)[range(3), TARGETS]


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda output, target: F.nll_loss(output.log_softmax(1), target),
        lambda output, target: F.cross_entropy(output, target, reduction="none").unsqueeze(1),
    ],
    ids=["per sample", "mean", "sum", "function", "column"],
)
def test_a_loss_is_explained_sample_by_sample(loss):
    result = check(Loss(TARGETS, loss), log_loss)
    assert result.sizes["output"] == 1


def test_the_runs_own_loss_comes_from_the_store():
    assert run().manifest["loss"]["name"] == "torch.nn.modules.loss.CrossEntropyLoss"
    check(Loss(TARGETS), log_loss)


def test_the_settings_of_the_runs_own_loss_are_kept(tmp_path):
    torch.manual_seed(0)
    recorded = record(
        tmp_path / "run", nn.Linear(4, 3).double(), lambda ps: torch.optim.SGD(ps, lr=0.1), torch.randn(12, 4).double(),
        torch.randint(3, (12,)), loss=nn.CrossEntropyLoss(label_smoothing=0.3), steps=2,
    )  # fmt: skip

    def smoothed(call, inputs):
        logs = call(inputs).log_softmax(1)
        return -0.7 * logs[range(3), TARGETS] - 0.3 * logs.mean(1)

    check(Loss(TARGETS), smoothed, of=recorded)


def test_a_loss_rows_its_targets_with_the_inputs_chunks(monkeypatch):
    from functools import partial

    from explaind_core.plan import Question

    whole = ask(Loss(TARGETS))
    monkeypatch.setattr(Question, "ask", partial(Question.ask, chunk=2))
    # Chunks of other sizes round differently.
    np.testing.assert_allclose(ask(Loss(TARGETS)).kernel, whole.kernel, rtol=0, atol=1e-14)


def test_an_activation_is_explained_through_the_layers_below_it():
    result = check(Activation("1"), lambda call, inputs: call.model[:2](inputs))
    assert not result.kernel.sel(layer="2").any()


def test_no_hook_is_left_behind():
    ask(Activation("1"))
    assert run().model is not None
    assert not any(m._forward_hooks for m in run().model.modules())


def margin(call, inputs):
    values = call(inputs)
    return values[:, 0] - values[:, 1:].logsumexp(1)


@pytest.mark.parametrize("output", [margin, Function(margin)], ids=["callable", "Function"])
def test_any_function_of_the_outputs(output):
    result = check(output, margin)
    assert result.sizes["output"] == 1


def test_a_subclass_may_see_the_model_and_the_rows():
    class Own(explaind.Output):
        def values(self, model, call, inputs, rows):
            return call(inputs) * torch.arange(rows.start, rows.stop)[:, None]

    check(Own(), lambda call, inputs: call(inputs) * torch.arange(3)[:, None])


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
