"""attribute_checkpoints() against a dense oracle, and against attribute()."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import Loss
from explaind_core.checkpoints.attribute_checkpoints import AXES
from explaind_core.errors import QuestionError
from explaind_core.testing import record_example
from support.attribution_oracles import record
from support.checkpoint_points import INPUTS, architecture, ask, closure_error, states

SUBSETS = [keep for size in range(5) for keep in itertools.combinations(AXES, size)]
#: layers -> what is asked for, and the parameters' entries that each layer holds
LAYERS = {
    "all": (None, {"0": {"0.weight": ..., "0.bias": ...}, "2": {"2.weight": ..., "2.bias": ...}}),
    "one": (["2"], {"2": {"2.weight": ..., "2.bias": ...}}),
    "slices": (
        {"neuron": {"0.weight": (1, slice(None)), "0.bias": 1}, "weights": {"2.weight": slice(0, 2)}},
        {"neuron": {"0.weight": (1, slice(None)), "0.bias": 1}, "weights": {"2.weight": slice(0, 2)}},
    ),
}


# ---------------------------------------------------------------------- the oracle
def oracle(nodes) -> tuple[dict[str, Tensor], Tensor]:
    """Parameter -> its entries' influences ``[segments, n, J, *shape]``; and ``[checkpoints, n, J]`` values."""
    if nodes in ("left", "midpoint:2"):
        points, weights = ([-1.0], [2.0]) if nodes == "left" else ([-0.5, 0.5], [1.0, 1.0])
    else:
        points, weights = np.polynomial.legendre.leggauss(nodes)
    rows, values = [], []
    for before, after in itertools.pairwise(states()):
        moved = {n: after[n] - before[n] for n in before}
        row = {n: torch.zeros(3, 3, *moved[n].shape, dtype=torch.float64) for n in moved}
        for t, w in zip(points, weights, strict=True):
            model = architecture()
            model.load_state_dict({n: before[n] + (t + 1) / 2 * moved[n] for n in before})
            outputs = model(INPUTS)
            for test, output in itertools.product(range(3), range(3)):
                gradients = torch.autograd.grad(outputs[test, output], list(model.parameters()), retain_graph=True)
                for (n, _), g in zip(model.named_parameters(), gradients, strict=True):
                    row[n][test, output] += w / 2 * g * moved[n]
        rows.append(row)
    for state in states():
        model = architecture()
        model.load_state_dict(state)
        values.append(model(INPUTS).detach())
    return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}, torch.stack(values)


_oracle = lru_cache(oracle)


def expected(keep, layers, nodes):
    entries, values = _oracle(nodes)
    change = []
    for parts in LAYERS[layers][1].values():
        total = torch.zeros(3, 3, 3, dtype=torch.float64)
        for name, where in parts.items():
            mask = torch.zeros(entries[name].shape[3:], dtype=torch.float64)
            mask[where] = 1
            total = total + (entries[name] * mask).flatten(3).sum(3)
        change.append(total)
    change = torch.stack(change, 1)
    everything = sum(t.flatten(3).sum(3) for t in entries.values())
    found = {
        "change": (change, AXES),
        "omitted": (everything - change.sum(1), ("step", "test", "output")),
        "residual": (values[1:] - values[:-1] - everything, ("step", "test", "output")),
        "initial": (values[0], ("test", "output")),
        "final": (values[-1], ("test", "output")),
    }
    return {
        name: xr.DataArray(value.numpy(), dims=axes).sum([axis for axis in axes if axis not in keep])
        for name, (value, axes) in found.items()
    }


def assert_answers(result, keep, layers, nodes):
    for name, value in expected(keep, layers, nodes).items():
        assert result[name].dims == value.dims, name
        # Sums of some dozen products of numbers around 1, in float64.
        np.testing.assert_allclose(result[name].values, value.values, rtol=0, atol=1e-13, err_msg=name)
    assert closure_error(result) <= 1e-14


@settings(deadline=None, max_examples=40)
@given(
    keep=st.sampled_from(SUBSETS),
    layers=st.sampled_from([*LAYERS]),
    nodes=st.sampled_from([1, 2, 5, "left", "midpoint:2"]),
)
def test_any_question_is_answered_as_the_oracle_answers_it(keep, layers, nodes):
    assert_answers(ask(keep=keep, layers=LAYERS[layers][0], nodes=nodes), keep, layers, nodes)


@pytest.mark.parametrize("keep", SUBSETS, ids=lambda keep: "-".join(keep) or "nothing")
def test_every_subset_of_the_axes_sums_the_others(keep):
    assert_answers(ask(keep=tuple(reversed(keep)), layers=["2"], nodes=2), keep, "one", 2)


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_attribute_where_every_step_is_a_checkpoint(every):
    """Kernel and regularization together are all that moves the parameters."""
    run = record_example(6, make_optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.5))
    chosen = range(0, 7, every)
    result = ask([run.theta(s) for s in chosen], model=run.model, labels=list(chosen), nodes=3)
    whole = explaind.attribute(run, INPUTS, nodes=3, progress=False)
    assert result.step.values.tolist() == list(chosen)[1:]
    np.testing.assert_allclose(result.final, whole.final, rtol=0, atol=1e-15)
    if every == 1:
        # The declared update is the recorded one to rounding; so is its influence.
        np.testing.assert_allclose(result.change, whole.kernel + whole.regularization, rtol=0, atol=1e-14)
        np.testing.assert_allclose(result.residual, whole.residual, rtol=0, atol=1e-14)
    else:  # a chord: what is left is the difference of two paths, of small steps here
        steps = (whole.kernel + whole.regularization).values.reshape(3, 2, 2, 3, 3).sum(1)
        assert 1e-9 < float(abs(result.change.values - steps).max()) < 0.1 * float(abs(steps).max())


