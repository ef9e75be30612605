"""Coefficients that read the group as the step left it: proved, or told what recursion() must set."""

from __future__ import annotations

import pytest
import torch

from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import DisprovedError, ProofError
from explaind_core.symbolic import prove


class Growing(UpdateRule):
    """The optimizer makes its own rate larger in its group, and steps with the new one."""

    options = frozenset({"lr", "growth"})

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper_after["lr"])

    def recursion(self, step):
        rate = step.hyper_after["lr"] = step.hyper["lr"] * step.hyper["growth"]
        return step.theta - rate * step.gradient


class Forgets(Growing):
    def recursion(self, step):
        return step.theta - step.hyper["lr"] * step.hyper["growth"] * step.gradient


class Estimated(UpdateRule):
    """An estimate that is no option: the first step creates it."""

    options = frozenset({"lr"})

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper["lr"] * step.hyper_after["d"])

    def recursion(self, step):
        d = step.hyper_after["d"] = step.norm(step.gradient)
        return step.theta - step.hyper["lr"] * d * step.gradient


class Silent(Estimated):
    def recursion(self, step):
        return step.theta - step.hyper["lr"] * step.norm(step.gradient) * step.gradient


class Counted(UpdateRule):
    """A counter in the group, read behind the step: the proof counts it itself."""

    options = frozenset({"lr", "mu", "k"})
    proved_for = {"k": (lambda step: step - 1,)}  # noqa: RUF012
    filter_states = ("m",)

    def coefficients(self, step):
        t = step.hyper_after["k"]
        return StepCoefficients(preconditioner=step.hyper["lr"] / t, filter=LinearFilter.momentum(step.hyper["mu"]))

    def recursion(self, step):
        m = step.state["m"] = step.hyper["mu"] * step.state["m"] + step.gradient
        return step.theta - step.hyper["lr"] / (step.hyper["k"] + 1) * m


class Sets(Counted):
    def recursion(self, step):
        k = step.hyper_after["k"] = step.hyper["k"] + 1
        m = step.state["m"] = step.hyper["mu"] * step.state["m"] + step.gradient
        return step.theta - step.hyper["lr"] / k * m


class Unchanged(UpdateRule):
    """It reads behind the step what no step changes."""

    options = frozenset({"lr"})

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper_after["lr"])

    def recursion(self, step):
        return step.theta - step.hyper["lr"] * step.gradient


class Asks(UpdateRule):
    """An entry that some versions of the optimizer have."""

    options = frozenset({"lr"})

    def coefficients(self, step):
        scaled = step.hyper_after["scaled"] if "scaled" in step.hyper_after else step.hyper_after.get("none", 1)
        return StepCoefficients(preconditioner=step.hyper["lr"] * scaled)

    def recursion(self, step):
        return step.theta - step.hyper["lr"] * step.gradient


@pytest.mark.parametrize("rule", [Growing, Estimated, Counted, Sets, Asks])
def test_what_the_recursion_sets_or_counts_is_proved(rule):
    proof = prove(rule)
    assert proof.proved
    assert all(c.unwritten == () for c in proof.configurations)
    assert "provided" not in str(proof)


def test_what_it_does_not_set_is_taken_to_stay_and_the_proof_says_so():
    proof = prove(Unchanged)
    assert proof.proved
    assert proof.configurations[0].unwritten == ("lr",)
    assert "provided that the step leaves as it was, as recursion() does not set it: lr" in str(proof)


def test_a_difference_by_what_it_did_not_set_is_told():
    with pytest.raises(DisprovedError, match="the coefficient of g_1") as caught:
        prove(Forgets)
    assert "coefficients() reads step.hyper_after['lr'], which recursion() does not set" in caught.value.remedy


def reads(where, key):
    def coefficients(self, step):
        return StepCoefficients(preconditioner=getattr(step, where)[key])

    return type("Reads", (Unchanged,), {"coefficients": coefficients})


@pytest.mark.parametrize(
    ("rule", "remedy"),
    [
        (Silent, "let recursion() set it to what the optimizer leaves there: step.hyper_after['d'] = ..."),
        (reads("hyper_after", "k"), "step.hyper_after['k'] = ..."),
        (reads("hyper", "k"), "name 'k' in the rule's options; or list it in proved_for, as a function of the step"),
        (reads("after", "m"), "let recursion() keep it, under the optimizer's own name: step.state['m'] = ..."),
        (reads("before", "m"), "step.state['m'] = ..."),
    ],
)
def test_an_entry_that_is_missing_says_what_to_write(rule, remedy):
    with pytest.raises(ProofError, match=r"does not run on symbols: the .* has no entry") as caught:
        prove(rule)
    assert remedy in caught.value.remedy
    assert not isinstance(caught.value, DisprovedError)


def test_the_counter_is_the_optimizers_own():
    """What the proof takes for granted, on tensors: a counter stands one further behind the step."""

    class Counting(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1, mu=0.9):
            super().__init__(params, {"lr": lr, "mu": mu, "k": 0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is not None:
                        m = self.state[p].setdefault("m", torch.zeros_like(p))
                        m.mul_(group["mu"]).add_(p.grad)
                        p.sub_(group["lr"] / group["k"] * m)

    from explaind_core.testing import Case, run_case

    case = Case(schedule=[{}] * 4, gradients=[["yes"] * 4] * 4)
    assert run_case(Counted(), Counting, case).one_step < 1e-14
