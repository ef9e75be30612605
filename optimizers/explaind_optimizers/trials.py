"""How the conformance kit draws trainings for the rules of torch.optim: every option, and schedules of most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from explaind_core.rules import PRESENCE, Trials

__all__ = ["torch_trials"]

Strategies = Mapping[str, st.SearchStrategy[Any]]

RATE = st.floats(1e-4, 1.0)
BETAS = st.tuples(st.sampled_from([0.1, 0.5, 0.98]), st.sampled_from([0.5, 0.9, 0.999]))
DECAY = st.sampled_from([0.0, 0.1])
LOOPS = st.sampled_from([{}, {"foreach": True}, {"foreach": False}])
FUSED = st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
COMMON: Strategies = {"lr": RATE, "weight_decay": DECAY, "maximize": st.booleans(), "*loop": LOOPS}
#: Sparse gradients have rows.
ROWS = ((3,), (4, 5), (6, 2, 2))

ADAM: Strategies = {
    **COMMON,
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.98]), st.sampled_from([0.0, 0.9, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "amsgrad": st.booleans(),
    "*loop": FUSED,
}
MOMENTUM: Strategies = {
    **COMMON,
    "*momentum": st.sampled_from(
        [
            {"momentum": 0.0},
            {"momentum": 0.5, "dampening": 0.3},
            {"momentum": 0.99},
            {"momentum": 0.5, "nesterov": True},  # torch has Nesterov without dampening only
        ]
    ),
}
CURVATURE: Strategies = {
    "lr": st.floats(0.01, 1.0),
    "max_iter": st.integers(1, 8),
    "max_eval": st.sampled_from([None, 5]),
    "history_size": st.sampled_from([1, 3, 100]),
    "tolerance_grad": st.sampled_from([1e-7, 0.5]),
    "tolerance_change": st.sampled_from([1e-9, 0.1]),
}
ORTHOGONAL: Strategies = {
    "lr": RATE,
    "weight_decay": DECAY,
    "momentum": st.sampled_from([0.0, 0.9]),
    "nesterov": st.booleans(),
    "ns_steps": st.sampled_from([1, 5]),
    "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
}
SPARSE: Strategies = {
    "lr": RATE,
    "betas": ADAM["betas"],
    "eps": st.sampled_from([1e-8, 1e-3]),
    "maximize": st.booleans(),
}


def scheduled(**but: st.SearchStrategy[Any] | None) -> Callable[[type[torch.optim.Optimizer]], Strategies]:
    """Schedules of every hyper-parameter that an optimizer has, with exceptions; None for one that must stay."""
    every: dict[str, st.SearchStrategy[Any] | None] = {
        "lr": RATE,
        "momentum": st.sampled_from([0.0, 0.9]),
        "betas": BETAS,
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.floats(0, 0.2),
        "dampening": st.sampled_from([0.0, 0.5]),
        "lambd": st.floats(0, 0.1),
        "rho": st.floats(0, 0.9),
        "alpha": st.floats(0.1, 0.9),
        "lr_decay": st.floats(0, 0.5),
        "momentum_decay": st.floats(0, 0.1),
        "d": st.floats(1.0, 3.0),
        "maximize": st.booleans(),
        **but,
    }

    def of(kind: type[torch.optim.Optimizer]) -> Strategies:
        has = kind([torch.nn.Parameter(torch.ones(1, 1))]).defaults  # type: ignore[call-arg]
        return {name: s for name, s in every.items() if s is not None and name in has}

    return of


def torch_trials() -> dict[str, tuple[Trials, ...]]:
    """Rule class name -> families of trainings."""
    o = torch.optim

    def family(kind: type[torch.optim.Optimizer], hyper: Strategies, **other: Any) -> Trials:
        schedules = other.pop("scheduled", scheduled())(kind)
        return Trials(kind, hyper, schedules, **other)

    searches = {ls: {**CURVATURE, "line_search_fn": st.just(ls)} for ls in (None, "strong_wolfe")}
    one_flat = {"closure": True, "groups": 1, "scheduled": lambda _: {"lr": st.floats(0.01, 1.0)}}
    rows = {"shapes": ROWS, "presence": ("sparse", "sparse", "none")}
    found: dict[str, tuple[Trials, ...]] = {
        "SGDRule": (
            family(o.SGD, MOMENTUM),
            # torch's fused SGD fails by itself where a momentum buffer is missing
            family(o.SGD, {**MOMENTUM, "*loop": st.just({"fused": True})}, presence=("yes", "zero"), name="fused"),
        ),
        "AdamRule": (family(o.Adam, {**ADAM, "decoupled_weight_decay": st.booleans()}),),
        "AdamWRule": (family(o.AdamW, ADAM),),
        "SparseAdamRule": (family(o.SparseAdam, SPARSE, **rows, name="sparse gradients"),),
        "AdagradRule": (
            family(
                o.Adagrad,
                {
                    **COMMON,
                    "lr_decay": st.sampled_from([0.0, 0.3]),
                    "initial_accumulator_value": st.sampled_from([0.0, 0.1]),
                    "eps": st.sampled_from([1e-10, 1e-3]),
                    "*loop": FUSED,
                },
            ),
            family(
                o.Adagrad,
                {"lr": RATE, "lr_decay": st.sampled_from([0.0, 0.3]), "maximize": st.booleans()},
                **rows,
                scheduled=scheduled(weight_decay=None),  # torch has none for sparse gradients
                name="sparse gradients",
            ),
        ),
        "AdadeltaRule": (
            family(o.Adadelta, {**COMMON, "rho": st.sampled_from([0.0, 0.9]), "eps": st.sampled_from([1e-6, 1e-2])}),
        ),
        "AdamaxRule": (family(o.Adamax, {**COMMON, "betas": BETAS}),),
        "NAdamRule": (
            family(
                o.NAdam,
                {
                    **COMMON,
                    "betas": BETAS,
                    "momentum_decay": st.sampled_from([4e-3, 0.1]),
                    "decoupled_weight_decay": st.booleans(),
                },
            ),
        ),
        "RAdamRule": (family(o.RAdam, {**COMMON, "betas": BETAS, "decoupled_weight_decay": st.booleans()}),),
        "RMSpropRule": (
            family(
                o.RMSprop,
                {
                    **COMMON,
                    "alpha": st.sampled_from([0.5, 0.99]),
                    "eps": st.sampled_from([1e-8, 1e-2]),
                    "centered": st.booleans(),
                    "momentum": st.sampled_from([0.0, 0.9]),
                },
                scheduled=scheduled(momentum=None),  # torch has no buffer where momentum is switched on later
            ),
        ),
        "RpropRule": (
            family(
                o.Rprop,
                {
                    **{n: s for n, s in COMMON.items() if n != "weight_decay"},
                    "etas": st.sampled_from([(0.5, 1.2), (0.9, 1.01)]),
                    "step_sizes": st.sampled_from([(1e-6, 50.0), (0.1, 0.2)]),
                },
            ),
        ),
        "ASGDRule": (
            family(
                o.ASGD,
                {
                    **COMMON,
                    "lambd": st.sampled_from([1e-4, 0.1]),
                    "alpha": st.sampled_from([0.75, 0.3]),
                    "t0": st.sampled_from([1e6, 2.0]),
                },
            ),
        ),
        "AdafactorRule": (
            family(
                o.Adafactor,
                {
                    **COMMON,
                    "beta2_decay": st.sampled_from([-0.8, -0.3]),
                    "d": st.sampled_from([1.0, 2.0]),
                    "eps": st.sampled_from([(None, 1e-3), (1e-5, 0.5)]),
                },
                scheduled=scheduled(eps=None),
            ),
        ),
        "LBFGSRule": tuple(
            family(o.LBFGS, hyper, **one_flat, name="strong Wolfe" if search else "fixed step")
            for search, hyper in searches.items()
        ),
    }
    if hasattr(o, "Muon"):  # since torch 2.9
        found["MuonRule"] = (family(o.Muon, ORTHOGONAL, shapes=((4, 5), (5, 3), (4, 4), (1, 6)), presence=PRESENCE),)
    return found
