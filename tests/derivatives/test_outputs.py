"""What can be explained: outputs, losses, activations, any callable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import Activation, Chosen, Function, Loss, Outputs
from support.attribution_oracles import record
from support.explained_outputs import TARGETS, ask, check, log_loss, margin, run


@pytest.mark.parametrize("columns", [[0], [2, 0], [-1]])
def test_columns_select_outputs(columns):
    check(Outputs(columns), lambda call, inputs: call(inputs)[:, columns])


def test_no_output_is_all_outputs():
    assert ask(None).identical(ask(Outputs()))


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


@pytest.mark.parametrize("output", [Loss(TARGETS), Chosen(TARGETS)], ids=["loss", "chosen"])
def test_targets_are_cut_into_the_inputs_chunks(output, monkeypatch):
    from functools import partial

    from explaind_core.questions.question import Question

    whole = ask(output)
    monkeypatch.setattr(Question, "ask", partial(Question.ask, chunk=2))
    # Chunks of other sizes round differently.
    np.testing.assert_allclose(ask(output).kernel, whole.kernel, rtol=0, atol=1e-14)


def test_an_activation_is_explained_through_the_layers_below_it():
    result = check(Activation("1"), lambda call, inputs: call.model[:2](inputs))
    assert not result.kernel.sel(layer="2").any()


def test_no_hook_is_left_behind():
    ask(Activation("1"))
    assert run().model is not None
    assert not any(m._forward_hooks for m in run().model.modules())


@pytest.mark.parametrize("output", [margin, Function(margin)], ids=["callable", "Function"])
def test_any_function_of_the_outputs(output):
    result = check(output, margin)
    assert result.sizes["output"] == 1


def test_a_subclass_may_see_the_model_and_the_rows():
    class Own(explaind.Output):
        def values(self, model, call, inputs, rows):
            return call(inputs) * torch.arange(rows.start, rows.stop)[:, None]

    check(Own(), lambda call, inputs: call(inputs) * torch.arange(3)[:, None])
