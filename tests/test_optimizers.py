"""SGD, Adam and AdamW with every option, against the recorded truth: drawn shapes, schedules, groups, gradients."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind


class Bag(nn.Module):
    """Parameters of all kinds of shapes; its loss is a random but smooth function of them."""

    def __init__(self, dtype):
        super().__init__()
        for index, shape in enumerate([(), (3,), (4, 5), (2, 3, 2)]):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape, dtype=dtype)))

    def forward(self, x):
        return sum(torch.sin(x * p).sum() for p in self.parameters())


OPTIONS = {
    torch.optim.SGD: {
        "lr": st.floats(1e-4, 1.0),
        "momentum": st.sampled_from([0.0, 0.5, 0.99]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
    torch.optim.Adam: {
        "lr": st.floats(1e-4, 1.0),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.98]), st.sampled_from([0.0, 0.9, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
}
OPTIONS[torch.optim.AdamW] = OPTIONS[torch.optim.Adam]
COMMON = {
    "lr": st.floats(1e-4, 1.0),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "maximize": st.booleans(),
    "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}]),
}
BETAS = st.tuples(st.sampled_from([0.1, 0.5, 0.98]), st.sampled_from([0.5, 0.9, 0.999]))
OPTIONS |= {
    torch.optim.Adagrad: COMMON
    | {
        "lr_decay": st.sampled_from([0.0, 0.3]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.1]),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
    torch.optim.Adadelta: COMMON | {"rho": st.sampled_from([0.0, 0.9]), "eps": st.sampled_from([1e-6, 1e-2])},
    torch.optim.Adamax: COMMON | {"betas": BETAS},
    torch.optim.NAdam: COMMON
    | {"betas": BETAS, "momentum_decay": st.sampled_from([4e-3, 0.1]), "decoupled_weight_decay": st.booleans()},
    torch.optim.RAdam: COMMON | {"betas": BETAS, "decoupled_weight_decay": st.booleans()},
    torch.optim.RMSprop: COMMON
    | {
        "alpha": st.sampled_from([0.5, 0.99]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "centered": st.booleans(),
        "momentum": st.sampled_from([0.0, 0.9]),
    },
    torch.optim.Rprop: {n: v for n, v in COMMON.items() if n != "weight_decay"},
    torch.optim.ASGD: COMMON | {"lambd": st.sampled_from([1e-4, 0.1]), "t0": st.sampled_from([1e6, 2.0])},
    torch.optim.Adafactor: COMMON
    | {"d": st.sampled_from([1.0, 2.0]), "eps": st.sampled_from([(None, 1e-3), (1e-5, 0.5)])},
}
SCHEDULED = {"lr": st.floats(1e-4, 1.0), "momentum": st.sampled_from([0.0, 0.9]), "weight_decay": st.floats(0, 0.2)}


@st.composite
def trainings(draw, kind):
    options = draw(st.fixed_dictionaries(OPTIONS[kind]))
    options |= options.pop("kernel")
    if options.get("nesterov") and (options["momentum"] == 0 or options["dampening"] != 0):
        options["nesterov"] = False  # torch refuses these
    schedule = {n: v for n, v in SCHEDULED.items() if n in options}
    if options.get("nesterov") or kind is torch.optim.RMSprop:
        schedule.pop("momentum")  # torch's RMSprop fails by itself where momentum is switched on later
    kinds = ["yes", "yes", "zero", "some zeros"]
    if not (options.get("fused") and kind is torch.optim.SGD):
        kinds.append("none")  # torch's fused SGD fails by itself where a momentum buffer is missing
    steps = draw(st.integers(1, 6))
    return {
        "options": options,
        "second_group": draw(st.floats(1e-4, 1.0)),
        "schedules": draw(st.lists(st.fixed_dictionaries(schedule), min_size=steps, max_size=steps)),
        "gradients": draw(
            st.lists(st.lists(st.sampled_from(kinds), min_size=4, max_size=4),
                     min_size=steps, max_size=steps)
        ),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def train(kind, training, folder, dtype):
    torch.manual_seed(training["seed"])
    model = Bag(dtype)
    p0, p1, p2, p3 = model.parameters()
    optimizer = kind(
        [{"params": [p0, p2]}, {"params": [p1, p3], "lr": training["second_group"]}], **training["options"]
    )
    with explaind.Recorder(f"{folder}/run", model, optimizer) as recorder:
        for scheduled, presence in zip(training["schedules"], training["gradients"], strict=True):
            optimizer.param_groups[0].update(scheduled)
            optimizer.zero_grad()
            x = torch.randn(1, dtype=dtype)
            model(x).backward()
            for parameter, what in zip(model.parameters(), presence, strict=True):
                if what == "none":
                    parameter.grad = None
                elif what == "zero":
                    parameter.grad.zero_()
                elif what == "some zeros":
                    parameter.grad.flatten()[::2] = 0
            recorder.batch(x, None, ids=[0])
            optimizer.step()
    return explaind.open_run(f"{folder}/run", model=model)


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_the_declaration_is_exact_in_double_precision(kind):
    @settings(deadline=None, max_examples=40)
    @given(training=trainings(kind))
    def check(training):
        with tempfile.TemporaryDirectory() as folder:
            for split in explaind.decompose(train(kind, training, folder, torch.float64)):
                assert split.drift == 0
                for name, update in split.updates.items():
                    theta = split.theta_before[name].double() + update.declared
                    # Kernel and regularization may be far larger than their sum (P = 1 / |g + wd theta|), so
                    # their own size is what rounding is measured by.
                    parts = (theta, update.kernel, update.regularization)
                    size = 1 + sum(float(part.abs().max()) for part in parts)
                    assert float((theta - split.theta[name]).abs().max()) <= 1e-13 * size

    check()


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_single_precision_is_off_by_rounding_only(kind):
    @settings(deadline=None, max_examples=15)
    @given(training=trainings(kind))
    def check(training):
        with tempfile.TemporaryDirectory() as folder:
            for split in explaind.decompose(train(kind, training, folder, torch.float32)):
                for name, update in split.updates.items():
                    theta = split.theta_before[name].double() + update.declared
                    # Where Adam's v is zero, P = lr / eps blows rounding of m up, and updates of 1e7 cancel.
                    parts = (theta, update.displacement, update.kernel, update.regularization)
                    size = 1 + sum(float(part.abs().max()) for part in parts)
                    assert float((theta - split.theta[name].double()).abs().max()) < 2e-6 * size

    check()


def test_what_the_declaration_leaves_out_shows_up_as_error():
    class Forgetful(explaind.UpdateRule):
        optimizers = ("torch.optim.sgd.SGD",)
        options = frozenset(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0).defaults)

        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=step.hyper["lr"])  # no momentum

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return [Forgetful()]

    from explaind_core.plugins import Registry
    from explaind_core.testing import record_example

    registry = Registry(discover=False)
    registry.register(Plugin, name="forgetful")
    run = record_example(steps=4, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), registry=registry)
    errors = [split.error for split in explaind.decompose(run)]
    assert errors[0] < 1e-12  # the first step has no past
    assert min(errors[1:]) > 0.1
