"""Optimizers that iterate inside step(closure), and rules over all tensors at once: L-BFGS."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import RecordingError
from explaind_optimizers.lbfgs import TwoLoop

INPUTS = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
LOSS = nn.CrossEntropyLoss()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def closure_of(model, optimizer, ids, each=None):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(INPUTS[ids]), TARGETS[ids])
        loss.backward()
        if each is not None:
            each()
        return loss

    return closure


def train(path, model, calls, *, inside=False, until=None, recorder_options=None, **options):
    """Calls of step(closure) on halves of the samples in turn; returns the recorder and the optimizer."""
    optimizer = torch.optim.LBFGS(model.parameters(), **options)
    done = 0
    if recorder_options and recorder_options.get("resume"):
        run = explaind.open_run(path, model=model)
        run.restore(model, optimizer)
        done = recorder_options.pop("done")
    with explaind.Recorder(path, model, optimizer, LOSS, **(recorder_options or {})) as recorder:
        for call in range(done, calls if until is None else until):
            ids = torch.arange(24).chunk(2)[call % 2]

            def declare(ids=ids):
                recorder.batch(INPUTS[ids], TARGETS[ids], ids=ids)

            if not inside:
                declare()
            optimizer.step(closure_of(model, optimizer, ids, declare if inside else None))
    return recorder, optimizer


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("inside", [False, True], ids=["declared before", "declared in the closure"])
def test_every_inner_iteration_is_a_step(tmp_path, search, inside):
    model = perceptron()
    recorder, optimizer = train(tmp_path / "run", model, 3, inside=inside, max_iter=6, line_search_fn=search, lr=0.3)
    iterations = next(iter(optimizer.state.values()))["n_iter"]
    assert recorder.steps == iterations > 6
    run = explaind.open_run(tmp_path / "run", model=model)
    for name, value in run.theta(iterations).items():
        assert torch.equal(value, dict(model.named_parameters())[name])
    steps = list(explaind.decompose(run))
    assert all(step.error <= 1e-13 + step.rounding for step in steps)  # updates become small at the end
    assert max(step.drift for step in steps) == 0
    assert run.batch(1).ids.tolist() == list(range(12))
    assert run.batch(iterations).ids.tolist() == list(range(12))  # the third call
    result = explaind.attribute(run, INPUTS[:3], keep=("step", "layer"), progress=False)
    assert explaind.closure_error(result) < 1e-12
    assert float(abs(result.regularization).max()) == 0


def test_the_gradient_of_each_step_is_that_at_its_own_parameters(tmp_path):
    model = perceptron()
    train(tmp_path / "run", model, 1, max_iter=5, line_search_fn="strong_wolfe")
    run = explaind.open_run(tmp_path / "run", model=model)
    for s in run.steps:
        theta = {n: t.clone().requires_grad_() for n, t in run.theta(s - 1).items()}
        loss = LOSS(torch.func.functional_call(perceptron(), theta, INPUTS[:12]), TARGETS[:12])
        for (name, t), gradient in zip(theta.items(), torch.autograd.grad(loss, list(theta.values())), strict=True):
            torch.testing.assert_close(run.gradients(s)[name], gradient, rtol=1e-12, atol=1e-14)
            assert t.shape == gradient.shape
        losses = [value for value, _ in run.closure_calls(s)]
        assert losses[0] == pytest.approx(float(loss.detach()), rel=1e-12)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path, search):
    options = {"max_iter": 4, "line_search_fn": search, "lr": 0.5}
    whole = perceptron()
    train(tmp_path / "whole", whole, 4, recorder_options={"snapshot_every": 3}, **options)
    parts = perceptron()
    train(tmp_path / "parts", parts, 4, until=2, recorder_options={"snapshot_every": 3}, **options)
    fresh = perceptron()
    train(tmp_path / "parts", fresh, 4, recorder_options={"resume": True, "done": 2}, **options)
    for mine, theirs in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    run = explaind.open_run(tmp_path / "parts", model=fresh)
    assert len(run.steps) == len(explaind.open_run(tmp_path / "whole").steps)
    assert all(step.error <= 1e-13 + step.rounding for step in explaind.decompose(run))


def test_a_call_that_stays_is_no_step(tmp_path):
    model = perceptron()
    recorder, _ = train(tmp_path / "run", model, 2, tolerance_grad=1e6)
    assert recorder.steps == 0


def test_a_noisy_closure_is_recorded_as_it_was(tmp_path):
    """Dropout: another loss at every evaluation. What is recorded is what the optimizer was told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    train(tmp_path / "run", model, 3, max_iter=4, line_search_fn="strong_wolfe", lr=0.1)
    run = explaind.open_run(tmp_path / "run", model=model)
    assert all(step.error <= 1e-13 + step.rounding for step in explaind.decompose(run))


def test_a_closure_that_draws_another_batch_is_refused(tmp_path):
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS) as recorder:
        coming = iter(torch.arange(24).chunk(4))

        def closure():
            ids = next(coming)
            optimizer.zero_grad()
            loss = LOSS(model(INPUTS[ids]), TARGETS[ids])
            loss.backward()
            recorder.batch(INPUTS[ids], TARGETS[ids], ids=ids)
            return loss

        with pytest.raises(RecordingError, match="declared another batch") as caught:
            optimizer.step(closure)
    assert "draw the batch outside the closure" in str(caught.value)


@pytest.mark.parametrize(
    ("search", "call", "message"),
    [
        (None, 1, "a parameter changed inside the closure"),
        ("strong_wolfe", 1, "a parameter changed inside the closure"),
        (None, 2, "cannot be told apart"),
        (None, 3, "do not stand where"),  # the last evaluation, behind the last move
    ],
)
def test_a_closure_that_changes_parameters_is_refused(tmp_path, search, call, message):
    model = perceptron()
    # It stops by its tolerance, behind the evaluation at what the second iteration reached.
    options = {"max_iter": 5, "max_eval": 3} if call == 3 else {"max_iter": 5}
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn=search, **options)
    calls = []

    def meddle():
        calls.append(0)
        if len(calls) == call:
            with torch.no_grad():
                model[0].bias.add_(0.1)

    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS) as recorder:
        ids = torch.arange(12)
        recorder.batch(INPUTS[ids], TARGETS[ids], ids=ids)
        with pytest.raises(RecordingError, match=message):
            optimizer.step(closure_of(model, optimizer, ids, meddle))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5), pairs=st.integers(0, 6), scale=st.floats(0.1, 3), seed=st.integers(0, 999))
def test_the_two_loops_are_the_dense_bfgs_matrix(size, pairs, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    moves = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(pairs)]
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    curvature = root @ root.T + torch.eye(size, dtype=torch.float64)  # <y, s> > 0
    differences = [curvature @ s for s in moves]
    dense = scale * torch.eye(size, dtype=torch.float64)
    for y, s in zip(differences, moves, strict=True):
        v = torch.eye(size, dtype=torch.float64) - torch.outer(y, s) / y.dot(s)
        dense = v.T @ dense @ v + torch.outer(s, s) / y.dot(s)
    ro = [1 / float(y.dot(s)) for y, s in zip(differences, moves, strict=True)]
    operator = TwoLoop(scale, differences, moves, ro)
    size_of_it = float(dense.abs().max())
    torch.testing.assert_close(operator.dense((size,)), dense, rtol=1e-10, atol=1e-10 * size_of_it)
    torch.testing.assert_close(operator.adjoint.dense((size,)), dense.T, rtol=1e-10, atol=1e-10 * size_of_it)
