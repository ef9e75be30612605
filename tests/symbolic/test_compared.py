"""Nothing that is not proved passes: the states of filters, and an alpha() that only the unrolled steps can refute."""

from __future__ import annotations

import pytest
import torch

from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import DisprovedError, ProofError
from explaind_core.operators import Diagonal
from explaind_core.symbolic import prove


# ------------------------------------------------------------------ states
class Signs(UpdateRule):
    """``m <- mu m + sign(g)``, of which the step before is read out."""

    optimizers = ("somewhere.Signs",)
    options = frozenset({"lr", "mu"})
    filter_states = ("m",)

    def recursion(self, step):
        m = step.state.get("m", torch.zeros_like(step.theta))
        step.state["m"] = step.hyper["mu"] * m + torch.sign(step.gradient)
        return step.theta - step.hyper["lr"] * m

    def coefficients(self, step):
        # Where the gradient is zero, this has no value: no numbers show that it is something else.
        once = Diagonal(1 / step.gradient.abs())
        return StepCoefficients(
            preconditioner=step.hyper["lr"],
            filter=LinearFilter(A=((step.hyper["mu"],),), B=(once,), C=(1.0,), D=0.0),
        )


def test_a_state_that_could_not_be_proved_is_named():
    with pytest.raises(ProofError, match=r"^what Signs declares could not be proved to be its recursion") as caught:
        prove(Signs, steps=1)
    assert not isinstance(caught.value, DisprovedError)
    assert "the filter's state and the optimizer's 'm', which filter_states names" in caught.value.what


# ------------------------------------------------------------------ alpha() where states mix
class Twice(UpdateRule):
    """Momentum of a momentum, ``m <- mu m + g; n <- mu n + m``: its states mix, so that no formula follows from A."""

    optimizers = ("somewhere.Twice",)
    options = frozenset({"lr", "mu"})
    filter_states = ("m", "n")

    def recursion(self, step):
        zero, mu = torch.zeros_like(step.theta), step.hyper["mu"]
        m = step.state["m"] = mu * step.state.get("m", zero) + step.gradient
        n = step.state["n"] = mu * step.state.get("n", zero) + m
        return step.theta - step.hyper["lr"] * n

    def coefficients(self, step):
        mu = step.hyper["mu"]
        made = LinearFilter(A=((mu, 0.0), (mu, mu)), B=(1.0, 1.0), C=(mu, mu), D=1.0)
        return StepCoefficients(preconditioner=step.hyper["lr"], filter=made)

    def alpha(self, s, i, hyper):
        return (s - i + 1) * hyper["mu"] ** (s - i)


class OnlyOnce(Twice):
    """With the alpha of a single momentum."""

    def alpha(self, s, i, hyper):
        return hyper["mu"] ** (s - i)


def test_alpha_is_compared_with_the_unrolled_steps_where_nothing_else_tells_it():
    (proved,) = prove(Twice).configurations
    assert proved.compared
    with pytest.raises(DisprovedError, match=r"is not the sums over its alpha\(\)") as caught:
        prove(OnlyOnce)
    assert "the coefficient of g_1, -P_2 alpha_{2,1} E_1" in caught.value.what
    assert "step 2" in caught.value.where
