"""Losses of single samples: of outputs in tuples and dicts, where vmap cannot, and what has no derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import errors
from explaind_core.training_step import SampleLosses

_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(8, 4, generator=_GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (8,), generator=_GENERATOR)
SEQUENCES = torch.randn(8, 5, 4, generator=_GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(3, (8, 5), generator=_GENERATOR)
TOKENS[:, 3:] = -100
TOKENS[1, 1] = -100
WEIGHT = torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64)


# ------------------------------------------------------------------ models that return more than a tensor
class Pair(NamedTuple):
    logits: torch.Tensor
    value: torch.Tensor


class Two(nn.Module):
    def __init__(self, kind: Any = tuple) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 3), nn.Linear(4, 1), kind

    def forward(self, x: torch.Tensor) -> Any:
        logits, value = self.a(x), self.b(x)
        if self.kind is dict:
            return {"logits": logits, "more": [value, None, "a note"]}
        if self.kind == "transformers":
            outputs = pytest.importorskip("transformers.modeling_outputs")
            return outputs.SequenceClassifierOutput(logits=logits, hidden_states=(value,))
        return Pair(logits, value) if self.kind is Pair else (logits, value)


def parts(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(outputs, tuple):
        return outputs[0], outputs[1]
    return outputs["logits"], outputs["more"][0] if "more" in outputs else outputs["hidden_states"][0]


def of_both(outputs: Any, targets: Any) -> torch.Tensor:
    logits, value = parts(outputs)
    return F.cross_entropy(logits, targets) + value.square().mean()


# ------------------------------------------------------------------ losses that vmap cannot evaluate
def masked(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs[targets != -100], targets[targets != -100])


def smoothed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=0.1, weight=WEIGHT)


def looped(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Until there are enough tokens."""
    total, used = outputs.new_zeros(()), 0
    for row, labels in zip(outputs, targets, strict=True):
        for logits, label in zip(row, labels.tolist(), strict=True):
            if label < 0:
                break
            total, used = total - logits.log_softmax(-1)[label], used + 1
    return total / max(used, 1)


