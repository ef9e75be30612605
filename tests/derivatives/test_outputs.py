"""What can be explained: outputs, losses, activations, any callable; and what is refused."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import Activation, Chosen, Function, LogProbabilities, Loss, Outputs
from explaind_core.derivatives.outputs import flat_rows
from explaind_core.errors import QuestionError
from explaind_core.run.run import Run
from explaind_core.testing import record_example
from explaind_core.training_step.model import run_model
from support.attribution_oracles import assert_equal, dense, modules, record
from support.attribution_oracles import rows as select

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
