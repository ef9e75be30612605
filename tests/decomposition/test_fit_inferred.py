"""The inferred rule: it closes whatever trained, says how far to trust it, and is labelled wherever it goes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import CoefficientError, InferenceError, RuleNotFoundError, StoreError
from explaind_core.operators import Diagonal, Scalar
from explaind_core.rules.secant import Fitted, closed
from explaind_core.testing import record_example
from explaind_optimizers import MuonRule

INPUTS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


class Undeclared(torch.optim.SGD):
    """A subclass is another optimizer."""


class UndeclaredAdam(torch.optim.AdamW):
    pass


class Odd(torch.optim.Optimizer):
    """A step that no filter explains: it follows the sign of the parameters, whatever the gradient."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.sign(p))


def trained(kind=Undeclared, rule=None, steps=8, dtype=torch.float64, **options):
    options = options or {"lr": 0.1, "momentum": 0.9}
    rule = rule or explaind.InferredRule()
    return record_example(steps=steps, make_optimizer=lambda p: kind(p, **options), dtype=dtype, rule=rule)


def test_without_opting_in_an_undeclared_optimizer_is_refused():
    with pytest.raises(RuleNotFoundError, match="no registered rule speaks for the optimizer"):
        record_example(make_optimizer=lambda p: Undeclared(p, lr=0.1))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([Undeclared, UndeclaredAdam, Odd]),
    rule=st.builds(
        explaind.InferredRule,
        momentum=st.floats(0, 0.99),
        nesterov=st.booleans(),
        preconditioner=st.sampled_from(["identity", "quotient"]),
        decay=st.sampled_from(["none", "coupled", "decoupled"]),
        force=st.just(True),
    ),
)
def test_every_step_closes_whatever_is_assumed(kind, rule):
    for step in explaind.decompose(trained(kind, rule, steps=4, lr=0.1)):
        assert step.error < 1e-12
        assert step.correction >= 0


def test_the_right_assumption_needs_no_correction_and_a_wrong_one_is_refused():
    run = trained(rule=explaind.InferredRule(momentum=0.9))
    assert max(step.correction for step in explaind.decompose(run)) < 1e-12
    wrong = run.explained_by(explaind.InferredRule(momentum=0.0))
    with pytest.raises(InferenceError, match=r"its correction is above the bound") as caught:
        list(explaind.decompose(wrong))
    assert "step 2" in str(caught.value)  # the first one has no past
    forced = run.explained_by(explaind.InferredRule(momentum=0.0, force=True))
    assert max(step.correction for step in explaind.decompose(forced)) > 0.5


def test_the_kernel_of_the_right_assumption_is_that_of_the_declaration():
    inferred = trained(UndeclaredAdam, explaind.InferredRule(), lr=0.01, weight_decay=0.1, eps=1e-30)
    declared = record_example(
        steps=8, make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-30)
    )
    rule = explaind.InferredRule(momentum=0.9, preconditioner="quotient", decay="decoupled", bound=1e-9)
    pairs = zip(explaind.decompose(inferred.explained_by(rule)), explaind.decompose(declared), strict=True)
    for mine, theirs in pairs:
        for name, update in mine.updates.items():
            torch.testing.assert_close(update.kernel, theirs.updates[name].kernel, rtol=1e-10, atol=1e-12)
            expected = theirs.updates[name].regularization
            torch.testing.assert_close(update.regularization, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options", "momentum", "preconditioner", "decay"),
    [
        (Undeclared, {"lr": 0.1, "momentum": 0.9}, 0.9, "identity", "none"),
        (Undeclared, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.2}, 0.7, "identity", "coupled"),
        (UndeclaredAdam, {"lr": 0.01, "weight_decay": 0.2}, 0.9, "quotient", "decoupled"),
    ],
)
def test_fitting_finds_the_filter(kind, options, momentum, preconditioner, decay):
    rule = explaind.InferredRule.fit(trained(kind, steps=12, **options))
    assert rule.momentum == pytest.approx(momentum, abs=0.01)
    assert (rule.preconditioner, rule.decay, rule.nesterov) == (preconditioner, decay, False)
    assert not rule.force


def test_the_function_and_the_rules_own_method_are_one():
    @dataclass(frozen=True)
    class Mine(explaind.InferredRule):
        """A kind of its own, which the fitted rule must be of."""

    run = trained(steps=4)
    assert explaind.fit_inferred(run, steps=3, bound=0.2) == explaind.InferredRule.fit(run, steps=3, bound=0.2)
    assert type(explaind.fit_inferred(run, steps=3, kind=Mine)) is type(Mine.fit(run, steps=3)) is Mine


def test_nothing_fits_an_optimizer_that_ignores_its_gradient():
    run = trained(Odd, lr=0.01)
    rule = explaind.InferredRule.fit(run, steps=4)
    with pytest.raises(InferenceError):
        list(explaind.decompose(run.explained_by(rule)))