def test_nodes_are_chosen_segment_by_segment():
    result = ask(tolerance=1e-6)
    assert result.converged.all()
    assert (result.evaluations >= result.nodes).all()
    largest = float(abs(result.final - result.initial).max())
    assert float(abs(result.residual).max()) <= 1e-6 * largest + 1e-14
    rough = ask(tolerance=1e-12, max_nodes=2)
    assert not rough.converged.all()
    assert rough.nodes.values.tolist() == [2, 2, 2]
    assert closure_error(rough) <= 1e-14


def test_a_result_is_labelled():
    result = ask(labels=["a", "b", "c", "d"], nodes=2, layers=["2"])
    labels = {name: values.values.tolist() for name, values in result.coords.items()}
    assert labels == {
        "step": ["b", "c", "d"], "from": ["a", "b", "c"], "layer": ["2"], "test": [0, 1, 2], "output": [0, 1, 2],
    }  # fmt: skip
    assert result["from"].dims == ("step",)
    wanted = {
        "dtype": "torch.float64", "output": "Outputs", "first_step": "a", "last_step": "d", "layers_restricted": 1,
        "nodes_asked": "2",
    }  # fmt: skip
    assert {key: result.attrs[key] for key in wanted} == wanted
    assert "no train axis, no optimizer" in result.attrs["terms"]
    assert ask(nodes=1)["from"].values.tolist() == [0, 1, 2]
    summary = ask(nodes=3, keep=())
    assert (summary.attrs["nodes_used"], summary.attrs["nodes_evaluated"]) == (9, 9)
    assert summary.attrs["steps_not_converged"] == 0
    assert not summary.coords


def test_a_loss_is_explained():
    targets = torch.tensor([2, 0, 1])
    result = ask(output=Loss(targets), loss=nn.CrossEntropyLoss(), nodes=4)
    model = architecture()
    model.load_state_dict(states()[-1])
    loss = nn.functional.cross_entropy(model(INPUTS), targets, reduction="none")
    np.testing.assert_allclose(result.final.values[:, 0], loss.detach(), atol=1e-15)
    assert closure_error(result) <= 1e-14
    with pytest.raises(QuestionError, match="the run's loss is not known"):
        ask(output=Loss(targets))


def test_the_users_model_and_checkpoints_are_left_alone():
    model, points = architecture().train(), copy.deepcopy(states())
    before = copy.deepcopy(model.state_dict())
    ask(model=model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t, old[n]) for new, old in zip(states(), points, strict=True) for n, t in new.items())


def test_the_live_parameters_of_a_model_may_be_checkpoints():
    """state_dict(keep_vars=True) holds parameters that require gradients."""
    model = architecture()
    model.load_state_dict(states()[3])
    live = [*states()[:3], dict(model.named_parameters())]
    assert ask(live, nodes=1).identical(ask(nodes=1))


def test_a_progress_bar_is_shown_only_where_asked_for(capsys):
    ask(nodes=1)
    assert capsys.readouterr().out == ""
    ask(nodes=1, progress=True)
    assert "attributing" in capsys.readouterr().out


def test_single_precision_closes_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    run = record(
        tmp_path / "run", model, lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.9), torch.randn(20, 4),
        torch.randint(3, (20,)), steps=6,
    )  # fmt: skip
    result = ask([run.theta(s) for s in (0, 3, 6)], model=model, inputs=INPUTS.float())
    assert result.attrs["dtype"] == "torch.float32"
    assert closure_error(result) <= 1e-14
    np.testing.assert_array_equal(result.final, explaind.attribute(run, INPUTS.float(), progress=False).final)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_checkpoints_of_a_wrapped_model_are_those_of_the_plain_one(wrap):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    wrapped = wrap(model)
    points = [{n: t + 0.1 * k if t.is_floating_point() else t for n, t in model.state_dict().items()} for k in range(3)]
    names = dict(zip(wrapped.state_dict(), model.state_dict(), strict=True))
    named = [{n: point[names[n]] for n in names} for point in points]
    x = torch.ones(2, 3, dtype=torch.float64)
    expected = explaind.attribute_checkpoints(points, model, x, progress=False)
    assert explaind.attribute_checkpoints(named, wrapped, x, progress=False).identical(expected)
    assert explaind.attribute_checkpoints(points, wrapped, x, progress=False).identical(expected)


class Restless(nn.Module):
    """Functional dropout that is left on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x):
        return nn.functional.dropout(self.inner(x).tanh(), 0.5, training=True)


def test_a_model_that_draws_random_numbers_is_asked_with_a_seed():
    torch.manual_seed(0)
    models = [Restless() for _ in range(3)]
    thetas, inputs = [m.state_dict() for m in models], torch.randn(5, 4, dtype=torch.float64)

    def ask(**options):
        return explaind.attribute_checkpoints(thetas, models[0], inputs, nodes=16, progress=False, **options)

    with pytest.raises(QuestionError, match="random_state=0"):
        ask()
    result = ask(random_state=3)
    assert result.attrs["random_state"] == 3
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(torch.tensor(result.final.values), models[-1](inputs), rtol=1e-14, atol=0)
    assert float(abs(result.residual).max()) < 1e-9
