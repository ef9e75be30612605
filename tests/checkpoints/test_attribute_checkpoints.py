"""attribute_checkpoints() against a dense oracle, against attribute(), and what it refuses."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from functools import lru_cache

import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import Loss
from explaind_core.attribution.attribute import summed
from explaind_core.checkpoints import state_dicts as statedicts
from explaind_core.checkpoints.attribute_checkpoints import AXES, attribute_checkpoints
from explaind_core.errors import LayerError, NonFiniteError, QuestionError, StoreError
from explaind_core.testing import record_example
from support.attribution_oracles import record

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
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


def architecture() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@lru_cache
def states(count=4) -> list[dict[str, Tensor]]:
    """Some points of the space of parameters, at no small distance."""
    torch.manual_seed(0)
    return [{n: t.clone() for n, t in architecture().state_dict().items()} for _ in range(count)]


def closure_error(result: xr.Dataset) -> float:
    return float(abs(summed(result, ("change", "residual", "omitted")) - result.final).max())


def ask(points=None, *, model=None, inputs=INPUTS, **question) -> xr.Dataset:
    points = states() if points is None else points
    return attribute_checkpoints(points, model or architecture(), inputs, **({"progress": False} | question))


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


# ---------------------------------------------------------------------- files
def save(folder, points=None, name="step-{}.safetensors", numbers=(2, 9, 10, 100)):
    for number, state in zip(numbers, points or states(), strict=True):
        safetensors.torch.save_file(state, folder / name.format(number))
    return folder


@pytest.mark.parametrize("name", ["step-{}.safetensors", "7b-{}-of3.safetensors", "{:06d}.safetensors"])
def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path, name):
    result = ask(save(tmp_path, name=name), nodes=2)
    assert result.identical(ask(labels=[2, 9, 10, 100], nodes=2))
    assert result.identical(ask(str(tmp_path), nodes=2))


def test_other_files_beside_them_do_not_matter(tmp_path):
    (save(tmp_path) / "config.json").write_text("{}")
    assert ask(tmp_path, nodes=1).step.values.tolist() == [9, 10, 100]
    assert ask(tmp_path, nodes=1, labels="abcd").step.values.tolist() == ["b", "c", "d"]


def test_paths_are_taken_in_the_order_given(tmp_path):
    paths = [save(tmp_path) / f"step-{s}.safetensors" for s in (2, 9, 10, 100)]
    assert ask(paths, nodes=2).identical(ask(nodes=2))
    assert ask([str(path) for path in paths[::-1]], nodes=2).identical(ask(states()[::-1], nodes=2))


def test_at_most_two_checkpoints_are_held_at_a_time(tmp_path, monkeypatch):
    read, alive = statedicts.read_checkpoint, []

    def watched(source, label):
        state = {n: t.clone() for n, t in read(source, label).items()}  # not a view of a file that is mapped
        gc.collect()
        held = sum(any(ref() is not None for ref in refs) for refs in alive)
        assert held < 2, "a third checkpoint is read while two are held"
        alive.append([weakref.ref(t) for t in state.values()])
        return state

    monkeypatch.setattr(statedicts, "read_checkpoint", watched)
    reference = ask(nodes=1)
    count = len(alive)
    assert ask(save(tmp_path), labels=range(4), nodes=1).identical(reference)
    assert len(alive) == 2 * count >= 16


class Buffered(nn.Module):
    """Running statistics, a buffer that is not stored, and tied weights."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((4,), 3.0), persistent=False)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


@pytest.fixture
def buffered():
    torch.manual_seed(0)
    model = Buffered().double()
    found = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.train()(torch.randn(8, 4, dtype=torch.float64))
        found.append(copy.deepcopy(model.state_dict()))
    return model.eval(), found


