"""f at a step: a view that knows its own buffers, whoever asked for another one since."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from explaind_core.derivatives import ExplainedFunction, Outputs

INPUTS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()


def buffers_after(step: int) -> dict[str, torch.Tensor]:
    """Those of training, in short."""
    mean, variance = torch.full((4,), 0.5 * step).double(), torch.full((4,), 1.0 + step).double()
    return {"1.running_mean": mean, "1.running_var": variance, "1.num_batches_tracked": torch.tensor(step)}


@pytest.fixture
def read():
    return []


@pytest.fixture
def function(read):
    def buffers_at(step):
        read.append(step)
        return buffers_after(step)

    return ExplainedFunction(model(), buffers_after(9), INPUTS, Outputs(), chunk=2, buffers_at=buffers_at)


def expected(step: int) -> torch.Tensor:
    network = model()
    network.load_state_dict({**network.state_dict(), **buffers_after(step)})
    return network(INPUTS).detach()


def theta() -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model().named_parameters()}


def test_values_are_those_of_the_steps_buffers_whoever_asks_in_between(function):
    first, second = function.at(1), function.at(2)
    for _ in range(2):
        torch.testing.assert_close(first.values(theta()), expected(1), rtol=0, atol=1e-14)
        torch.testing.assert_close(second.values(theta()), expected(2), rtol=0, atol=1e-14)
        function.at(3).values(theta())
    torch.testing.assert_close(function.at().values(theta()), expected(9), rtol=0, atol=1e-14)


def test_derivatives_are_those_of_the_steps_buffers(function):
    """f is linear in the last weights, and what they are multiplied with depends on the buffers."""
    tangent = {"2.weight": torch.ones(2, 4).double()}
    options = {"sum_test": False, "sum_outputs": False}
    for step in (1, 2, 1):
        view = function.at(step)
        function.at(7)
        moved = {n: t + tangent.get(n, 0) for n, t in theta().items()}
        change = view.values(moved) - expected(step)
        torch.testing.assert_close(view.derivatives(theta(), [tangent])[0], change)
        jacobian = view.jacobian(theta(), ["2.weight"], slice(0, 5), **options)["2.weight"]
        torch.testing.assert_close(jacobian.sum((-1, -2)), change)


def test_a_view_stays_as_it_is(function):
    with pytest.raises(dataclasses.FrozenInstanceError):
        function.at(1).buffers = {}


def test_buffers_of_the_ends_of_a_segment_are_read_once(function, read):
    for _ in range(3):
        function.at(1)
        function.at(4)
    assert read == [1, 4]
    function.at(5)
    function.at(4)
    assert read == [1, 4, 5]


def test_where_no_buffer_moved_all_steps_are_alike(read):
    function = ExplainedFunction(model(), buffers_after(9), INPUTS, Outputs())
    assert not function.moves
    torch.testing.assert_close(function.at(1).values(theta()), expected(9), rtol=0, atol=1e-14)
    assert (function.at(1).samples, function.at(1).outputs, function.at(1).dtype) == (5, 2, torch.float64)


def test_what_vmap_cannot_do_is_known_to_all_views(function):
    assert function.at(1).function.differentiator is function.at(2).function.differentiator
