"""verify(): the prediction is rebuilt, and the numbers that say how well are right."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.attribution.verify import agreement, kl_divergence
from explaind_core.plugins import Registry
from explaind_core.run.run import Run
from explaind_core.testing import record_example
from explaind_optimizers.adam import AdamWRule
from support.attribution_oracles import dense, record

INPUTS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


@lru_cache
def run(lr: float = 0.05) -> Run:
    return record_example(4, make_optimizer=lambda ps: torch.optim.AdamW(ps, lr=lr, weight_decay=0.3))


def verify(lr: float = 0.05, **question) -> explaind.Verification:
    return explaind.verify(run(lr), INPUTS, progress=False, **question)


def test_the_prediction_is_rebuilt_from_initialisation_and_declared_updates():
    check = verify(nodes=8)
    assert check.agreement == 1.0
    # 8 nodes leave only rounding of a smooth function
    assert check.max_error < 1e-13
    assert check.kl is not None
    assert abs(check.kl) < 1e-13
    assert check.update_error <= 1e-12  # float64


def test_the_residual_is_left_out_of_what_is_rebuilt():
    """Its numbers are those of the oracle's sums, which know nothing of the end of the run."""
    check, truth = verify(lr=0.5, nodes=1), dense(run(0.5), INPUTS, 1)
    rebuilt = truth.values[0] + sum(t.sum((0, 1)) for t in truth.influence.values())
    final = truth.values[-1]
    error = (rebuilt - final).abs()
    assert check.max_error == pytest.approx(float(error.max()), rel=1e-9)
    assert check.mean_error == pytest.approx(float(error.mean()), rel=1e-9)
    assert check.agreement == float((rebuilt.argmax(1) == final.argmax(1)).double().mean())
    assert check.kl == pytest.approx(kl_divergence(final, rebuilt), rel=1e-9)
    assert check.largest_output == pytest.approx(float(final.abs().max()), rel=1e-12)
    assert check.max_error > 1e-3


def test_a_prehistory_is_part_of_what_is_rebuilt(tmp_path):
    torch.manual_seed(0)
    started = record(
        tmp_path / "run", nn.Linear(4, 3).double(), lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9),
        torch.randn(12, 4).double(), torch.randint(3, (12,)), unrecorded=3,
    )  # fmt: skip
    assert explaind.verify(started, INPUTS, nodes=1, progress=False).max_error < 1e-13  # linear: one node is exact


def test_what_was_verified_is_counted():
    check = verify(nodes=3)
    assert (check.steps, check.samples, check.parameters, check.asked) == (4, 6, 4 * 5 + 5 + 5 * 3 + 3, "3")
    assert check.nodes_used == check.nodes_evaluated == 3.0
    assert check.residual.dims == ("step", "test", "output")
    assert check.residual.shape == (4, 6, 3)


def test_adaptive_nodes_are_averaged_with_and_without_refinements():
    check = verify(lr=0.5, nodes="adaptive", tolerance=1e-8)
    assert check.asked == "adaptive"
    assert check.nodes_used == pytest.approx(float(check.result.nodes.mean()))
    assert check.nodes_evaluated == pytest.approx(float(check.result.evaluations.mean()))
    assert check.nodes_evaluated > check.nodes_used > 1
    assert check.max_error < verify(lr=0.5, nodes=1).max_error


class ForgetsDecay(AdamWRule):
    """A declaration with a mistake: the weight decay is left out."""

    def coefficients(self, step):
        return replace(super().coefficients(step), decoupled_decay=0.0)


class PluginWithMistake:
    @explaind.hookimpl
    def explaind_update_rules(self):
        return [ForgetsDecay()]


def test_a_declaration_that_does_not_explain_the_updates_shows():
    registry = Registry(discover=False)
    registry.register(PluginWithMistake())
    wrong = record_example(4, registry=registry)
    check = explaind.verify(wrong, INPUTS, nodes=8, progress=False)
    assert check.update_error > 1e-2
    assert check.max_error > 1e-3
    assert float(abs(check.residual).max()) > 1e-4  # in the open, where closure would not show it
    assert explaind.closure_error(check.result) <= 1e-12


def test_a_single_output_agrees_by_its_sign_and_has_no_divergence():
    check = verify(output=explaind.Loss(TARGETS))
    assert check.agreement == 1.0
    assert check.kl is None
    assert dict(check.rows())["KL divergence"] == "-"


def test_the_printed_table_begins_with_the_rows_of_table_1():
    check = verify(nodes=2)
    assert [name for name, _ in check.rows()[:3]] == [
        "integration steps (nodes per step)", "EPK accuracy (agreement)", "KL divergence",
    ]  # fmt: skip
    text = str(check)
    for name, value in check.rows():
        assert name in text
        assert value in text
    rows = dict(check.rows())
    assert rows["integration steps (nodes per step)"] == "2.00 (2)"
    assert rows["EPK accuracy (agreement)"] == "1.0000"
    assert rows["steps x parameters x samples"] == "4 x 43 x 6"
    assert rows["steps that missed the tolerance"] == "0"


def test_the_table_names_the_worst_step():
    check = verify(lr=0.5, nodes=1)
    worst = abs(check.residual).max(["test", "output"])
    step = int(worst.step[int(worst.values.argmax())])
    assert dict(check.rows())["largest residual of a step"] == f"{float(worst.max()):.2e} (step {step})"


def test_steps_that_missed_the_tolerance_are_counted_in_the_table():
    check = verify(lr=0.5, nodes="adaptive", tolerance=1e-12, max_nodes=1)
    assert dict(check.rows())["steps that missed the tolerance"] == "4"


matrices = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).normal(size=(2, 7, 4)) * 3)


@settings(deadline=None, max_examples=20)
@given(matrices)
def test_divergence_and_agreement_equal_their_formulas(pair):
    reference, rebuilt = pair
    p, q = (np.exp(f) / np.exp(f).sum(1, keepdims=True) for f in pair)
    kl = np.mean(np.sum(p * np.log(p / q), axis=1))
    # exponentials of numbers below 20, 28 terms
    assert kl_divergence(torch.from_numpy(reference), torch.from_numpy(rebuilt)) == pytest.approx(kl, rel=1e-11)
    same = np.mean(np.argmax(reference, 1) == np.argmax(rebuilt, 1))
    assert agreement(torch.from_numpy(reference), torch.from_numpy(rebuilt)) == same


def test_a_divergence_does_not_see_a_constant():
    """Logits are defined up to one; a log-probability is its own logit."""
    logits = torch.randn(5, 3, dtype=torch.float64)
    assert abs(kl_divergence(logits.log_softmax(1), logits + 4)) < 1e-14


def test_agreement_of_single_outputs_is_that_of_signs():
    reference, rebuilt = torch.tensor([[1.0], [-2.0], [3.0], [-1.0]]), torch.tensor([[0.5], [-9.0], [-1.0], [-2.0]])
    assert agreement(reference, rebuilt) == 0.75


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_updates_close_to_rounding_in_float64(optimizer):
    kind = getattr(torch.optim, optimizer)
    recorded = record_example(10, make_optimizer=lambda ps: kind(ps, lr=0.05, weight_decay=0.1))
    assert explaind.verify(recorded, INPUTS, nodes=1, progress=False).update_error <= 1e-12