def test_buffers_are_those_of_the_last_checkpoint(buffered, tmp_path):
    model, found = buffered
    result = ask(found, model=Buffered().double(), nodes=3)
    np.testing.assert_allclose(result.final, model(INPUTS).detach(), atol=1e-15)
    model.load_state_dict(found[0] | {n: t for n, t in found[-1].items() if "running" in n})
    np.testing.assert_allclose(result.initial, model(INPUTS).detach(), atol=1e-15)
    assert closure_error(result) <= 1e-13
    # A tied parameter counts once, under its first name; safetensors files hold it once, too.
    assert result.layer.values.tolist() == ["first", "norm", "second"]
    untied = [{n: t for n, t in state.items() if n != "second.weight"} for state in found]
    assert ask(save(tmp_path, untied, numbers=(0, 1, 2)), model=Buffered().double(), nodes=3).identical(result)


def test_buffers_may_be_given(buffered):
    model, found = buffered
    statistics = {n: torch.rand_like(t) + 0.5 for n, t in found[0].items() if "running" in n}
    result = ask(found, model=Buffered().double(), nodes=1, buffers=statistics)
    model.load_state_dict(found[-1] | statistics)
    np.testing.assert_allclose(result.final, model(INPUTS).detach(), atol=1e-15)
    bare = [{n: t for n, t in state.items() if "running" not in n and "tracked" not in n} for state in found]
    with pytest.raises(StoreError, match="the last checkpoint does not hold a buffer of the model") as error:
        ask(bare, model=Buffered().double(), buffers=statistics)
    assert error.value.where == "checkpoint 2, buffer 'norm.num_batches_tracked'"
    count = {"norm.num_batches_tracked": torch.tensor(1)}
    assert ask(bare, model=Buffered().double(), nodes=1, buffers=statistics | count).equals(result)


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


# ---------------------------------------------------------------------- what is refused
def changed(index, name, value):
    points = [dict(state) for state in states()]
    if value is None:
        del points[index][name]
    else:
        points[index][name] = value
    return points


