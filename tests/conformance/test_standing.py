"""Where a rule stands with its proof: DISPROVED is only what was shown to be wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import explaind_core as explaind
from explaind_core.errors import DisprovedError
from explaind_core.operators import Diagonal
from explaind_core.plugins import Registry
from explaind_core.symbolic import prove, standing
from explaind_core.testing import Trials, check_plugin
from explaind_optimizers import RpropRule, SGDRule
from optimizer_tables import tables


class Unwritten(SGDRule):
    """Exact, as SGD's rule is; its author wrote no proof."""

    recursion = explaind.UpdateRule.recursion
    alpha = explaind.UpdateRule.alpha


class Inherited(Unwritten):
    """A subclass of a rule without a recursion has none either."""


class Secret(Unwritten):
    no_closed_form = "it is a secret"


class Unreadable(SGDRule):
    """A recursion that runs on tensors only."""

    def recursion(self, step):
        return step.theta - torch.fft.fft(step.gradient)


class Undecided(RpropRule):
    """Where the gradient is 0, the declared P_s has no value: no numbers show a difference."""

    def coefficients(self, step):
        size = step.after["step_size"] / step.gradient.abs()
        return replace(super().coefficients(step), preconditioner=Diagonal(size))


class Differs(SGDRule):
    """The sign of the decay is wrong."""

    def coefficients(self, step):
        return replace(super().coefficients(step), coupled_decay=-step.hyper["weight_decay"])


STANDINGS = {
    SGDRule: "proved",
    Unwritten: "no proof written",
    Inherited: "no proof written",
    Secret: "not proved (it has no closed form)",
    Unreadable: "NOT PROVED (and not disproved)",
    Undecided: "NOT PROVED (and not disproved)",
    Differs: "DISPROVED",
}


@pytest.mark.parametrize("rule", STANDINGS, ids=lambda rule: rule.__name__)
def test_only_what_was_shown_to_differ_is_disproved(rule):
    found = standing(rule())
    assert found.word == STANDINGS[rule]
    assert found.proved is (found.word == "proved")
    assert found.disproved is (rule is Differs)
    assert found.failed is (rule in (Unreadable, Undecided, Differs))


def test_a_difference_that_is_shown_has_an_error_of_its_own():
    with pytest.raises(DisprovedError, match="Differs declares is not its recursion"):
        prove(Differs)


def plugged(rule):
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return [rule()]

        @staticmethod
        @explaind.hookimpl
        def explaind_trials():
            return [Trials(torch.optim.SGD)]

    registry = Registry(discover=False)
    registry.register(Plugin, name="a plugin")
    return registry


@pytest.mark.parametrize(
    ("rule", "verdict", "holds"),
    [
        (Unwritten, "verdict: exact, no proof written", True),
        (Secret, "verdict: exact, not proved (it has no closed form)", True),
        (Unreadable, "verdict: exact, NOT PROVED (and not disproved)", False),
    ],
)
def test_the_verdict_says_so_and_a_rule_without_a_proof_passes(rule, verdict, holds):
    found = check_plugin(rule, max_examples=3, registry=plugged(rule))
    assert verdict in str(found)
    assert "DISPROVED" not in str(found)
    assert (found.holds, found.exact, found.disproved) == (holds, True, False)


@pytest.mark.parametrize("rule", [Unwritten, Unreadable, Differs])
def test_the_page_of_optimizers_says_so(rule):
    page = tables({}, registry=plugged(rule))
    assert f"| {STANDINGS[rule]} |" in page
