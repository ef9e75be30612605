"""Optimizers that evaluate the model elsewhere than they take its gradients: Schedule-Free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError, RecordingError
from explaind_core.testing import record_example

schedulefree = pytest.importorskip("schedulefree")

INPUTS = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
LOSS = nn.CrossEntropyLoss()
KINDS = {
    "AdamW": (schedulefree.AdamWScheduleFree, {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 3}),
    "SGD": (schedulefree.SGDScheduleFree, {"lr": 0.3, "weight_decay": 0.1, "momentum": 0.8}),
}


def train(path, kind, steps=9, dtype=torch.float64, **recording):
    """Train, and evaluate after every third step, as users do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    make, options = KINDS[kind]
    optimizer = make(model.parameters(), **options)
    evaluated = []
    with explaind.Recorder(path, model, optimizer, LOSS, **recording) as recorder:
        for s in range(steps):
            model.train()
            optimizer.train()
            ids = torch.arange(24).chunk(3)[s % 3]
            optimizer.zero_grad()
            LOSS(model(INPUTS[ids].to(dtype)), TARGETS[ids]).backward()
            recorder.batch(INPUTS[ids].to(dtype), TARGETS[ids], ids=ids)
            optimizer.step()
            if s % 3 == 2:
                model.eval()
                optimizer.eval()
                evaluated.append((s + 1, {n: p.detach().clone() for n, p in model.named_parameters()}))
    return model, evaluated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_points_of_a_run_close(tmp_path, kind, dtype):
    model, evaluated = train(tmp_path / "run", kind, dtype=dtype)
    eps = torch.finfo(dtype).eps
    trained = explaind.open_run(tmp_path / "run", model=model)
    seen = explaind.open_run(tmp_path / "run", model=model, point="evaluated")
    for s, theta in evaluated:
        for name, value in seen.theta(s).items():
            torch.testing.assert_close(value, theta[name], rtol=4 * eps, atol=4 * eps)
            assert not torch.equal(value, trained.theta(s)[name])
    for run in (trained, seen):
        for step in explaind.decompose(run):
            assert step.error <= 1e-13 + 2 * step.rounding
        result = explaind.attribute(run, INPUTS[:3].to(dtype), keep=("step", "test", "output"), progress=False)
        assert explaind.closure_error(result) < 100 * eps
        assert float(abs(result.regularization).max()) > 0
    final = model.eval()(INPUTS[:3].to(dtype)).detach().double()  # the loop ended in evaluation mode
    torch.testing.assert_close(torch.from_numpy(result.final.values), final, rtol=1e3 * eps, atol=1e3 * eps)


def test_gradients_are_those_of_the_gradient_point(tmp_path):
    model, _ = train(tmp_path / "run", "AdamW")
    run = explaind.open_run(tmp_path / "run", model=model)
    theta = {n: t.clone().requires_grad_() for n, t in run.theta(4).items()}
    loss = LOSS(torch.func.functional_call(model, theta, INPUTS[8:16]), TARGETS[8:16])
    for name, gradient in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
        torch.testing.assert_close(run.gradients(5)[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_change_beyond_rounding_is_still_refused(tmp_path):
    model, _ = train(tmp_path / "run", "SGD", steps=2)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    with explaind.Recorder(tmp_path / "other", model, optimizer, LOSS) as recorder:
        with torch.no_grad():
            model[0].weight.mul_(1 + 1e-12)
        LOSS(model(INPUTS), TARGETS).backward()
        recorder.batch(INPUTS, TARGETS, ids=range(24))
        with pytest.raises(RecordingError, match="a parameter changed outside"):
            optimizer.step()


def test_a_run_resumes_after_an_evaluation(tmp_path):
    train(tmp_path / "whole", "AdamW", steps=9)
    train(tmp_path / "parts", "AdamW", steps=6, snapshot_every=3)  # the last step has a snapshot
    torch.manual_seed(7)
    again = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    make, options = KINDS["AdamW"]
    optimizer = make(again.parameters(), **options)
    explaind.open_run(tmp_path / "parts", model=again).restore(again, optimizer)
    optimizer.eval()
    optimizer.train()
    with explaind.Recorder(tmp_path / "parts", again, optimizer, LOSS, resume=True) as recorder:
        for s in range(6, 9):
            ids = torch.arange(24).chunk(3)[s % 3]
            optimizer.zero_grad()
            LOSS(again(INPUTS[ids]), TARGETS[ids]).backward()
            recorder.batch(INPUTS[ids], TARGETS[ids], ids=ids)
            optimizer.step()
    a, b = explaind.open_run(tmp_path / "whole"), explaind.open_run(tmp_path / "parts")
    for name, value in a.theta(9).items():
        torch.testing.assert_close(b.theta(9)[name], value, rtol=1e-12, atol=1e-13)
    assert max(step.error for step in explaind.decompose(b)) < 1e-11


def test_a_run_of_another_optimizer_has_one_point():
    run = record_example(steps=2)
    with pytest.raises(QuestionError, match="no point 'evaluated'") as caught:
        explaind.open_run(run.path, point="evaluated")
    assert "where it takes its gradients" in str(caught.value)
    with pytest.raises(QuestionError, match="no point 'x'"):
        run.theta(1, point="x")
