"""The whole chain, recording to result, against dense sums that follow the paper letter by letter (float64).

The oracle knows nothing of filters, operators or replay: it re-trains with its own optimizer loops, keeps every
gradient, forms alpha_{s,i} explicitly, materialises Jacobians at every node, and sums.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind

STEPS, SAMPLES, CLASSES = 6, 12, 2


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def record(path, make_optimizer, schedule=None):
    model, loss = make_model(), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    optimizer = make_optimizer(model.parameters())
    base = [group["lr"] for group in optimizer.param_groups]
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        for s in range(1, STEPS + 1):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * (schedule(s) if schedule else 1)
            ids = torch.randint(SAMPLES, (5,), generator=generator)  # repeats samples
            optimizer.zero_grad()
            loss(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            optimizer.step()
    return explaind.open_run(path, model=model), inputs, targets


def flat(named):
    return torch.cat([t.reshape(-1) for t in named.values()])


def paper_updates(run, kind):
    """(kernel, regularization) updates by the closed forms of Theorem 3.1 and Corollary 3.2, as [N][D]."""
    gradients = [flat(run.gradients(s)) for s in run.steps]
    thetas = [flat(run.theta(s)) for s in range(len(run.steps) + 1)]
    hyper = [run.hyper(s)[0] for s in run.steps]
    kernels, decays = [], []
    for s in run.steps:
        h = hyper[s - 1]
        if kind == "adamw":
            b1, b2 = h["betas"]
            v = sum((1 - b2) * b2 ** (s - i) * gradients[i - 1] ** 2 for i in range(1, s + 1))
            denominator = (v / (1 - b2**s)).sqrt() + h["eps"]
            alphas = [h["lr"] * (1 - b1) / (1 - b1**s) * b1 ** (s - i) for i in range(1, s + 1)]
            kernels.append(-sum(a * gradients[i] / denominator for i, a in enumerate(alphas)))
            decays.append(-h["lr"] * h["weight_decay"] * thetas[s - 1])
        else:  # sgd with momentum, no dampening
            alphas = [h["lr"] * h["momentum"] ** (s - i) for i in range(1, s + 1)]
            kernels.append(-sum(a * gradients[i] for i, a in enumerate(alphas)))
            decays.append(-sum(a * h["weight_decay"] * thetas[i] for i, a in enumerate(alphas)))
    return kernels, decays


def jacobian(run, theta, function):
    shapes = {n: p.shape for n, p in run.parameters.items()}
    sizes = [s.numel() for s in shapes.values()]

    def at(vector):
        named = {n: part.view(s) for (n, s), part in zip(shapes.items(), vector.split(sizes), strict=True)}
        return function(named)

    return torch.autograd.functional.jacobian(at, theta)


def influences(run, inputs, kind, q, function):
    """Every influence by (term, step, test, output, coordinate), by materialised Jacobians."""
    nodes, weights = np.polynomial.legendre.leggauss(q)
    terms = []
    for updates in paper_updates(run, kind):
        steps = []
        for s, update in zip(run.steps, updates, strict=True):
            before, after = flat(run.theta(s - 1)), flat(run.theta(s))
            points = [before + (t + 1) / 2 * (after - before) for t in nodes]
            phi = sum(w / 2 * jacobian(run, p, function) for p, w in zip(points, weights, strict=True))
            steps.append(phi * update)
        terms.append(torch.stack(steps))
    return terms


def outputs_of(run, inputs):
    return lambda named: torch.func.functional_call(run.model, named, (inputs,))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, weight_decay=0.2),
}


@pytest.fixture(scope="module", params=list(OPTIMIZERS))
def recorded(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "run"
    run, inputs, targets = record(path, OPTIMIZERS[request.param], schedule=lambda s: 1 / s)
    return request.param, run, inputs[:4], targets[:4]


def test_updates_equal_the_closed_forms_of_the_paper(recorded):
    kind, run, _, _ = recorded
    kernels, decays = paper_updates(run, kind)
    for split in explaind.decompose(run):
        kernel = flat({n: u.kernel for n, u in split.updates.items()})
        decay = flat({n: u.regularization for n, u in split.updates.items()})
        torch.testing.assert_close(kernel, kernels[split.step - 1], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(decay, decays[split.step - 1], rtol=1e-12, atol=1e-14)
        assert split.error < 1e-12
        assert split.drift == 0


AXES = ("step", "layer", "test", "output")
LAYERS = {"first": slice(0, 16), "second": slice(16, 26)}  # coordinates of the modules 0 and 2


@settings(deadline=None, max_examples=25)
@given(keep=st.sets(st.sampled_from(AXES)), nodes=st.integers(1, 3), function=st.sampled_from(["outputs", "loss"]))
def test_every_choice_of_axes_equals_the_dense_sum(recorded, keep, nodes, function):
    kind, run, inputs, targets = recorded
    call = outputs_of(run, inputs)
    if function == "loss":
        explained = lambda named: nn.functional.cross_entropy(call(named), targets, reduction="none")[:, None]  # noqa: E731
        output = explaind.Loss(targets)
    else:
        explained, output = call, None
    result = explaind.attribute(
        run, inputs, keep=tuple(keep), nodes=nodes, output=output, layers={"first": "0", "second": "2"}, progress=False
    )
    dense = influences(run, inputs, kind, nodes, explained)
    gone = [i for i, axis in enumerate(AXES) if axis not in keep]
    change = torch.stack(
        [explained(run.theta(s)) - explained(run.theta(s - 1)) for s in run.steps]
    )  # [step, test, output]
    residual = change - sum(term.sum(-1) for term in dense)
    for name, term in zip(("kernel", "regularization"), dense, strict=True):
        by_layer = torch.stack([term[..., where].sum(-1) for where in LAYERS.values()], dim=1)
        expected = by_layer.sum(gone) if gone else by_layer
        np.testing.assert_allclose(result[name].values, expected.numpy(), rtol=1e-10, atol=1e-12)
        assert result[name].dims == tuple(axis for axis in AXES if axis in keep)
    plain = [i for i, axis in enumerate(("step", "test", "output")) if axis not in keep]
    expected = residual.sum(plain) if plain else residual
    np.testing.assert_allclose(result.residual.values, expected.numpy(), rtol=1e-9, atol=1e-12)
    assert explaind.closure_error(result) < 1e-12


def test_restrictions_close_through_what_they_omit(recorded):
    kind, run, inputs, _ = recorded
    result = explaind.attribute(run, inputs, steps=[2, 3, 6], layers=["2"], nodes=2, progress=False)
    dense = influences(run, inputs, kind, 2, outputs_of(run, inputs))
    for name, term in zip(("kernel", "regularization"), dense, strict=True):
        expected = term[[1, 2, 5]][..., LAYERS["second"]].sum(-1)
        np.testing.assert_allclose(result[name].sel(layer="2").values, expected.numpy(), rtol=1e-10, atol=1e-12)
    assert float(abs(result.omitted).max()) > 1e-3
    assert explaind.closure_error(result) < 1e-12


def test_chunks_of_test_samples_change_nothing(recorded):
    from explaind_core.attribution.attribute import answer
    from explaind_core.questions.question import Question

    _, run, inputs, _ = recorded
    results = [answer(Question.ask(run, inputs, nodes=2, chunk=chunk), progress=False) for chunk in (1, 3, 500)]
    for other in results[1:]:
        np.testing.assert_allclose(other.kernel.values, results[0].kernel.values, rtol=1e-12, atol=1e-15)


def test_a_recording_that_starts_with_a_used_optimizer_keeps_its_prehistory_apart(tmp_path):
    model, loss = make_model(), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(8, 3, dtype=torch.float64), torch.randint(CLASSES, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()

    for _ in range(3):
        step()
        optimizer.step()
    buffer = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(4):
            step()
            recorder.batch(inputs, targets, ids=range(8))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    for split in explaind.decompose(run):
        assert split.error < 1e-12
        torch.testing.assert_close(split.updates["0.weight"].prehistory, -0.1 * 0.9**split.step * buffer)
    result = explaind.attribute(run, inputs, progress=False)
    assert float(abs(result.prehistory).max()) > 1e-3
    assert explaind.closure_error(result) < 1e-12


def test_single_precision_closes_to_rounding(tmp_path):
    from explaind_core.testing import record_example

    run = record_example(steps=10, dtype=torch.float32)
    result = explaind.attribute(run, torch.randn(6, 4), progress=False)
    assert result.kernel.dtype == np.float32
    assert explaind.closure_error(result) <= 1e-12 * float(abs(result.final).max())
    assert 1e-9 < float(result.update_error.max()) < 1e-3


def test_the_model_is_never_touched(recorded, tmp_path):
    _, _, inputs, _ = recorded
    run, _, _ = record(tmp_path / "run", OPTIMIZERS["sgd"])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    explaind.verify(explaind.open_run(run.path, model=model), inputs, progress=False)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
