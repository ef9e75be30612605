"""Before any work: is f a function of the parameters, and are its samples coupled?"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from explaind_core.derivatives import ExplainedFunction, Function, Outputs, examine
from explaind_core.errors import QuestionError

INPUTS = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers, and what is done to the hidden numbers."""

    def __init__(self, inside):
        super().__init__()
        self.a, self.b, self.inside = nn.Linear(4, 5), nn.Linear(5, 3), inside
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.b(self.inside(self, self.a(x).tanh()))


def asked(inside, *, inputs=INPUTS, output=None, dtype=torch.float64, **options):
    """A function, and parameters at both ends of a path."""
    torch.manual_seed(2)
    model = (inside if isinstance(inside, nn.Module) else Net(inside)).to(dtype).eval().requires_grad_(False)
    function = ExplainedFunction(model, dict(model.named_buffers()), inputs.to(dtype), output or Outputs(), **options)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    return function, theta, {n: t + 0.1 * torch.randn_like(t) for n, t in theta.items()}


def looked_at(inside, **options):
    function, start, end = asked(inside, **options)
    return function, *examine(function.at(), start, function.at(), end)


# ---------------------------------------------------------------------- coupled samples
def centred(_net, h):
    return h - 0.5 * h.mean(0, keepdim=True)


def over_the_set(_net, h):
    return h.softmax(0) @ torch.eye(5, dtype=h.dtype)


def graph(_net, h):
    return 0.5 * h + 0.5 * h.roll(1, 0)


def two_places(_net, h):
    """An expert with room for two, who come first."""
    return torch.cat([h[:2] * 3, h[2:]])


def gated(net, h):
    """Multiplied by zero where the path begins and ends: only gradients tell."""
    return h + net.gate * h.mean(0, keepdim=True)


class BatchNormalised(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))


COUPLED = {
    "centred": centred, "set": over_the_set, "graph": graph, "capacity": two_places, "batchnorm": BatchNormalised(),
}  # fmt: skip


def jacobian_by_hand(function, theta, rows, output):
    """``[b, J, *shape]`` by plain autograd through all samples that were given."""
    leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
    with torch.enable_grad():
        values = output(lambda q: torch.func.functional_call(function.model, leaves, (q,)), INPUTS)[rows]
    found = {n: [] for n in theta}
    for value in values.reshape(-1):
        gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        for n, g in zip(leaves, gradients, strict=True):
            found[n].append(torch.zeros_like(leaves[n]) if g is None else g)
    return values.detach(), {n: torch.stack(g).reshape(*values.shape, *theta[n].shape) for n, g in found.items()}


@pytest.mark.parametrize("rows", [None, [5, 0, 3]])
@pytest.mark.parametrize("name", [*COUPLED, "output"])
def test_coupled_samples_are_evaluated_and_differentiated_together(name, rows):
    def compared(call, inputs):
        values = call(inputs)
        return values - values.mean(0, keepdim=True)

    inside, output = COUPLED.get(name, lambda _net, h: h), Function(compared) if name == "output" else None
    function, start, end = asked(inside, output=output, chunk=2, rows=rows)
    _, final = examine(function.at(), start, function.at(), end)
    assert function.together
    assert len(function.chunks) == 1
    asked_for = list(range(7)) if rows is None else rows
    plain = compared if name == "output" else lambda call, inputs: call(inputs)
    values, jacobian = jacobian_by_hand(function, end, asked_for, plain)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(final, values, **close)
    at, block = function.at(), slice(1, 3)
    for sums in (True, False):
        found = at.jacobian(end, list(end), block, sum_test=False, sum_outputs=sums)
        whole = at.jacobian(end, list(end), slice(0, len(asked_for)), sum_test=True, sum_outputs=sums)
        for n in end:
            expected = jacobian[n].sum(1, keepdim=True) if sums else jacobian[n]
            torch.testing.assert_close(found[n], expected[block], **close)
            torch.testing.assert_close(whole[n], expected.sum(0, keepdim=True), **close)
    columns = at.jacobian(end, ["a.weight"] if "a.weight" in end else ["0.weight"], block, sum_test=False,
                          sum_outputs=False, columns=slice(1, 3))  # fmt: skip
    for n, g in columns.items():
        torch.testing.assert_close(g, jacobian[n][block, 1:3], **close)
    tangents = [{n: torch.randn_like(t) for n, t in end.items()} for _ in range(2)]
    expected = torch.stack(
        [sum((jacobian[n] * t).reshape(*values.shape, -1).sum(2) for n, t in v.items()) for v in tangents]
    )
    torch.testing.assert_close(at.derivatives(end, tangents), expected, **close)


def test_a_coupling_that_is_multiplied_by_zero_shows_in_gradients():
    function, start, end = asked(gated)
    end["gate"] = torch.zeros_like(end["gate"])
    examine(function.at(), start, function.at(), end)
    assert function.together


def test_a_sample_that_alone_is_no_batch_is_coupled():
    function, *_ = looked_at(lambda _net, h: h if len(h) > 1 else h.squeeze(0).view(5, 1))
    assert function.together


@pytest.mark.parametrize(("dtype", "size", "together"), [
    (torch.float64, 1e-11, False), (torch.float64, 1e-8, True), (torch.float32, 1e-6, False),
    (torch.float32, 1e-2, True),
])  # fmt: skip
def test_rounding_is_no_coupling(dtype, size, together):
    """Just inside of what matrices of other sizes round differently, and well outside of it."""

    def disturbed(_net, h):
        return h * (1 + size * len(h))

    assert looked_at(disturbed, dtype=dtype)[0].together is together