NAN = torch.tensor([0, torch.nan, 0], dtype=torch.float64)
REFUSED = {
    "shape": (
        lambda: changed(2, "2.bias", torch.zeros(4).double()), StoreError, "checkpoint 2 is of another model",
        "entry '2.bias'", ((3,), "torch.float64"), ((4,), "torch.float64"),
    ),
    "dtype": (
        lambda: changed(1, "2.bias", torch.zeros(3)), StoreError, "checkpoint 1 is of another model",
        "entry '2.bias'", ((3,), "torch.float64"), ((3,), "torch.float32"),
    ),
    "missing": (
        lambda: changed(0, "0.weight", None), StoreError, "checkpoint 0 is of another model",
        "entry '0.weight'", ((5, 4), "torch.float64"), "no such entry",
    ),
    "unknown": (
        lambda: changed(3, "4.weight", torch.zeros(3)), StoreError, "checkpoint 3 is of another model",
        "entry '4.weight'", "no such entry", "an entry that the model does not have",
    ),
    "nan": (
        lambda: changed(1, "2.bias", NAN), NonFiniteError, "checkpoint 1 holds a NaN or an infinity",
        "parameter '2.bias'", None, None,
    ),
    "one": (lambda: states()[:1], QuestionError, "a path needs two checkpoints", "checkpoints", "at least 2", 1),
    "none": (lambda: [], QuestionError, "a path needs two checkpoints", "checkpoints", "at least 2", 0),
    "a state dict": (
        lambda: states()[0], QuestionError, "these are no checkpoints", "checkpoints",
        "a folder, or a list of state dicts or paths", "dict",
    ),
    "numbers": (
        lambda: [states()[0], 1], QuestionError, "these are no checkpoints", "checkpoints",
        "a folder, or a list of state dicts or paths", ["dict", "int"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoints_that_make_no_path_are_refused(name):
    make, kind, what, where, wanted, got = REFUSED[name]
    with pytest.raises(kind) as error:
        ask(make())
    assert error.value.what.startswith(what)
    assert (error.value.where, error.value.expected, error.value.got) == (where, wanted, got)


def test_all_checkpoints_are_checked_before_any_work_is_done(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the model has run"))
    with pytest.raises(NonFiniteError):
        ask(changed(3, "2.bias", NAN))


def test_an_output_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="the explained function is NaN or infinite") as error:
        ask(output=lambda call, inputs: call(inputs) * torch.inf, labels="abcd")
    assert error.value.where == "checkpoint a"


FILES = {
    "no folder": (lambda folder: folder / "nowhere", "there is no such folder of checkpoints"),
    "a file": (lambda folder: save(folder) / "step-2.safetensors", "there is no such folder of checkpoints"),
    "no number": (
        lambda folder: save(save(folder), states()[:1], "last.safetensors", [0]),
        "the names of the checkpoints do not tell their order",
    ),
    "two kinds": (
        lambda folder: save(save(folder, states()[:2], numbers=(1, 2)), states()[2:], "average-{}.safetensors", (3, 4)),
        "the names of the checkpoints do not tell their order",
    ),
    "two numbers": (
        lambda folder: save(folder, numbers=("1-4", "2-3", "3-2", "4-1")),
        "the names of the checkpoints do not tell their order",
    ),
    "the same number": (
        lambda folder: save(save(folder, states()[:2], "{}.safetensors", (1, 2)), states()[:2],
                            "0{}.safetensors", (1, 2)),
        "the names of the checkpoints do not tell their order",
    ),
    "one file": (lambda folder: save(folder, states()[:1], numbers=[1]), "a path needs two checkpoints"),
    "an empty folder": (lambda folder: folder, "a path needs two checkpoints"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_folders_that_tell_no_order_are_refused(tmp_path, name):
    make, what = FILES[name]
    with pytest.raises((StoreError, QuestionError)) as error:
        ask(make(tmp_path))
    assert error.value.what == what
    assert error.value.remedy is not None or isinstance(error.value, QuestionError)


@pytest.mark.parametrize("damage", ["missing", "truncated", "not safetensors", "pickled"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage):
    paths = [save(tmp_path) / f"step-{s}.safetensors" for s in (2, 9)]
    if damage == "missing":
        paths[1].unlink()
    elif damage == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-5])
    elif damage == "not safetensors":
        paths[1].write_text("nothing")
    else:
        torch.save(states()[1], paths[1])
    with pytest.raises(StoreError, match="checkpoint 1 cannot be read") as error:
        ask(paths)
    assert error.value.where == paths[1]
    assert error.value.expected == "a safetensors file"


def test_pickled_checkpoints_are_never_opened(tmp_path):
    torch.save(states()[0], save(tmp_path) / "step-1.pt")
    with pytest.raises(StoreError, match="the folder holds checkpoints that are not safetensors files") as error:
        ask(tmp_path)
    assert error.value.got == ["step-1.pt"]
    assert "would run code" in error.value.remedy


@pytest.mark.parametrize("labels", [[1, 2, 3], [1, 2, 3, 3], []])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(QuestionError, match="the labels are not one for each checkpoint") as error:
        ask(labels=labels)
    assert (error.value.expected, error.value.got) == ("4 different ones", labels)


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (("train",), "checkpoints alone have no axis 'train'"),
        ("parameter", "checkpoints alone have no axis 'parameter'"),
        (("step", "step"), "an axis is named twice"),
    ],
)
def test_axes_that_checkpoints_do_not_have_are_refused(keep, what):
    with pytest.raises(QuestionError) as error:
        ask(keep=keep)
    assert error.value.what == what


def test_other_arguments_are_checked_too():
    with pytest.raises(LayerError, match="matches no parameter"):
        ask(layers=["7"])
    with pytest.raises(QuestionError, match="nodes is not a number of nodes"):
        ask(nodes=0)
    with pytest.raises(QuestionError, match="the test inputs are not a batch"):
        ask(inputs=torch.zeros(0, 4))


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
