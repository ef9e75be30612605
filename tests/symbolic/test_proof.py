"""The sympy proofs: every rule of torch's optimizers, the paper's closed forms, and the recursions on numbers."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import pytest
import sympy
import torch

import explaind_optimizers as builtin
from explaind_core import UpdateRule
from explaind_core.symbolic import RecursionStep, SymbolicTensor, prove
from explaind_core.symbolic.recursion import configurations

TORCH = [rule for rule in builtin._RULES if rule.optimizers[0].startswith("torch.optim")]
PROVED = [rule for rule in TORCH if not rule.no_closed_form]


def test_every_rule_of_torch_is_there():
    assert {r.__name__ for r in TORCH if r.no_closed_form} == {"MuonRule", "LBFGSRule"}
    assert len(PROVED) >= 13


@pytest.mark.parametrize("rule", TORCH, ids=lambda rule: rule.__name__)
def test_every_rule_of_torch_is_proved_for_every_step_or_says_why_not(rule):
    proof = prove(rule)
    assert proof.proved is not bool(rule.no_closed_form)
    assert proof.reason == rule.no_closed_form
    for found in proof.configurations:
        scheduled = any(isinstance(value, list) for value in found.options.values())
        assert found.every_step is not scheduled
        assert found.compared is (rule.alpha is not UpdateRule.alpha and not scheduled)
    assert rule.__name__ in str(proof)
    assert (rule.no_closed_form or "by induction") in str(proof).replace("\n", " ")


# ------------------------------------------------------------------ the closed forms of the paper
s, i = sympy.symbols("s i", integer=True, positive=True)
lr, wd, mu, d, beta1 = sympy.symbols("lr weight_decay momentum dampening beta1", positive=True)
theta = sympy.IndexedBase("theta")


def same(found, expected):
    return sympy.simplify(found - expected) == 0


def test_adamw_has_the_step_learning_rate_and_regularization_of_theorem_3_1():
    for found in prove(builtin.AdamWRule).configurations:
        assert list(found.alpha) == ["s,i"]  # one formula, for i = s and i = 1 too
        assert same(found.alpha["s,i"], (1 - beta1) * beta1 ** (s - i) / (1 - beta1**s))
        assert same(found.regularization, lr * wd * theta[s - 1])
        assert found.latex().startswith(r"\alpha_{s,i} = ")


class PaperMomentum(builtin.SGDRule):
    """Gradient descent with momentum as in Corollary 3.2."""

    proved_for = MappingProxyType({"momentum": (...,), "dampening": (0,), "nesterov": (False,), "maximize": (False,)})


def test_momentum_has_the_step_learning_rate_and_regularization_of_corollary_3_2():
    (found,) = prove(PaperMomentum).configurations
    assert list(found.alpha) == ["s,i"]
    assert same(found.alpha["s,i"], mu ** (s - i))
    assert same(found.regularization, lr * wd * sympy.Sum(mu ** (s - i) * theta[i - 1], (i, 1, s)))


def test_closed_forms_with_exceptions_name_them():
    found = [f for f in prove(builtin.SGDRule).configurations if f.options["momentum"] is ...]
    dampened, nesterov = (next(f for f in found if f.options["nesterov"] is n) for n in (False, True))
    assert same(dampened.alpha["s,i"], (1 - d) * mu ** (s - i))
    assert same(dampened.alpha["s,1"], mu ** (s - 1))  # the first gradient is undampened
    assert set(dampened.alpha) == {"s,i", "s,1", "1,1"}
    assert same(nesterov.alpha["s,s"], 1 + mu * (1 - d))
    assert same(nesterov.alpha["1,1"], 1 + mu)


# ------------------------------------------------------------------ the recursions are the optimizers'
GRADIENTS = (0.5, -0.3, -0.4, 0.9, 0.0, 0.2, 0.1, -0.6)
RATES = (0.1, 0.2, 0.05, 0.1, 0.3, 0.1, 0.2, 0.1)


def trained(kind, options, momenta):
    """The groups before every step of the real optimizer, and theta after it."""
    parameter = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = kind([parameter], lr=RATES[0], **options)
    for rate, momentum, gradient in zip(RATES, momenta, GRADIENTS, strict=True):
        optimizer.param_groups[0] |= {"lr": rate} | ({} if momentum is None else {"momentum": momentum})
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        if kind is torch.optim.SparseAdam:
            parameter.grad = parameter.grad.to_sparse()
        optimizer.step()
        yield group, float(parameter.detach())


def constructor_options(kind, configuration):
    """Arguments for torch that make a configuration real, or None where torch refuses it."""
    values = {n: v for n, v in configuration.items() if v is not ... and not isinstance(v, (list, tuple))}
    decoupled = values.get("decoupled_weight_decay")
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        del values["decoupled_weight_decay"]
        if decoupled is not (kind is torch.optim.AdamW):
            return None
    if kind is torch.optim.SGD:
        if values["nesterov"] and configuration["momentum"] == 0:
            return None
        values |= {"momentum": 0.9, "dampening": 0.0 if values["nesterov"] else 0.3}
    if kind is torch.optim.RMSprop and configuration["momentum"] is ...:
        values["momentum"] = 0.9
    if kind is torch.optim.RAdam:
        values["betas"] = (0.7, 0.9)  # rectified from step 7 on
    decays = "weight_decay" in kind([torch.zeros(1, requires_grad=True)]).defaults
    return values | ({"weight_decay": 0.1} if decays else {})


def number(x):
    if isinstance(x, tuple):
        return tuple(map(number, x))
    return x if isinstance(x, (bool, str)) or x is None else SymbolicTensor(sympy.Float(x, 30))


@pytest.mark.parametrize("rule", PROVED, ids=lambda rule: rule.__name__)
def test_the_recursion_is_the_optimizers_own(rule):
    """Run on numbers, it moves as torch does. (torch keeps NAdam's product and ASGD's eta in single precision.)"""
    kind = getattr(torch.optim, rule.optimizers[0].rsplit(".", 1)[1])
    tolerance = 1e-6 if kind in (torch.optim.NAdam, torch.optim.ASGD) else 1e-13
    compared = 0
    for configuration in configurations(rule()):
        options = constructor_options(kind, configuration)
        if options is None:
            continue
        cycle = configuration.get("momentum")
        cycle = [None] if "momentum" not in configuration else cycle if isinstance(cycle, list) else [cycle]
        momenta = [0.9 if m is ... else m for m in itertools.islice(itertools.cycle(cycle), len(RATES))]
        theta, state = SymbolicTensor(sympy.Float(0.7, 30)), RecursionStep(0, 0, {}).state
        for t, (group, expected) in enumerate(trained(kind, options, momenta), start=1):
            hyper, gradient = {n: number(v) for n, v in group.items()}, number(GRADIENTS[t - 1])
            step = RecursionStep(theta, gradient, hyper, SymbolicTensor(t), SymbolicTensor(t), state)
            found = rule().recursion(step).expr
            mask = dict.fromkeys(found.free_symbols, int(GRADIENTS[t - 1] != 0))
            theta = SymbolicTensor(found.xreplace(mask))
            state |= {name: SymbolicTensor(x.expr.xreplace(mask)) for name, x in state.items()}
            assert float(theta) == pytest.approx(expected, abs=tolerance), (configuration, t)
            compared += 1
    assert compared >= len(RATES)
