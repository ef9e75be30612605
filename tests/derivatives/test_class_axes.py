"""Outputs with a class axis: log-probabilities and chosen entries, by sample and by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F

from explaind_core import Activation, Chosen, LogProbabilities, Loss, Outputs
from explaind_core.run.run import Run
from explaind_core.training_step.model import run_model
from support.attribution_oracles import record
from support.attribution_oracles import rows as select
from support.explained_outputs import TARGETS, ask, check, log_loss


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


class Tokens(nn.Module):
    """Token numbers to [n, T, V], or [n, V, T]; the second argument scales."""

    def __init__(self, classes_first=False):
        super().__init__()
        self.embedding, self.head, self.classes_first = nn.Embedding(5, 4), nn.Linear(4, 5), classes_first

    def forward(self, tokens, scale):
        values = self.head(torch.tanh(self.embedding(tokens).cumsum(1))) * scale[:, None, None]
        return values.transpose(1, 2) if self.classes_first else values


def sequences(n):
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(5, (n, 3), generator=generator)
    return {"tokens": tokens, "scale": torch.rand(n, dtype=torch.float64, generator=generator) + 0.5}


@pytest.fixture(scope="module")
def token_runs(tmp_path_factory) -> dict[bool, Run]:
    """Whole numbers as inputs, named inputs, an output per token; by whether the classes come first."""
    inputs = sequences(12)

    def one(classes_first):
        torch.manual_seed(0)
        return record(
            tmp_path_factory.mktemp("tokens") / "run", Tokens(classes_first).double(),
            lambda ps: torch.optim.AdamW(ps, lr=0.1), inputs, (inputs["tokens"] + 1) % 5, steps=2,
            loss=lambda output, target: F.cross_entropy(output if classes_first else output.transpose(1, 2), target),
        )  # fmt: skip

    return {False: one(False), True: one(True)}


SEQUENCES = sequences(4)
CHOSEN = torch.tensor([[0, 1, 4], [3, 3, 0], [2, 4, 1], [1, 0, 2]])


@pytest.mark.parametrize("columns", [None, [2, 0]])
def test_log_probabilities_of_classes(columns):
    def reference(call, inputs):
        values = call(inputs)
        logs = values - values.exp().sum(1, keepdim=True).log()
        return logs if columns is None else logs[:, columns]

    check(LogProbabilities(columns), reference)


@pytest.mark.parametrize("classes_first", [False, True])
def test_log_probabilities_of_tokens(token_runs, classes_first):
    axis = 1 if classes_first else 2

    def reference(call, inputs):
        values = call(inputs)
        return values - values.exp().sum(axis, keepdim=True).log()

    recorded = token_runs[classes_first]
    result = check(LogProbabilities(axis=1 if classes_first else -1), reference, of=recorded, inputs=SEQUENCES)
    assert result.sizes["output"] == 15
    # Whichever axis comes first, the exponentials of one token sum to 1.
    sums = np.exp(result.final.values.reshape(4, *((5, 3) if classes_first else (3, 5)))).sum(axis)
    np.testing.assert_allclose(sums, 1, atol=1e-14)


def test_a_chosen_logit_per_sample():
    result = check(Chosen(TARGETS), lambda call, inputs: call(inputs)[[0, 1, 2], [2, 0, 1]])
    assert result.sizes["output"] == 1
    everything = ask(None)
    for test, column in enumerate([2, 0, 1]):
        np.testing.assert_allclose(result.kernel[:, :, test, 0], everything.kernel[:, :, test, column], atol=1e-15)


def test_a_chosen_log_probability_is_minus_the_loss():
    result = check(Chosen([2, 0, 1], of=LogProbabilities()), lambda call, inputs: -log_loss(call, inputs))
    loss = ask(Loss(TARGETS))
    for name in ("kernel", "regularization", "residual", "initial", "final"):
        np.testing.assert_allclose(result[name], -loss[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("classes_first", [False, True])
def test_a_chosen_entry_per_token(token_runs, classes_first):
    def reference(call, inputs):
        values = call(inputs)
        logs = (values.transpose(1, 2) if classes_first else values).log_softmax(-1)
        return torch.stack([torch.stack([logs[n, t, CHOSEN[n, t]] for t in range(3)]) for n in range(4)])

    of = LogProbabilities(axis=1) if classes_first else LogProbabilities()
    result = check(Chosen(CHOSEN, of=of), reference, of=token_runs[classes_first], inputs=SEQUENCES)
    assert result.sizes["output"] == 3
    raw = Chosen(CHOSEN, axis=1) if classes_first else Chosen(CHOSEN)
    values = ask(raw, of=token_runs[classes_first], inputs=SEQUENCES).final
    everything = ask(None, of=token_runs[classes_first], inputs=SEQUENCES).final.values
    everything = everything.reshape(4, 5, 3).transpose(0, 2, 1) if classes_first else everything.reshape(4, 3, 5)
    np.testing.assert_allclose(values, np.take_along_axis(everything, CHOSEN.numpy()[..., None], 2)[..., 0], atol=1e-15)


def test_anything_with_a_class_axis_can_be_chosen_from():
    check(Chosen(TARGETS, of=Activation("1")), lambda call, inputs: call.model[:2](inputs)[range(3), TARGETS])
    check(Chosen(TARGETS, of=lambda call, inputs: call(inputs) ** 2), lambda c, x: c(x)[range(3), TARGETS] ** 2)


OF_TOKENS = {
    "log probabilities": LogProbabilities(),
    "columns": LogProbabilities([1, 0]),
    "chosen": Chosen(CHOSEN),
    "chosen log probabilities": Chosen(CHOSEN, of=LogProbabilities()),
    "chosen activations": Chosen(CHOSEN, of=Activation("head")),
}


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=6), name=st.sampled_from([*OF_TOKENS]))
def test_any_rows_in_one_piece_and_one_by_one(rows, name):
    """Test samples are asked for as slices, as row numbers, and one by one under vmap, in both modes."""
    torch.manual_seed(0)
    model = Tokens().double()
    theta = {n: p.detach() for n, p in model.named_parameters()}
    tangent = {n: torch.randn_like(p) for n, p in theta.items()}
    output = OF_TOKENS[name]
    output.check(model, 4)

    def values(theta, rows):
        def call(inputs):
            return run_model(lambda *a, **k: functional_call(model, theta, a, k), inputs)

        return output.values(model, call, select(SEQUENCES, rows), rows).flatten(1)

    whole, chosen = values(theta, slice(0, 4)), torch.tensor(rows)
    torch.testing.assert_close(values(theta, slice(1, 3)), whole[1:3], rtol=0, atol=1e-14)
    torch.testing.assert_close(values(theta, chosen), whole[chosen], rtol=0, atol=1e-14)
    alone = vmap(lambda row: values(theta, row[None])[0])(chosen)
    torch.testing.assert_close(alone, whole[chosen], rtol=0, atol=1e-14)
    along = jvp(lambda p: values(p, slice(0, 4)), (theta,), (tangent,))[1][chosen]
    by_sample = vmap(lambda row: jvp(lambda p: values(p, row[None])[0], (theta,), (tangent,))[1])(chosen)
    torch.testing.assert_close(by_sample, along, rtol=0, atol=1e-13)
    jacobians = vmap(lambda row: jacrev(lambda p: values(p, row[None])[0])(theta))(chosen)
    contracted = sum((jacobians[n] * tangent[n]).flatten(2).sum(2) for n in theta)
    torch.testing.assert_close(contracted, along, rtol=0, atol=1e-13)
