"""A sign of what is zero but for rounding is either sign, or zero: that is no error of the rule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.decomposition import decompose
from explaind_core.errors import CoefficientError
from explaind_optimizers.lion import LionRule

lion = pytest.importorskip("pytorch_optimizer")

RATE = 1e-4


class Table(nn.Module):
    """Its gradient is what it is multiplied by."""

    def __init__(self, theta):
        super().__init__()
        self.weight = nn.Parameter(theta)

    def forward(self, x):
        return x * self.weight


class Off(LionRule):
    """The rate is off by a twentieth where entries are large."""

    def coefficients(self, step):
        found = super().coefficients(step)
        return explaind.StepCoefficients(
            filter=found.filter,
            preconditioner=type(found.preconditioner)(lambda c: _Scaled(found.preconditioner.make(c), 1.05)),
            decoupled_decay=found.decoupled_decay,
        )


def _Scaled(operator, factor):
    return type(operator)(operator.weight * factor) if hasattr(operator, "weight") else factor * operator


def record(path, gradients, dtype=torch.float32, rule=None):
    model = Table(torch.linspace(0.5, 1.5, 8, dtype=dtype))
    initial, loss = copy.deepcopy(model), lambda z, _: z.sum()
    optimizer = lion.Lion(model.parameters(), lr=RATE)
    with explaind.Recorder(path, model, optimizer, loss, rule=rule) as recorder:
        for gradient in gradients:
            x = torch.tensor([gradient], dtype=dtype)
            optimizer.zero_grad()
            loss(model(x), None).backward()
            recorder.batch(x, None, ids=[0])
            optimizer.step()
    return explaind.open_run(path, model=initial, loss=loss, rule=rule)


def large(first):
    return [[first] * 3 + [1.0] * 5, [0.0] * 3 + [1.0] * 5]


def test_a_momentum_that_underflows_is_explained(tmp_path):
    run = record(tmp_path / "run", large(2e-44))
    split = list(decompose(run))[1]
    (error,) = split.errors
    assert error.missed == pytest.approx(RATE * math.sqrt(3), rel=1e-3)  # three entries do not move
    assert error.unsure == pytest.approx(2 * RATE * math.sqrt(3), rel=1e-6)
    assert split.error > 0.1  # which is told
    explaind.attribute(run, torch.ones(1, 8), nodes=1, progress=False)  # and answered


@pytest.mark.parametrize(("first", "unsure"), [(0.0, 0), (2e-44, 3), (1e-30, 0)])
def test_only_what_rounding_reaches_is_unsure(tmp_path, first, unsure):
    split = list(decompose(record(tmp_path / "run", large(first))))[1]
    assert split.errors[0].unsure == pytest.approx(2 * RATE * math.sqrt(unsure), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("off", "unsure"), [(8e-7, True), (8e-6, False)])
def test_terms_that_cancel_are_unsure_to_their_rounding(tmp_path, off, unsure):
    """c = 0.9 * 0.01 g_1 + 0.1 g_2 for the default betas."""
    second = -0.09 * (1 + off)
    split = list(decompose(record(tmp_path / "run", [[1.0] * 8, [second] + [1.0] * 7])))[1]
    assert (split.errors[0].unsure > 0) == unsure


def test_a_wrong_rule_is_refused_all_the_same(tmp_path):
    run = record(tmp_path / "run", large(0.0), rule=Off())
    with pytest.raises(CoefficientError, match="does not explain"):
        explaind.attribute(run, torch.ones(1, 8), nodes=1, progress=False)