def test_large_matrices_in_single_precision_are_not_coupled():
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(200, 200), nn.GELU())]
    model = nn.Sequential(nn.Linear(4, 200), *layers, nn.Linear(200, 3))
    function, *_ = looked_at(model, inputs=torch.randn(300, 4), dtype=torch.float32)
    assert not function.together


def test_what_is_independent_stays_in_chunks():
    function, *_ = looked_at(lambda _net, h: h, chunk=3)
    assert not function.together
    assert len(function.chunks) == 3


# ---------------------------------------------------------------------- no function
def dropped(_net, h):
    return nn.functional.dropout(h)  # training=self.training forgotten


def bernoulli(_net, h):
    return h * torch.bernoulli(torch.full_like(h, 0.5))


def noisy(_net, h):
    return h + torch.randn_like(h)


def by_numpy(_net, h):
    return h * float(np.random.rand())


def by_python(_net, h):
    return h * random.random()


RANDOM = {"dropout": (dropped, "torch"), "bernoulli": (bernoulli, "torch"), "noise": (noisy, "torch"),
          "numpy": (by_numpy, "numpy.random"), "python": (by_python, "drawn from random")}  # fmt: skip


def states():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_function_is_refused_and_says_what_moved(name):
    inside, what = RANDOM[name]
    before = states()
    with pytest.raises(QuestionError, match="no function of the parameters") as error:
        looked_at(inside)
    assert what in error.value.got
    assert "the model (Net)" in error.value.where
    assert "random_state=0" in error.value.remedy
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_fixes_it(name):
    """Values and derivatives of the draws that the seed makes, the same at every parameter, by every way."""
    inside, _ = RANDOM[name]
    before = states()
    function, start, end = asked(inside, random_state=5)
    _, final = examine(function.at(), start, function.at(), end)

    def seeded(call, inputs):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        return call(inputs)

    at, close = function.at(), {"rtol": 1e-10, "atol": 1e-10}
    tangents = [{n: torch.randn_like(t) for n, t in end.items()} for _ in range(2)]
    before = states()
    pushed = at.derivatives(end, tangents)
    pulled = at.jacobian(end, list(end), slice(2, 5), sum_test=False, sum_outputs=False)
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    values, jacobian = jacobian_by_hand(function, end, list(range(7)), seeded)
    torch.testing.assert_close(final, values, **close)
    expected = torch.stack(
        [sum((jacobian[n] * t).reshape(*values.shape, -1).sum(2) for n, t in v.items()) for v in tangents]
    )
    torch.testing.assert_close(pushed, expected, **close)
    for n, g in pulled.items():
        torch.testing.assert_close(g, jacobian[n][2:5], **close)


def test_random_numbers_that_change_nothing_are_no_matter():
    def idle(_net, h):
        torch.rand(3)
        return h

    before = torch.get_rng_state()
    function, *_ = looked_at(idle)
    assert function.habits.draws
    function, start, _ = asked(idle)
    torch.manual_seed(0)
    function.habits.draws = True
    before = torch.get_rng_state()
    function.at().values(start)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------- hidden states
def remembering(net, h):
    net.h = h.mean() if getattr(net, "h", None) is None else 0.5 * net.h + h.mean()
    return h + net.h


def in_a_list(net, h):
    net.__dict__.setdefault("seen", []).append(1)
    return h * len(net.seen)


def counting(net, h):
    net.calls = getattr(net, "calls", 0) + 1
    return h / net.calls


def own_generator(net, h):
    if "generator" not in net.__dict__:
        net.generator = torch.Generator().manual_seed(0)
    return h + torch.randn(h.shape, generator=net.generator, dtype=h.dtype)


@pytest.mark.parametrize(("inside", "name"), [
    (remembering, "'h'"), (in_a_list, "'seen'"), (counting, "'calls'"), (own_generator, "'generator'"),
])  # fmt: skip
def test_a_state_kept_between_calls_is_refused_by_its_name(inside, name):
    with pytest.raises(QuestionError, match="no function of the parameters") as error:
        looked_at(inside)
    assert f"{name} of the model (Net)" in error.value.got


def test_a_cache_of_what_depends_on_parameters_is_refused_by_its_name():
    def cached(net, h):
        if "kept" not in net.__dict__:
            net.kept = net.a.weight.detach().sum()
        return h * net.kept

    with pytest.raises(QuestionError, match="remembers an evaluation at other ones") as error:
        looked_at(cached)
    assert error.value.where == "'kept' of the model (Net)"


def test_what_is_kept_and_not_used_is_no_matter_and_not_left_behind():
    def watched(net, h):
        net.activations = h
        return h

    function, start, _ = asked(watched)
    examine(function.at(), start, function.at(), start)
    function.at().derivatives(start, [start, start])
    assert function.habits.keeps
    assert not hasattr(function.model, "activations")


def test_a_state_that_an_output_function_sets_back_is_a_function():
    function, start, end = asked(remembering)

    def output(call, inputs):
        function.model.h = None
        return call(inputs)

    function.output = Function(output)
    examine(function.at(), start, function.at(), end)
    assert function.together  # the mean over the samples


def test_buffers_that_evaluation_writes_to_begin_every_evaluation_as_they_were_recorded():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.register_buffer("calls", torch.ones(()).double())

        def forward(self, x):
            self.calls += 1
            return self.a(x) * self.calls

    function, start, end = asked(Counted())
    _, final = examine(function.at(), start, function.at(), end)
    assert function.habits.writes
    assert float(function.at().buffers["calls"]) == 1
    torch.testing.assert_close(final, 2 * (INPUTS @ end["a.weight"].T + end["a.bias"]))
    found = function.at().jacobian(end, ["a.bias"], slice(0, 2), sum_test=False, sum_outputs=True)["a.bias"]
    torch.testing.assert_close(found, torch.full((2, 1, 3), 2.0).double())
