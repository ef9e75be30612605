"""Questions about functions that couple their samples, draw random numbers, or that torch.func refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from support.unusual_models import unusual

INPUTS = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Couples its samples, or draws random numbers, in training and evaluation alike."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), kind

    def forward(self, x):
        h = self.a(x).tanh()
        if self.kind == "coupled":
            h = h - 0.5 * h.mean(0, keepdim=True)
        if self.kind == "random":
            h = nn.functional.dropout(h, 0.3)
        return self.b(h)


def recorded(path, model, inputs=None, optimizer=None):
    """Four steps of training, and the run."""
    initial, loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    optimizer = (optimizer or (lambda ps: torch.optim.AdamW(ps, lr=0.05)))(model.parameters())
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        for s in range(4):
            drawn = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            x = drawn if inputs is None else inputs
            targets = torch.arange(len(x[0] if isinstance(x, tuple) else x)) % 3
            optimizer.zero_grad()
            loss(model(*x) if isinstance(x, tuple) else model(x), targets).backward()
            recorder.batch(x, targets, ids=torch.arange(len(targets)))
            optimizer.step()
    return explaind.open_run(path, model=initial.eval())


@pytest.fixture
def coupled(tmp_path):
    torch.manual_seed(0)
    return recorded(tmp_path / "run", Net("coupled").double())


@pytest.fixture
def drawing(tmp_path):
    torch.manual_seed(0)
    return recorded(tmp_path / "run", Net("random").double())


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


QUESTIONS = [
    {"keep": ("step", "layer", "test", "output"), "strategy": "forward", "nodes": 4},
    {"keep": ("step", "layer", "test", "output"), "strategy": "reverse", "nodes": 4},
    {"keep": ("step", "layer", "test", "output"), "strategy": "adjoint", "nodes": 4},
    {"keep": ("step", "layer", "test", "output"), "strategy": "forward", "nodes": 4, "chunk": 2},
    {"keep": ("step", "layer", "test", "output"), "strategy": "reverse", "nodes": 4, "chunk": 1, "memory": 10_000},
]


@pytest.mark.parametrize("kind", ["coupled", "random"])
@pytest.mark.parametrize("rows", [None, [6, 1, 2]])
def test_all_strategies_agree_whatever_is_asked_at_a_time(request, kind, rows):
    run = request.getfixturevalue("coupled" if kind == "coupled" else "drawing")
    options = {"random_state": 3} if kind == "random" else {}
    results = [
        explaind.attribute(run, INPUTS, test=rows, progress=False, **options, **question) for question in QUESTIONS
    ]
    for result in results:
        same(result.kernel, results[0].kernel)
        same(result.regularization, results[0].regularization)
        same(result.final, results[0].final)
        assert explaind.closure_error(result) < 1e-12
        assert "test_samples_together" in result.attrs
        assert result.attrs.get("random_state") == options.get("random_state")
    model = copy.deepcopy(run.model)
    model.load_state_dict(run.theta(4))
    with torch.no_grad():
        torch.manual_seed(3)
        same(results[0].final, model(INPUTS)[slice(None) if rows is None else rows])
    whole = explaind.attribute(run, INPUTS, progress=False, **options, **QUESTIONS[0])
    same(results[1].kernel, whole.kernel if rows is None else whole.kernel.isel(test=rows))


def test_training_samples_of_coupled_functions_add_up_to_the_kernel(coupled):
    ask = {"nodes": 3, "progress": False}
    summed = explaind.attribute(coupled, INPUTS, keep=("test", "output"), **ask)
    for strategy in ("adjoint", "features"):
        kept = explaind.attribute(coupled, INPUTS, keep=("train", "test", "output"), strategy=strategy, **ask)
        same(kept.kernel.sum("train"), summed.kernel)
    no_test = explaind.attribute(coupled, INPUTS, keep=("train", "output"), **ask)
    same(no_test.kernel.sum("train"), summed.kernel.sum("test"))


def test_windows_chords_and_results_on_disk_of_coupled_functions(coupled, tmp_path):
    ask = {"nodes": 3, "progress": False, "keep": ("step", "test", "output")}
    plain = explaind.attribute(coupled, INPUTS, chords=2, **ask)
    stored = explaind.attribute(coupled, INPUTS, chords=2, out=tmp_path / "result.zarr", **ask)
    again = explaind.attribute(coupled, INPUTS, chords=2, out=tmp_path / "result.zarr", **ask)
    same(stored.kernel, plain.kernel)
    for said in ("derivatives", "test_samples_together"):
        assert again.attrs[said] == stored.attrs[said] == plain.attrs[said]
    assert explaind.plan(coupled, INPUTS, chunk=2, nodes=1).chunks == 1
    assert explaind.verify(coupled, INPUTS, progress=False).max_error < 1e-4


def test_verify_refuses_a_random_function_and_takes_a_seed(drawing):
    with pytest.raises(QuestionError, match="no function of the parameters") as error:
        explaind.verify(drawing, INPUTS, progress=False)
    assert "torch (cpu)" in error.value.got
    check = explaind.verify(drawing, INPUTS, random_state=1, nodes=8, progress=False)
    assert check.max_error < 1e-9
    assert check.result.attrs["random_state"] == 1


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", 2**63])
def test_what_is_no_seed_is_refused(coupled, seed):
    with pytest.raises(QuestionError, match="random_state is no seed"):
        explaind.attribute(coupled, INPUTS, random_state=seed)


WAYS = {
    "checkpoint": "autograd", "checkpoint, reentrant": "autograd", "packed gru": "autograd", "old function": "autograd",
    "numpy function": "autograd", "weight norm": "autograd", "cdist": "autograd",
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_what_torch_func_refuses_is_answered_by_all_strategies(tmp_path, name):
    model, inputs = unusual(name)
    asking = inputs.clone().requires_grad_() if name == "checkpoint, reentrant" else inputs  # or nothing is trained
    run = recorded(tmp_path / "run", model.train(), asking)
    ask = {"nodes": 6, "keep": ("step", "layer", "test", "output"), "progress": False}
    results = [explaind.attribute(run, inputs, strategy=s, **ask) for s in ("forward", "reverse", "adjoint")]
    for result in results:
        same(result.kernel, results[0].kernel)
        assert explaind.closure_error(result) < 1e-12
        assert float(abs(result.residual).max()) < 1e-5
    assert WAYS[name] in {result.attrs["derivatives"] for result in results}
    assert explaind.verify(run, inputs, nodes=6, progress=False).max_error < 1e-5


def test_what_is_vectorised_says_so(coupled):
    assert explaind.attribute(coupled, INPUTS, progress=False).attrs["derivatives"] == "torch.func, vectorised"
