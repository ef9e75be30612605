"""A result whose updates are not explained to rounding is refused; what rounding itself makes of them is no error."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.decomposition import check_update
from explaind_core.decomposition.split import UpdateSplit
from explaind_core.decomposition.update_error import UpdateError, distance, update_errors
from explaind_core.errors import CoefficientError, QuestionError
from explaind_core.testing import record_example

STRATEGIES = {
    "forward": ("step", "layer", "test", "output"),
    "reverse": ("step", "parameter", "test"),
    "features": ("step", "train", "test"),
    "adjoint": ("train", "test"),
}


class OffBy(explaind.UpdateRule):
    """SGD's rule, its learning rate (of one layer) off by a factor."""

    optimizers = ("torch.optim.sgd.SGD",)
    options = frozenset(
        {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused"}
    )
    only = ""
    factor = 1.0
    at: int | None = None  # of which step alone, where it is given

    def coefficients(self, step):
        wrong = step.name.startswith(self.only) and self.at in (None, step.step)
        factor = self.factor if wrong else 1.0
        return explaind.StepCoefficients(preconditioner=factor * step.hyper["lr"])


def off_by(factor, only="", at=None):
    return type("Rule", (OffBy,), {"factor": factor, "only": only, "at": at})()


def trained(path, rule, dtype=torch.float64, steps=3, lr=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    initial, loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    inputs, targets = torch.randn(20, 4, dtype=dtype), torch.randint(3, (20,))
    with explaind.Recorder(path, model, optimizer, loss, rule=rule) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            recorder.batch(inputs, targets, ids=range(20))
            optimizer.step()
    return explaind.open_run(path, model=initial, rule=rule), inputs[:2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wrong_rule_is_refused_by_every_strategy(tmp_path, strategy):
    run, inputs = trained(tmp_path / "run", off_by(10.0, only="2."))
    ask = {"keep": STRATEGIES[strategy], "strategy": strategy, "progress": False, "nodes": 1}
    with pytest.raises(CoefficientError, match=r"step 1, parameter '2\.(weight|bias)'") as refused:
        explaind.attribute(run, inputs, **ask)
    assert "max_update_error" in str(refused.value)
    told = explaind.attribute(run, inputs, **ask, max_update_error=10.0)
    assert 5 < float(told.update_error.max() if "update_error" in told else told.attrs["update_error"]) < 9.1
    assert explaind.closure_error(told) < 1e-12
    with pytest.raises(CoefficientError):
        explaind.attribute(run, inputs, **ask, max_update_error=1.0)


def test_scores_refuse_a_wrong_rule(tmp_path):
    run, inputs = trained(tmp_path / "run", off_by(10.0))
    for ask in (explaind.similarity, explaind.parameter_importance, explaind.kernel_slices):
        with pytest.raises(CoefficientError, match="does not explain"):
            ask(run, inputs, nodes=1, progress=False)
        ask(run, inputs, nodes=1, progress=False, max_update_error=math.inf)


def test_verify_tells_a_wrong_rule(tmp_path):
    run, inputs = trained(tmp_path / "run", off_by(10.0))
    assert explaind.verify(run, inputs, progress=False).update_error == pytest.approx(9.0)


def test_verify_tells_the_worst_step_and_not_their_mean(tmp_path):
    run, inputs = trained(tmp_path / "run", off_by(10.0, at=2), steps=4)
    assert explaind.verify(run, inputs, progress=False).update_error == pytest.approx(9.0)


class Drifting(torch.optim.SGD):
    """Moves parameters that have no gradient, too: by a thousandth of themselves."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(0.999)


class DriftingRule(OffBy):
    optimizers = (f"{Drifting.__module__}.{Drifting.__qualname__}",)


def test_a_parameter_that_an_optimizer_moves_without_a_gradient_is_an_error(tmp_path):
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(), nn.CrossEntropyLoss()
    optimizer = Drifting(model.parameters(), lr=0.1)
    inputs, targets = torch.randn(8, 4).double(), torch.randint(2, (8,))
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, rule=DriftingRule()) as recorder:
        for s in range(3):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            if s == 1:
                model[0].weight.grad = None
            recorder.batch(inputs, targets, ids=range(8))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model, rule=DriftingRule())
    steps = list(explaind.decompose(run))
    moved = float((steps[1].theta["0.weight"] - steps[1].theta_before["0.weight"]).norm())
    told = {e.name: e for e in steps[1].errors}["0.weight"]
    assert (told.updated, told.missed, told.moved) == (False, moved, moved)
    whole = sum(float((steps[1].theta[n] - steps[1].theta_before[n]).norm()) ** 2 for n in steps[1].theta) ** 0.5
    assert steps[1].error == pytest.approx(moved / whole)
    assert max(steps[0].error, steps[2].error) < 1e-12
    assert explaind.verify(run, inputs, progress=False).update_error == pytest.approx(moved / whole)
    with pytest.raises(CoefficientError, match=r"step 2, parameter '0.weight'"):
        explaind.attribute(run, inputs, progress=False)


@pytest.mark.parametrize(
    ("dtype", "factor", "accepted"),
    [
        (torch.float64, 1 + 1e-9, True), (torch.float64, 1 + 1e-7, False),
        (torch.float32, 1 + 1e-4, True), (torch.float32, 1 + 1e-3, False),
    ],
)  # fmt: skip
def test_what_rounding_could_have_done_is_accepted_and_no_more(tmp_path, dtype, factor, accepted):
    run, inputs = trained(tmp_path / "run", off_by(factor), dtype)
    if accepted:
        explaind.attribute(run, inputs, progress=False)
        return
    with pytest.raises(CoefficientError, match="does not explain"):
        explaind.attribute(run, inputs, progress=False)


@pytest.mark.parametrize(("optimizer", "dtype"), [
    (torch.optim.AdamW, torch.float64), (torch.optim.AdamW, torch.float32), (torch.optim.RMSprop, torch.float32),
    (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1), torch.float32),
])  # fmt: skip
def test_steps_below_the_rounding_of_the_parameters_are_explained(tmp_path, optimizer, dtype):
    """A schedule that falls to almost nothing: the last updates are smaller than eps |theta|, or rounded to zero."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 5, dtype=dtype), torch.randint(3, (64,))
    model, loss = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype), nn.CrossEntropyLoss()
    made = optimizer(model.parameters(), lr=1e-2)
    factor = 0.65 if dtype == torch.float32 else 0.4
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda s: factor**s)
    with explaind.Recorder(tmp_path / "run", model, made, loss) as recorder:
        for _ in range(60):
            ids = torch.randint(64, (8,))
            made.zero_grad()
            loss(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            made.step()
            schedule.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    plain = [e.missed / e.moved for s in explaind.decompose(run) for e in s.errors if e.moved]
    assert max(plain) > 1e-2  # relative to the update alone, it would be an error
    check = explaind.verify(run, inputs[:3], nodes=4, progress=False)
    assert check.update_error < 1e-3
    assert check.agreement == 1.0
    result = explaind.attribute(run, inputs[:3], progress=False)
    assert explaind.closure_error(result) < 1e-12 * max(1, float(abs(result.final).max()))


def step(missed, updated=True):
    template = next(explaind.decompose(record_example(steps=1)))
    error = UpdateError("weight", missed, 1e-3, 2.0, torch.finfo(torch.float32).eps, updated)
    return replace(template, errors=(error,), error=distance([error])[0])


def test_just_inside_and_just_outside():
    allowed = step(0.0).errors[0].allowed
    assert allowed == pytest.approx(2**-11.5 * 1e-3 + 8 * 2**-23 * 2.0)
    check_update(step(0.99 * allowed), None, "a rule")
    with pytest.raises(CoefficientError, match="step 1, parameter 'weight', a rule"):
        check_update(step(1.01 * allowed), None, "a rule")
    with pytest.raises(CoefficientError):
        check_update(step(math.nan), None, "a rule")
    error = step(1e-4).error
    check_update(step(1e-4), 1.01 * error, "a rule")
    with pytest.raises(CoefficientError, match="at most"):
        check_update(step(1e-4), 0.99 * error, "a rule")


def test_a_parameter_that_moved_without_an_optimizer_is_named():
    with pytest.raises(CoefficientError, match="no optimizer updated"):
        check_update(step(1e-3, updated=False), None, "a rule")


def test_the_unit_of_an_error():
    eps = 2.0**-52
    plain = UpdateError("a", missed=3.0, moved=6.0, size=1.0, eps=eps)
    assert distance([plain]) == (0.5, eps / 6)
    tiny = UpdateError("a", missed=eps, moved=eps, size=1.0, eps=eps)
    assert distance([tiny]) == (1 / 4096, 1 / 4096)
    assert distance([UpdateError("a", 0.0, 0.0, 1.0, eps)]) == (0.0, 1 / 4096)
    assert distance([UpdateError("a", 1.0, 0.0, 0.0, eps)])[0] == math.inf
    assert distance([UpdateError("a", 0.0, 0.0, 0.0, eps)]) == distance([]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("kernel", "moved", "size"), [(3.0, 3.0, 5.0), (2.0, 3.0, 5.0), (1.0, 0.0, 5.0), (0.0, 0.0, 0.0)]
)
def test_the_size_of_a_parameter_is_told_where_anything_is_to_be_measured(kernel, moved, size):
    """It moved, or should have: explained or not. What stood still, as declared, needs none."""
    after, zero = torch.tensor([3.0, 4.0]), torch.zeros(2, dtype=torch.float64)
    step, declared = (torch.tensor([value, 0.0], dtype=torch.float64) for value in (moved, kernel))
    before = after - step.float()
    (found,) = update_errors({"a": before}, {"a": after}, {"a": UpdateSplit(declared, zero, None, step)})
    assert found == UpdateError("a", abs(kernel - moved), moved, size, 2.0**-23)


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_no_such_limit(wrong):
    with pytest.raises(QuestionError, match="max_update_error"):
        explaind.attribute(record_example(steps=1), torch.zeros(1, 4).double(), max_update_error=wrong)
