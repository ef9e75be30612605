"""State that gradients alone do not give: a Hessian that the optimizer, or the loop, estimates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import CoefficientError
from explaind_core.operators import Diagonal, OfReadout

optimizers = pytest.importorskip("pytorch_optimizer")


def train(path, *, given=False, steps=7, **recording):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].bias.requires_grad_(False)  # in the optimizer, without a gradient
    optimizer = optimizers.SophiaH(
        model.parameters(), lr=0.05, update_period=10 if given else 3, weight_decay=0.1, p=0.5
    )
    inputs, targets = torch.randn(24, 4, dtype=torch.float64), torch.randint(3, (24,))
    loss = nn.CrossEntropyLoss()
    with explaind.Recorder(path, model, optimizer, loss, **recording) as recorder:
        for s in range(steps):
            ids = torch.arange(24).chunk(3)[s % 3]
            optimizer.zero_grad()
            torch.autograd.backward(loss(model(inputs[ids]), targets[ids]), create_graph=not given)
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            new = [torch.rand_like(p) for p in model.parameters()] if given and s in (0, 1, 5) else None
            optimizer.step(hessian=new)
            optimizer.zero_grad(set_to_none=True)
    return model, optimizer


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True:UserWarning")
@pytest.mark.parametrize("given", [False, True], ids=["estimated", "given"])
def test_a_recorded_run_closes_with_the_estimates_that_were_made(tmp_path, given):
    model, optimizer = train(tmp_path / "run", given=given, snapshot_every=2)
    run = explaind.open_run(tmp_path / "run", model=model)
    steps = list(explaind.decompose(run))
    assert max(step.error for step in steps) < 1e-12
    assert max(step.drift for step in steps) == 0
    changed = [s for s in run.steps if run.outside(s)]
    assert changed == ([1, 2, 6] if given else [1, 4, 7])  # kept where they change, not at every step
    fresh = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    again = optimizers.SophiaH(fresh.parameters(), lr=0.05, update_period=3, weight_decay=0.1, p=0.5)
    run.restore(fresh, again)
    assert again.param_groups[0]["step"] == 7
    trained = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, trained[name])
        mine, theirs = again.state.get(parameter, {}), optimizer.state.get(trained[name], {})
        if name != "0.bias":
            assert torch.equal(mine["hessian"], theirs["hessian"])
            assert torch.equal(mine["hessian_moment"], theirs["hessian_moment"])


def test_an_operator_of_the_read_out_stands_alone():
    operator = OfReadout(lambda out: Diagonal(1 / out.abs()))
    with pytest.raises(CoefficientError, match="before it was made"):
        operator.apply(torch.ones(1))
    out = torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert torch.equal(operator.make(out).apply(out), torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert torch.equal(operator.adjoint.make(out).apply(out), torch.tensor([1.0, -1.0], dtype=torch.float64))
