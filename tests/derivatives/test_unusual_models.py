"""Derivatives of f, forwards and backwards, against loops of ordinary backward passes, whatever torch.func refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explaind_core import trees
from explaind_core.derivatives import ExplainedFunction, Function, Outputs, examine
from explaind_core.derivatives.differentiator import AUTOGRAD, ONE_BY_ONE, VECTORISED
from explaind_core.derivatives.module_attributes import ModuleAttributes
from explaind_core.errors import QuestionError
from explaind_core.training_step import run_model
from support.unusual_models import MODELS, WrongForwards, unusual


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters elsewhere than where the model itself stands: who looks there is found out."""
    generator = torch.Generator().manual_seed(1)
    return {
        n: p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in model.named_parameters()
    }


def by_hand(
    model: nn.Module, theta: dict[str, torch.Tensor], inputs: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Values ``[n, J]`` and the Jacobian ``[n, J, *shape]``, sample by sample, output by output, by backward()."""
    model.load_state_dict(theta, strict=False)
    rows, jacobian = [], {n: [] for n in theta}
    for k in range(5):
        one = trees.map_tensors(lambda t, k=k: t[k : k + 1].clone(), inputs)
        values = run_model(model, asking(one)).flatten(1)[0]
        rows.append(values.detach())
        for j in range(len(values)):
            model.zero_grad()
            run_model(model, asking(one)).flatten(1)[0, j].backward()
            for n, p in model.named_parameters():
                jacobian[n].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    shape = (5, len(rows[0]))
    return torch.stack(rows), {n: torch.stack(found).reshape(*shape, *theta[n].shape) for n, found in jacobian.items()}


def asking(inputs: object) -> object:
    """A recomputed part passes gradients on only where its inputs ask for them."""
    return trees.map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, inputs)


def examined(name: str) -> tuple[nn.Module, ExplainedFunction, dict[str, torch.Tensor], object]:
    model, inputs = unusual(name)
    theta = moved(model)
    kept = unusual(name)[0].requires_grad_(False)
    function = ExplainedFunction(kept, dict(kept.named_buffers()), inputs, Outputs())
    start = {n: p.detach() for n, p in model.named_parameters()}
    examine(function.at(), start, function.at(), theta)
    return model, function, theta, inputs


#: What all that is asked below needs in the end; the others are vectorised.
NEEDED = {
    "checkpoint": AUTOGRAD, "checkpoint, reentrant": AUTOGRAD, "checkpoint, nested": AUTOGRAD, "packed gru": AUTOGRAD,
    "packed lstm": AUTOGRAD, "old function": AUTOGRAD, "numpy function": AUTOGRAD, "wrong forward mode": AUTOGRAD,
    "numpy hook": AUTOGRAD, "branching": ONE_BY_ONE, "lstm": ONE_BY_ONE,
    "gru": ONE_BY_ONE, "channels last": ONE_BY_ONE, "embedding bag": AUTOGRAD, "grid sample": AUTOGRAD,
    "cdist": AUTOGRAD, "force": AUTOGRAD, "weight norm": AUTOGRAD,
    "weight norm, old": AUTOGRAD,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_values_and_derivatives_are_those_of_ordinary_backward_passes(name):
    model, function, theta, inputs = examined(name)
    values, jacobian = by_hand(model, theta, inputs)
    at, close = function.at(), {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(at.values(theta), values, **close)
    tangents = [moved(model), dict(list(moved(model).items())[:1])]
    expected = [sum((jacobian[n] * t).flatten(2).sum(2) for n, t in tangent.items()) for tangent in tangents]
    for several in (tangents, tangents[:1]):
        found = at.derivatives(theta, several)
        torch.testing.assert_close(found, torch.stack(expected[: len(several)]), **close)
    names, block = list(theta), slice(1, 4)
    rows = at.jacobian(theta, names, block, sum_test=False, sum_outputs=False)
    sums = at.jacobian(theta, names, block, sum_test=False, sum_outputs=True)
    columns = at.jacobian(theta, names, block, sum_test=True, sum_outputs=False, columns=slice(0, 2))
    for n in names:
        torch.testing.assert_close(rows[n], jacobian[n][block], **close)
        torch.testing.assert_close(sums[n], jacobian[n][block].sum(1, keepdim=True), **close)
        torch.testing.assert_close(columns[n], jacobian[n][block].sum(0, keepdim=True)[:, :2], **close)
    assert function.differentiator.way == NEEDED.get(name, VECTORISED), function.differentiator._refused


@pytest.mark.parametrize("name", ["checkpoint", "weight norm, old", "force"])
def test_the_model_is_left_as_it_was(name):
    _, function, theta, _ = examined(name)
    before = ModuleAttributes(function.model)
    function.at().derivatives(theta, [theta])
    function.at().jacobian(theta, list(theta), slice(0, 2), sum_test=False, sum_outputs=False)
    assert before.changed() == []  # nothing of torch.func, and no graph, is left in it
    assert not any(p.requires_grad for p in function.model.parameters())


def test_what_no_way_does_is_refused_by_the_name_of_the_module():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.sin()

        @staticmethod
        def backward(_ctx, _gradient):
            raise RuntimeError("this was never written")

    class Inner(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise RuntimeError("not here")
            return NoGradient.apply(x)

    model = nn.Sequential(nn.Linear(4, 3), Inner()).double().requires_grad_(False)
    function = ExplainedFunction(model, {}, torch.ones(2, 4).double(), Outputs())
    theta = {n: p.detach() for n, p in model.named_parameters()}
    examine(function.at(), theta, function.at(), moved(model))
    with pytest.raises(
        QuestionError, match=r"(?s)cannot be differentiated.*module '1' \(Inner\).*autograd: .*not here"
    ) as error:
        function.at().jacobian(theta, list(theta), slice(0, 2), sum_test=False, sum_outputs=False)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_errors_of_the_users_own_function_are_raised_as_they_are():
    model = nn.Linear(4, 3).double().requires_grad_(False)
    theta = {n: p.detach() for n, p in model.named_parameters()}

    def output(call, inputs):
        return call(inputs) @ torch.ones(7, 2).double()

    function = ExplainedFunction(model, {}, torch.ones(2, 4).double(), Function(output))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        examine(function.at(), theta, function.at(), theta)


def test_too_little_memory_is_no_reason_for_another_way():
    model = nn.Linear(4, 3).double().requires_grad_(False)
    theta, calls = {n: p.detach() for n, p in model.named_parameters()}, []

    def output(call, inputs):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return call(inputs)

    function = ExplainedFunction(model, {}, torch.ones(2, 4).double(), Function(output))
    function.at().values(theta)
    with pytest.raises(torch.OutOfMemoryError):
        function.at().derivatives(theta, [theta, theta])
    assert len(calls) == 2


def test_what_backward_passes_do_not_reach_is_pushed_forwards_and_refused_backwards():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x).tanh()
            return self.b(h)

    model = Cut().double().requires_grad_(False)
    function = ExplainedFunction(model, {}, torch.ones(3, 4).double(), Outputs())
    theta, tangent = {n: p.detach() for n, p in model.named_parameters()}, moved(model)
    examine(function.at(), theta, function.at(), tangent)
    h = 1e-6
    ends = [function.at().values({n: t + s * h * tangent[n] for n, t in theta.items()}) for s in (1, -1)]
    torch.testing.assert_close(
        function.at().derivatives(theta, [tangent])[0], (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-8
    )
    with pytest.raises(QuestionError, match="backward passes do not reach all that the explained function depends on"):
        function.at().jacobian(theta, list(theta), slice(0, 2), sum_test=False, sum_outputs=False)


def test_a_wrong_forward_mode_is_not_taken():
    """Broken on purpose: without the check, the derivative along the first layer is zero."""
    _, function, theta, _ = examined("wrong forward mode")
    tangent = {"a.weight": theta["a.weight"]}
    assert function.at().derivatives(theta, [tangent]).abs().max() > 0.01
    x = torch.ones(1).double()
    assert float(torch.func.jvp(WrongForwards.apply, (x,), (x,))[1]) == 0
