"""What a rule declares, and what it may look at: refusals that name the option, entry or coefficient concerned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.naming import qualified_name
from explaind_core.operators import Diagonal, Left
from explaind_core.rules.rule import OptimizerState
from explaind_optimizers import AdamRule, AdamWRule, SGDRule
from support.oracles import alpha


# ------------------------------------------------------------------ filters
@given(mu=st.floats(0, 0.999), dampening=st.floats(0, 0.99), s=st.integers(1, 6), nesterov=st.booleans())
@settings(deadline=None, max_examples=30)
def test_momentum_weighs_by_powers_of_mu(mu, dampening, s, nesterov):
    dampening = 0.0 if nesterov else dampening
    filters = [
        explaind.LinearFilter.momentum(mu, dampening=dampening, nesterov=nesterov, first=t == 0) for t in range(s)
    ]
    for i in range(s):
        first = 1.0 if i == 0 else 1 - dampening  # the first gradient enters undampened
        buffer = mu ** (s - 1 - i) * first
        expected = (i == s - 1) + mu * buffer if nesterov else buffer
        assert alpha(filters, s - 1, i, ()).item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_operators_as_coefficients_act_in_the_declared_order():
    rotate = Left(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))
    stretch = Diagonal(torch.tensor([2.0, 3.0], dtype=torch.float64))
    made = explaind.LinearFilter(A=((rotate,),), B=(stretch,), C=(1.0,), D=0.0)
    state = (torch.zeros(2, dtype=torch.float64),)
    for u in ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0]):
        out, state = made.advance(state, torch.tensor(u, dtype=torch.float64))
    assert out.tolist() == [-3.0, 2.0]  # stretched once, then rotated once


def test_two_states_mix_through_A():
    jacobsthal = explaind.LinearFilter(A=((1.0, 2.0), (1.0, 0.0)), B=(1.0, 0.0), C=(0.0, 1.0), D=0.0)
    state, outs = (torch.zeros(()), torch.zeros(())), []
    for s in range(8):
        out, state = jacobsthal.advance(state, torch.tensor(float(s == 0)))
        outs.append(int(out))
    assert outs == [0, 0, 1, 1, 3, 5, 11, 21]


def test_the_gradient_itself_is_never_changed():
    u, m = torch.ones(3), torch.ones(3)
    explaind.LinearFilter.momentum(0.5, nesterov=True).advance((m,), u)
    explaind.LinearFilter().advance((), u)
    assert u.tolist() == m.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("filter_", "wording"),
    [
        ({"A": ((1.0, 2.0),), "B": (1.0,), "C": (1.0,)}, r"A: 1 x 1, C: 1, as B has 1[\s\S]*A: 1 rows of \[2\]"),
        ({"B": (1.0,)}, r"A: 0 rows of \[\], C: 0"),
        ({"A": ((1.0,),), "B": (1.0,), "C": (1.0, 1.0)}, "C: 2"),
        ({"A": ((float("nan"),),), "B": (1.0,), "C": (1.0,)}, r"coefficient is not finite[\s\S]*nan"),
        ({"D": torch.ones(2)}, r"neither a number nor an operator[\s\S]*Tensor"),
    ],
)
def test_filters_that_make_no_sense(filter_, wording):
    with pytest.raises(errors.CoefficientError, match=wording):
        explaind.LinearFilter(**filter_)


@pytest.mark.parametrize("name", ["preconditioner", "gradient_operator", "coupled_decay", "decoupled_decay"])
def test_each_operator_of_a_step_is_named_when_it_is_none(name):
    entries = {"preconditioner": 1.0}
    with pytest.raises(errors.CoefficientError, match=f"{name} is a bare tensor"):
        explaind.StepCoefficients(**(entries | {name: torch.ones(3)}))
    with pytest.raises(errors.CoefficientError, match=f"{name} is not an operator"):
        explaind.StepCoefficients(**(entries | {name: None}))
    with pytest.raises(errors.CoefficientError, match=f"{name} is not finite"):
        explaind.StepCoefficients(**(entries | {name: float("inf")}))


def test_one_element_tensors_are_numbers():
    declared = explaind.StepCoefficients(torch.tensor(0.5), filter=explaind.LinearFilter(D=torch.tensor(2.0)))
    assert (declared.preconditioner.factor, declared.filter.D) == (0.5, 2.0)


# ------------------------------------------------------------------ what a rule looks at
def test_a_missing_state_entry_says_what_there_is():
    state = OptimizerState("encoder.weight", {"step": 3, "exp_avg": 1.0}, "optimizer state after the step")
    with pytest.raises(errors.CoefficientError) as caught:
        state["exp_avg_sq"]
    text = str(caught.value)
    assert "the optimizer state after the step has no entry 'exp_avg_sq'" in text
    assert "parameter 'encoder.weight'" in text
    assert "one of ['exp_avg', 'step']" in text


def test_a_state_is_a_mapping():
    state = OptimizerState("p", {"step": 3})
    assert (dict(state), len(state), state.get("m"), state.get("m", 0)) == ({"step": 3}, 1, None, 0)
    assert "step" in state
    assert "m" not in state


# ------------------------------------------------------------------ options
CASES = [(torch.optim.SGD, SGDRule), (torch.optim.Adam, AdamRule), (torch.optim.AdamW, AdamWRule)]


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_every_option_of_the_optimizer_is_decided(kind, rule):
    optimizer = kind([nn.Parameter(torch.ones(1))], lr=0.1)
    decided = rule.options | set(rule.fixed)
    assert set(optimizer.defaults) <= decided
    rule().check_options(optimizer.param_groups[0], list(optimizer.defaults))


@pytest.mark.parametrize(
    ("rule", "option"),
    [(SGDRule, "differentiable"), (AdamRule, "differentiable"), (AdamWRule, "capturable"), (AdamWRule, "sparkling")],
)
def test_an_option_that_is_not_modelled_is_refused_with_its_value_and_the_modelled_ones(rule, option):
    with pytest.raises(errors.UnsupportedOptionError) as caught:
        rule().check_options({"lr": 0.1, option: True}, ["lr", option])
    text = str(caught.value)
    assert f"{rule.__name__} does not model the option {option}=True" in text
    assert (f"{option} in [False]" if option in rule.fixed else "'weight_decay'") in text
    assert "train without this option, or register a rule that models it" in text


def test_a_rule_claims_exactly_the_classes_that_it_names():
    class Mine(torch.optim.SGD):
        pass

    parameter = [nn.Parameter(torch.ones(1))]
    assert SGDRule().claims(torch.optim.SGD(parameter, lr=0.1))
    assert not SGDRule().claims(Mine(parameter, lr=0.1))
    assert qualified_name(Mine).endswith("test_a_rule_claims_exactly_the_classes_that_it_names.<locals>.Mine")


def test_a_rule_must_say_its_coefficients():
    class Silent(explaind.UpdateRule):
        pass

    with pytest.raises(TypeError, match="coefficients"):
        Silent()
