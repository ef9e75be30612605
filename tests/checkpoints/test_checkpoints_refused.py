"""What attribute_checkpoints() refuses: checkpoints of another model, folders without an order, unknown axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explaind_core.errors import LayerError, NonFiniteError, QuestionError, StoreError
from support.checkpoint_points import ask, save, states


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