def hardest(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A mask that looks at the outputs."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    kept = losses[losses > 0.5]
    return kept.mean() if len(kept) else losses.mean()


def found(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Places, looked up."""
    where = (targets >= 0).nonzero(as_tuple=True)
    return F.nll_loss(outputs.log_softmax(-1)[where], targets[where], reduction="sum") / len(targets)


LOSSES = {"masked": masked, "smoothed": smoothed, "looped": looped, "hardest": hardest, "found": found}


def recorded(path: Any, model: nn.Module, loss: Any, inputs: Any, targets: Any) -> explaind.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            recorder.batch(inputs, targets, ids=torch.arange(8))
            optimizer.step()
    return explaind.open_run(path, model=model, loss=loss)


def check(run: explaind.Run, loss: Any, inputs: torch.Tensor, targets: torch.Tensor, keep: Any, **options: Any) -> None:
    """The loss of each sample, against a function that loops over the samples itself."""

    def one_by_one(call: Any, x: torch.Tensor) -> torch.Tensor:
        rows = [next(k for k in range(len(inputs)) if torch.equal(inputs[k], row)) for row in x]
        return torch.stack([loss(call(inputs[k : k + 1]), targets[k : k + 1]) for k in rows])

    question = {"keep": keep, "nodes": 2, "progress": False, **options}
    result = explaind.attribute(run, inputs, output=explaind.Loss(targets), **question)
    assert explaind.closure_error(result) < 1e-12
    values = [float(loss(run.model(inputs[k : k + 1]), targets[k : k + 1])) for k in range(len(inputs))]
    model = run.model_in(False)
    model.load_state_dict(run.theta(2))
    values = [float(loss(model(inputs[k : k + 1]), targets[k : k + 1])) for k in range(len(inputs))]
    if "test" in keep:
        np.testing.assert_allclose(np.asarray(result.final).ravel(), values, rtol=1e-10)
    if "strategy" not in options:
        with pytest.MonkeyPatch.context() as patch:  # rows are told by their values, which nothing vectorised knows
            patch.setattr(torch.func, "vmap", _refusing)
            patch.setattr("explaind_core.derivatives.differentiator.vmap", _refusing)
            expected = explaind.attribute(run, inputs, output=one_by_one, **question)
        np.testing.assert_allclose(result.kernel, expected.kernel, rtol=0, atol=1e-12)


def _refusing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not here")


@pytest.mark.parametrize("kind", [tuple, dict, Pair, "transformers"])
@pytest.mark.parametrize("keep", [("train", "test"), ("step", "test"), ("train",)])
def test_models_that_return_more_than_a_tensor(tmp_path, kind, keep):
    torch.manual_seed(0)
    run = recorded(tmp_path / "run", Two(kind).double(), of_both, X, Y)
    check(run, of_both, X[:3], Y[:3], keep)
    check(run, of_both, X[:1], Y[:1], keep)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("keep", [("train", "test"), ("step", "layer", "test"), ("train",)])
def test_losses_that_look_at_the_data(tmp_path, name, keep):
    torch.manual_seed(0)
    run = recorded(tmp_path / "run", nn.Linear(4, 3).double(), LOSSES[name], SEQUENCES, TOKENS)
    check(run, LOSSES[name], SEQUENCES[:3], TOKENS[:3], keep)


@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
def test_every_strategy_takes_them(tmp_path, strategy):
    torch.manual_seed(0)
    run = recorded(tmp_path / "run", nn.Linear(4, 3).double(), masked, SEQUENCES, TOKENS)
    keep = ("step", "test") if strategy in ("forward", "reverse") else ("train", "test")
    check(run, masked, SEQUENCES[:2], TOKENS[:2], keep, strategy=strategy)
    assert explaind.verify(run, SEQUENCES[:2], output=explaind.Loss(TOKENS[:2]), progress=False).agreement > 1 - 1e-9


def test_what_vmap_cannot_do_is_tried_once():
    losses, tried = SampleLosses(masked), []
    outputs = torch.randn(4, 5, 3, generator=_GENERATOR)
    losses(outputs, TOKENS[:4])
    assert not losses.vectorised
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "vmap", lambda f: tried.append(f))
        losses(outputs, TOKENS[:4])
    assert not tried
    plain = SampleLosses(nn.CrossEntropyLoss())
    plain(outputs.mT, TOKENS[:4])
    assert plain.vectorised


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=WEIGHT.float())]
)
def test_one_by_one_gives_the_same_numbers(loss):
    outputs = torch.randn(6, 3, generator=_GENERATOR)
    at_once, apart = SampleLosses(loss), SampleLosses(loss)
    apart.vectorised = False
    torch.testing.assert_close(at_once(outputs, Y[:6]), apart(outputs, Y[:6]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(at_once(outputs, Y[:6])[2:3], SampleLosses(loss)(outputs[2:3], Y[2:3]))


def test_what_has_no_row_per_sample_belongs_to_every_sample():
    def balanced(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs[0], targets) + 0.1 * outputs[1]

    logits = torch.randn(4, 3, generator=_GENERATOR)
    found = SampleLosses(balanced)((logits, torch.tensor(2.0)), Y[:4])
    torch.testing.assert_close(found, F.cross_entropy(logits, Y[:4], reduction="none") + 0.2)


# ------------------------------------------------------------------ what is refused by its name
def by_item(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.tensor(F.cross_entropy(outputs, targets).item())


def by_float(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
    return float(F.cross_entropy(outputs, targets))


def by_numpy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.square(outputs.numpy()).mean())


def detached(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.detach(), targets)


@pytest.mark.parametrize("loss", [by_item, by_float, by_numpy, detached])
@pytest.mark.parametrize("n", [1, 3])
def test_a_loss_that_cannot_be_differentiated_is_named(tmp_path, loss, n):
    torch.manual_seed(0)
    run = recorded(tmp_path / "run", nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), X, Y)
    with pytest.raises(
        errors.QuestionError, match=r"(cannot be differentiated|has no derivative)[\s\S]*" + loss.__name__
    ):
        explaind.attribute(run, X[:n], output=explaind.Loss(Y[:n], loss), keep=("train", "test"), progress=False)


@pytest.mark.parametrize("n", [1, 3])
def test_a_loss_that_draws_is_refused(n):
    def noisy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.dropout(outputs, 0.5), targets)

    def noisy_mask(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return masked(outputs, targets) + torch.rand(()) * outputs.sum()

    for loss, outputs, targets in ((noisy, X[:n, :3], Y[:n]), (noisy_mask, SEQUENCES[:n, :, :3], TOKENS[:n])):
        with pytest.raises(errors.QuestionError, match="draws random numbers"):
            SampleLosses(loss)(outputs, targets)


def test_a_constant_has_a_derivative():
    assert SampleLosses(lambda o, _: o.new_ones(()))(torch.zeros(2, 3), Y[:2]).tolist() == [1, 1]


def test_outputs_without_tensors_are_refused():
    with pytest.raises(errors.QuestionError, match="nothing that a loss can be taken of"):
        SampleLosses(of_both)(object(), None)
