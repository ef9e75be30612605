"""Rules for optimizers of other packages: through the conformance kit, and what only they need."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.conformance.search import ConformanceError, check_trials
from explaind_core.naming import qualified_name
from explaind_core.plugins import default_registry
from explaind_core.rules.rule import RecordedStep
from explaind_core.testing import check_update_rule, record_example
from explaind_optimizers import LARSRule, ProdigyRule, ShampooRule, SOAPRule, SophiaGRule, SophiaHRule
from explaind_optimizers.trials_elsewhere import TABLE

FAMILIES = [(name, point) for name, e in TABLE.items() for point in range(1 + e.elsewhere)]


def kind_of(name):
    pytest.importorskip(TABLE[name].path.partition(":")[0])
    return TABLE[name].kind()


def check(name, point, max_examples):
    kind_of(name)
    return check_trials(TABLE[name].rule(), TABLE[name].trials(name)[point], max_examples=max_examples)


@pytest.mark.parametrize(("name", "point"), FAMILIES)
def test_the_declaration_is_exact(name, point):
    report = check(name, point, max_examples=25 if point == 0 else 12)
    assert report.one_step <= TABLE[name].tolerance
    assert report.store == 0
    assert report.cases >= 15
    assert report.refused == 0
    # Reported: rounding, times whatever makes the family's tolerance in double precision larger than 1e-14.
    assert report.one_step_float32 < (1e-5 if TABLE[name].tolerance == 1e-14 else 1e-1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "point"), FAMILIES)
def test_the_declaration_is_exact_in_the_long_run(name, point):
    assert check(name, point, max_examples=250).one_step <= TABLE[name].tolerance


def test_the_plugin_tells_the_kit_how_to_draw():
    pytest.importorskip("pytorch_optimizer")
    names = [trials.name for trials in default_registry().trials_for(SOAPRule())]
    assert names == ["SOAP", "SOAP, small eps", "SOAP, merged axes"]


# ------------------------------------------------------------------ options
#: Kernels; arguments that only name a distribution of noise; what the drawing itself replaces.
UNDRAWN = {"foreach", "use_triton", "num_samples", "hessian_distribution", "fsdp_in_use"}


@pytest.mark.parametrize("name", sorted({e.path: n for n, e in TABLE.items()}.values()))
def test_every_option_of_the_constructor_is_modelled_or_refused_and_drawn(name):
    kind, entry = kind_of(name), TABLE[name]
    options = {n for n, p in inspect.signature(kind).parameters.items() if p.kind != p.VAR_KEYWORD} - {"params"}
    # Kernels that are kept out of the groups, and not used.
    assert options - entry.rule.options - set(entry.rule.fixed) <= {"use_triton", "foreach"}
    drawn = set().union(*({*e.hyper, *e.scheduled} for e in TABLE.values() if e.path == entry.path))
    assert options - drawn <= UNDRAWN


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("Lion", {"maximize": True}),
        ("Lamb", {"maximize": True, "pre_norm": True, "max_grad_norm": 0.1}),
        ("Lamb", {"rectify": True, "n_sma_threshold": 4, "degenerated_to_sgd": True, "betas": (0.9, 0.95)}),
        ("LaProp", {"centered": True, "steps_before_using_centered": 1}),
        ("Shampoo", {"preconditioning_compute_steps": 2}),
    ],
)
def test_options_that_the_optimizer_keeps_aside_are_recorded_and_replayed(path, options):
    """pytorch_optimizer keeps them as attributes: the groups do not tell."""
    kind = getattr(pytest.importorskip("pytorch_optimizer"), path)
    run = record_example(steps=6, make_optimizer=lambda p: kind(p, lr=0.05, **options))
    for split in explaind.decompose(run):
        assert split.drift == 0
        assert split.error <= 1e-10
    recorded = run.groups(1)[0]
    assert {name: recorded[name] for name in options} == options


@pytest.mark.parametrize("option", [(ProdigyRule, "fsdp_in_use"), (SophiaGRule, "capturable")])
def test_what_cannot_be_seen_is_refused_by_name(option):
    rule, name = option
    with pytest.raises(explaind.errors.UnsupportedOptionError, match=name):
        rule().check_options({name: True}, [name])


@pytest.mark.parametrize("name", ["AdamWScheduleFreeClosure", "SGDScheduleFreeClosure", "ScheduleFreeWrapper"])
def test_variants_whose_gradient_point_is_inside_step_have_no_rule(name):
    kind = getattr(pytest.importorskip("schedulefree"), name)
    assert qualified_name(kind) not in {n for r in default_registry().rules() for n in r.rule.optimizers}


# ------------------------------------------------------------------ runs that begin with a used optimizer
@pytest.mark.parametrize("name", [n for n, e in TABLE.items() if e.rule.filter_states and e.adapted is None])
def test_the_named_states_are_the_filters_own(name):
    kind, entry = kind_of(name), TABLE[name]
    options = {"lr": 0.02} | ({"merge_dims": True, "max_precondition_dim": 2} if "merged" in name else {})

    def used(parameters):
        parameters = list(parameters)
        optimizer = kind(parameters, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            optimizer.step()
        return optimizer

    run = record_example(steps=3, make_optimizer=used)
    splits = list(explaind.decompose(run))
    assert max(split.error for split in splits) < 1e-9
    if name not in ("Shampoo", "SGDW", "QHM", "SignSGD"):  # these have no momentum by default
        assert any(update.prehistory is not None for update in splits[0].updates.values())
    assert entry.rule.filter_states


# ------------------------------------------------------------------ Sophia
class SophiaG(torch.optim.Optimizer):
    """The authors' optimizer in a few lines; the loop updates its Hessian between steps, from gradients of its own."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, maximize=False):
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def update_hessian(self, seed, bs=5120):
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
                    h, beta2 = self.state[p]["hessian"], group["betas"][1]
                    h.mul_(beta2).add_(drawn.square(), alpha=(1 - beta2) / bs)

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group in self.param_groups:
            beta1, _ = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "hessian": torch.zeros_like(p)}
                p.mul_(1 - group["lr"] * group["weight_decay"])
                gradient = -p.grad if group["maximize"] else p.grad
                state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
                ratio = (state["exp_avg"].abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(None, 1)
                p.addcmul_(state["exp_avg"].sign(), ratio, value=-group["lr"])


class DrawnSophiaG(SophiaG):
    """For the kit, which only calls step(): every other call updates the Hessian first."""

    calls = 0

    def step(self, closure=None, bs=5120):
        if self.calls % 2 == 1:
            self.update_hessian(self.calls)
        self.calls += 1
        super().step(closure, bs)


class DrawnSophiaGRule(SophiaGRule):
    outside = ()  # it draws them again in replay


def test_a_recorded_sophia_g_closes_with_the_hessians_that_it_had(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = SophiaG(model.parameters(), lr=0.1, rho=10.0)
    with explaind.Recorder(tmp_path / "run", model, optimizer, rule=SophiaGRule()) as recorder:
        for s in range(6):
            x = torch.randn(5, 3, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            recorder.batch(x, None, ids=range(5))
            optimizer.step()
            if s % 2 == 0:
                optimizer.update_hessian(s)
    run = explaind.open_run(tmp_path / "run", model=model, rule=SophiaGRule())
    steps = list(explaind.decompose(run))
    assert max(step.error for step in steps) < 1e-12
    assert max(step.drift for step in steps) == 0


def test_sophia_g_is_exact():
    hyper = {
        "lr": st.floats(1e-4, 1.0),
        "betas": st.tuples(st.sampled_from([0.0, 0.965]), st.sampled_from([0.5, 0.99])),
        "rho": st.sampled_from([0.04, 10.0]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
    report = check_update_rule(DrawnSophiaGRule, DrawnSophiaG, hyper=hyper, max_examples=40)
    assert report.cases >= 50


def test_sophia_h_is_exact_with_an_estimated_hessian():
    """With a graph, SophiaH estimates its Hessian itself; the kit's given gradients have none."""
    kind = pytest.importorskip("pytorch_optimizer").SophiaH
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer, rule = kind([parameter], lr=0.1, p=0.5, update_period=2, weight_decay=0.1), SophiaHRule()
    m = torch.zeros_like(parameter)
    for s in range(1, 6):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            (parameter.sin().square().sum() + parameter.prod()).backward(create_graph=True)
        theta, gradient = parameter.detach().clone(), parameter.grad.detach().clone()
        group = {**optimizer.param_groups[0], **rule.options_aside(optimizer)}
        optimizer.step()
        after = {key: value.detach().clone() for key, value in optimizer.state[parameter].items()}
        step = RecordedStep("p", s, s, group, theta, gradient, parameter.detach() - theta, {}, after)
        declared = rule.coefficients(step)
        out, (m,) = declared.filter.advance((m.detach(),), declared.gradient_operator.apply(gradient))
        update = declared.preconditioner.make(out).apply(out) + declared.decoupled_decay.apply(theta)
        torch.testing.assert_close(theta - update, parameter.detach(), rtol=0, atol=1e-14)
    parameter.grad = None  # it refers to a graph that refers to the parameter
    assert after["hessian"].any()


# ------------------------------------------------------------------ the kit must be able to fail
class TrustBehindTheMomentum(LARSRule):
    def coefficients(self, step):
        right = super().coefficients(step)
        return explaind.StepCoefficients(
            filter=right.filter,
            preconditioner=right.gradient_operator @ right.preconditioner,
            coupled_decay=step.hyper["weight_decay"],
        )


class BasisAfterTheStep(SOAPRule):
    def basis(self, step, layout):
        return [Q if len(Q) else None for Q in step.after["Q"]]


class OldEstimate(ProdigyRule):
    """d of before the step in the denominator too."""

    def coefficients(self, step):
        seen = {**vars(step), "hyper_after": {**step.hyper_after, "d": step.hyper["d"]}}
        return super().coefficients(RecordedStep(**seen))


class MomentumBehindThePreconditioner(ShampooRule):
    """As if the buffer remembered gradients."""

    def coefficients(self, step):
        right, mu = super().coefficients(step), step.hyper["momentum"]
        return explaind.StepCoefficients(
            filter=explaind.LinearFilter(A=((mu,),), B=(1.0,), C=(mu,), D=1.0),
            preconditioner=right.preconditioner @ right.filter.D,
            gradient_operator=right.gradient_operator,
            coupled_decay=right.coupled_decay,
        )


@pytest.mark.parametrize(
    ("rule", "name", "hyper"),
    [
        (TrustBehindTheMomentum, "LARS", {"momentum": st.just(0.9), "trust_coefficient": st.just(0.5)}),
        (BasisAfterTheStep, "SOAP", {"precondition_frequency": st.just(1), "lr": st.just(0.1)}),
        (OldEstimate, "Prodigy", {"lr": st.just(1.0), "eps": st.just(1e-3), "d0": st.just(0.1)}),
        (MomentumBehindThePreconditioner, "Shampoo with momentum", {"momentum": st.just(0.9)}),
    ],
)
def test_a_wrong_declaration_is_refuted(rule, name, hyper):
    kind_of(name)
    trials = TABLE[name].trials()[0]
    with pytest.raises(ConformanceError, match=f"{rule.__name__} does not explain .*: one_step error"):
        check_update_rule(rule, trials.make_optimizer, hyper=hyper, scheduled={}, tolerance=1e-4, max_examples=20)