def test_the_label_goes_wherever_the_numbers_go():
    run = trained(rule=explaind.InferredRule(momentum=0.9))
    again = explaind.open_run(run.path, model=run.model)
    assert again.rule == explaind.InferredRule(momentum=0.9)  # the manifest knows it
    assert "InferredRule(momentum=0.9" in repr(again)
    result = explaind.attribute(again, INPUTS, keep=("step",), progress=False)
    assert result.attrs["inferred"] == 1
    assert "momentum=0.9" in result.attrs["rule"]
    assert result.correction.dims == ("step",)
    assert result.sizes["step"] == 8
    assert float(result.correction.max()) < 1e-12
    summed = explaind.attribute(again, INPUTS, keep=("layer",), progress=False)
    assert summed.attrs["correction"] == pytest.approx(float(result.correction.max()))
    check = explaind.verify(again, INPUTS, progress=False)
    assert "INFERRED" in str(check)
    assert check.correction is not None
    assert check.correction < 1e-12


def test_declared_runs_carry_no_such_label():
    run = record_example(steps=2)
    result = explaind.attribute(run, INPUTS, keep=("step",), progress=False)
    assert result.attrs["inferred"] == 0
    assert "correction" not in result
    assert "INFERRED" not in str(explaind.verify(run, INPUTS, progress=False))


@pytest.mark.parametrize(
    ("correction", "accepted"), [(0.0, True), (0.099, True), (0.101, False), (float("nan"), False)]
)
def test_a_correction_is_accepted_up_to_the_bound(correction, accepted):
    rule = explaind.InferredRule(bound=0.1)
    explaind.InferredRule(bound=0.1, force=True).check_correction(correction, 3)
    if accepted:
        rule.check_correction(correction, 3)
        return
    with pytest.raises(InferenceError, match=r"correction is above the bound[\s\S]*step 3"):
        rule.check_correction(correction, 3)


class Uneven(torch.optim.Optimizer):
    """Gradient descent that is a twentieth faster in every other entry."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                faster = torch.arange(p.numel(), dtype=p.dtype).view(p.shape) % 2
                p.sub_(group["lr"] * (1 + 0.05 * faster) * p.grad)


@pytest.mark.parametrize(("within", "preconditioner"), [(1.01, "identity"), (0.99, "quotient")])
def test_a_fit_compares_the_root_mean_square_with_the_bound(within, preconditioner):
    """The identity misses the same share of every step: its sum over all of them is no measure."""
    run = trained(Uneven, lr=0.1)
    plain = explaind.InferredRule(force=True)
    corrections = [step.correction for step in explaind.decompose(run.explained_by(plain))]
    mean = (sum(c**2 for c in corrections) / len(corrections)) ** 0.5
    assert 0.01 < mean < 0.03
    found = explaind.InferredRule.fit(run, bound=within * mean)
    assert found.preconditioner == preconditioner
    assert found.momentum == 0.0


def test_half_precision_is_refused():
    run = trained(UndeclaredAdam, explaind.InferredRule(momentum=0.9), dtype=torch.bfloat16, lr=0.01)
    with pytest.raises(InferenceError, match="half precision"):
        list(explaind.decompose(run))


@pytest.mark.parametrize(
    "arguments",
    [{"momentum": 1.0}, {"momentum": -0.1}, {"preconditioner": "magic"}, {"decay": "yes"}, {"bound": 0.0}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(CoefficientError):
        explaind.InferredRule(**arguments)


def test_a_manifest_with_foreign_settings_is_refused(tmp_path):
    run = trained(steps=2)
    run.manifest["rule"]["settings"] = {"momentum": 0.9, "command": "rm"}
    run.store.write_json("manifest.json", run.manifest)
    with pytest.raises(StoreError, match="settings"):
        explaind.open_run(run.path)


def test_maximisers_are_followed_uphill():
    rule = explaind.InferredRule(momentum=0.9, preconditioner="quotient")  # which is never negative
    run = trained(rule=rule, lr=0.1, momentum=0.9, maximize=True)
    for step in explaind.decompose(run):
        assert step.correction < 1e-12


# ------------------------------------------------------------------ the secant itself
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), shape=st.sampled_from([(), (3,), (2, 4)]))
def test_a_secant_maps_what_was_read_out_to_the_update(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    out, update, weight, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    operator, missed = closed(Diagonal(weight), out, update)
    torch.testing.assert_close(operator.apply(out), update, rtol=1e-12, atol=1e-12)
    assert missed == pytest.approx(float((update - weight * out).norm()))
    orthogonal = other - out * (out * other).sum() / out.square().sum()
    torch.testing.assert_close(operator.apply(orthogonal), weight * orthogonal, rtol=1e-9, atol=1e-9)


def test_where_nothing_was_read_out_what_moved_stays_an_error():
    operator, missed = closed(Scalar(1.0), torch.zeros(2), torch.ones(2))
    assert operator == Scalar(1.0)
    assert missed == pytest.approx(2**0.5)


def test_a_fitted_preconditioner_must_be_fitted():
    with pytest.raises(CoefficientError, match="before it was fitted"):
        Fitted("identity").apply(torch.ones(1))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_reports_the_size_of_its_secant(tmp_path):
    """bfloat16 is what it corrects: 1.4e-2 where the gradient has full rank, 0 would mean that it is not used."""
    assert MuonRule.closed_by_secant
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False).double()
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    with explaind.Recorder(tmp_path / "run", model, optimizer) as recorder:
        for _ in range(5):
            x, y = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            recorder.batch(x, y, ids=range(64))
            optimizer.step()
    steps = list(explaind.decompose(explaind.open_run(tmp_path / "run", model=model)))
    assert all(5e-3 < step.correction < 5e-2 for step in steps)
    assert max(step.error for step in steps) < 1e-12
