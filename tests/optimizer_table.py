"""Optimizers of other packages: what is drawn to check their rules. An entry imports its package when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import explaind_optimizers as rules
import pytest
import torch
from hypothesis import strategies as st

from explaind_core import UpdateRule
from explaind_core.cases import SHAPES, Shapes
from explaind_core.coefficients import qualified_name
from explaind_core.trials import PRESENCE, Trials

Strategies = Mapping[str, st.SearchStrategy[Any]]


@dataclass(frozen=True)
class Entry:
    """One optimizer class, and the families of trainings that its rule is checked on.

    Attributes:
        rule: its rule. path: ``package:Class``, as users import it.
        hyper, scheduled: option -> what is drawn for the constructor; for a schedule and a second group.
        ready: called with a new optimizer, before it is used.
    """

    rule: type[UpdateRule]
    path: str
    hyper: Strategies
    scheduled: Strategies
    shapes: Shapes = SHAPES
    presence: Sequence[str] = PRESENCE
    groups: int = 2
    tolerance: float = 1e-14
    points: tuple[str, ...] = ("gradient",)
    ready: Callable[[torch.optim.Optimizer], Any] | None = None

    def kind(self) -> type[torch.optim.Optimizer]:
        """The class; skips the test where its package is not installed."""
        package, _, name = self.path.partition(":")
        found = getattr(pytest.importorskip(package), name)
        assert qualified_name(found) in self.rule.optimizers
        return found

    def make(self, groups: Any, **options: Any) -> torch.optim.Optimizer:
        """A new optimizer, seen by its rule as a recorder would show it."""
        optimizer = self.kind()(groups, **options)
        assert self.rule().claims(optimizer)
        if self.ready is not None:
            self.ready(optimizer)
        return optimizer

    def trials(self) -> list[Trials]:
        """For the conformance kit, one for each point."""
        return [
            Trials(
                self.make,
                self.hyper,
                self.scheduled,
                shapes=self.shapes,
                presence=self.presence,
                groups=self.groups,
                point=point,
                tolerance=self.tolerance,
                name=point,
            )
            for point in self.points
        ]


LR = st.floats(1e-4, 1.0) | st.just(0.0)
BETA = st.sampled_from([0.1, 0.5, 0.98])
BETAS = st.tuples(st.sampled_from([0.0, 0.5, 0.98]), st.sampled_from([0.5, 0.9, 0.999]))
EPS = st.sampled_from([1e-8, 1e-3])
DECAY = st.sampled_from([0.0, 0.1])
SWITCH = st.booleans()
FOREACH = st.sampled_from([None, True, False])

#: What nearly all of pytorch_optimizer's classes have.
PLAIN = {"lr": LR, "weight_decay": DECAY, "maximize": SWITCH, "foreach": FOREACH}
COMMON = PLAIN | {"weight_decouple": SWITCH, "fixed_decay": SWITCH}
SCHEDULED = {"lr": LR, "weight_decay": st.sampled_from([0.0, 0.01, 0.2])}
ADAPTIVE = SCHEDULED | {"betas": BETAS, "eps": EPS}
ADANORM = {"adanorm": SWITCH, "adanorm_r": st.sampled_from([0.5, 0.95])}
RECTIFY = {"rectify": SWITCH, "n_sma_threshold": st.sampled_from([4, 5, 6]), "degenerated_to_sgd": SWITCH}
SCHEDULE_FREE = {
    "lr": LR,
    "weight_decay": DECAY,
    "warmup_steps": st.sampled_from([0, 3]),
    "r": st.sampled_from([0.0, 0.5]),
    "weight_lr_power": st.sampled_from([0.0, 2.0]),
}
FREE_BETAS = {"betas": st.tuples(st.sampled_from([0.5, 0.9]), st.sampled_from([0.9, 0.999])), "eps": EPS}


def train(optimizer: Any) -> None:
    """Schedule-Free optimizers start in evaluation mode."""
    optimizer.train()


def free(rule: type[UpdateRule], path: str, hyper: Strategies, **more: Any) -> Entry:
    """An entry of the Schedule-Free family. Its interpolation (betas, momentum) is one and the same throughout:
    ``eval()`` and ``train()`` only invert each other then."""
    scheduled = {"lr": LR, "weight_decay": st.sampled_from([0.0, 0.01, 0.2])}
    return Entry(rule, path, hyper, scheduled, points=("gradient", "evaluated"), ready=train, **more)


TABLE: dict[str, Entry] = {
    "Lion": Entry(
        rules.LionRule,
        "pytorch_optimizer:Lion",
        COMMON | ADANORM | {"betas": BETAS, "use_gc": SWITCH, "cautious": SWITCH},
        SCHEDULED | {"betas": BETAS},
    ),
    "Tiger": Entry(rules.TigerRule, "pytorch_optimizer:Tiger", COMMON | {"beta": BETA}, SCHEDULED | {"beta": BETA}),
    "SignSGD": Entry(
        rules.SignSGDRule,
        "pytorch_optimizer:SignSGD",
        PLAIN | {"weight_decouple": SWITCH, "momentum": st.sampled_from([0.0, 0.9])},
        SCHEDULED | {"momentum": st.sampled_from([0.0, 0.9])},
    ),
    "Lamb": Entry(
        rules.LambRule,
        "pytorch_optimizer:Lamb",
        COMMON
        | ADANORM
        | RECTIFY
        | {
            "betas": BETAS,
            "eps": EPS,
            "grad_averaging": SWITCH,
            "max_grad_norm": st.sampled_from([0.0, 0.5, 1.0]),
            "adam": SWITCH,
            "pre_norm": SWITCH,
            "adam_debias": SWITCH,
        },
        ADAPTIVE,
    ),
    "LARS": Entry(
        rules.LARSRule,
        "pytorch_optimizer:LARS",
        PLAIN
        | {
            "momentum": st.sampled_from([0.0, 0.9]),
            "dampening": st.sampled_from([0.0, 0.3]),
            "trust_coefficient": st.sampled_from([1e-3, 0.5]),
            "nesterov": SWITCH,
        },
        SCHEDULED | {"momentum": st.sampled_from([0.0, 0.9]), "trust_coefficient": st.floats(1e-3, 1.0)},
    ),
    "SGDW": Entry(
        rules.SGDWRule,
        "pytorch_optimizer:SGDW",
        PLAIN
        | {
            "weight_decouple": SWITCH,
            "momentum": st.sampled_from([0.0, 0.9]),
            "dampening": st.sampled_from([0.0, 0.3]),
            "nesterov": SWITCH,
        },
        SCHEDULED | {"momentum": st.sampled_from([0.0, 0.9])},
    ),
    "AdEMAMix": Entry(
        rules.AdEMAMixRule,
        "pytorch_optimizer:AdEMAMix",
        COMMON
        | {
            "betas": st.tuples(BETA, st.sampled_from([0.5, 0.999]), st.sampled_from([0.9, 0.9999])),
            "eps": EPS,
            "alpha": st.sampled_from([0.0, 5.0]),
            "t_alpha_beta3": st.sampled_from([None, 4, 100.0]),
            "cautious": SWITCH,
            "stable_adamw": SWITCH,
        },
        SCHEDULED | {"alpha": st.sampled_from([0.0, 0.5, 5.0])},
    ),
    "SimplifiedAdEMAMix": Entry(
        rules.SimplifiedAdEMAMixRule,
        "pytorch_optimizer:SimplifiedAdEMAMix",
        COMMON
        | {
            "betas": st.tuples(st.sampled_from([0.9, 0.99]), st.sampled_from([0.5, 0.95])),
            "eps": EPS,
            "alpha": st.sampled_from([0.0, 2.0]),
            "beta1_warmup": st.sampled_from([None, 3]),
            "min_beta1": st.sampled_from([0.5, 0.9]),
        },
        SCHEDULED | {"alpha": st.sampled_from([0.0, 0.5, 5.0])},
    ),
    "AdamWScheduleFree": free(
        rules.AdamWScheduleFreeRule, "schedulefree:AdamWScheduleFree", SCHEDULE_FREE | FREE_BETAS
    ),
    "AdamWScheduleFreeReference": free(
        rules.AdamWScheduleFreeRule,
        "schedulefree:AdamWScheduleFreeReference",
        SCHEDULE_FREE | FREE_BETAS | {"decay_at_z": SWITCH},
    ),
    "AdamWScheduleFreePaper": free(
        rules.AdamWScheduleFreePaperRule, "schedulefree:AdamWScheduleFreePaper", SCHEDULE_FREE | FREE_BETAS
    ),
    "SGDScheduleFree": free(
        rules.SGDScheduleFreeRule,
        "schedulefree:SGDScheduleFree",
        SCHEDULE_FREE | {"momentum": st.sampled_from([0.5, 0.9]), "foreach": SWITCH},
    ),
    "SGDScheduleFreeReference": free(
        rules.SGDScheduleFreeRule,
        "schedulefree:SGDScheduleFreeReference",
        SCHEDULE_FREE | {"momentum": st.sampled_from([0.5, 0.9])},
    ),
    "RAdamScheduleFree": free(
        rules.RAdamScheduleFreeRule,
        "schedulefree:RAdamScheduleFree",
        {n: s for n, s in SCHEDULE_FREE.items() if n != "warmup_steps"}
        | FREE_BETAS
        | {"silent_sgd_phase": SWITCH, "foreach": SWITCH},
    ),
    "ScheduleFreeAdamW": free(
        rules.AdamWScheduleFreeRule,
        "pytorch_optimizer:ScheduleFreeAdamW",
        PLAIN | SCHEDULE_FREE | FREE_BETAS | {"ams_bound": SWITCH, "decoupling_c": st.sampled_from([0, 2, 50])},
    ),
    "ScheduleFreeSGD": free(
        rules.SGDScheduleFreeRule,
        "pytorch_optimizer:ScheduleFreeSGD",
        PLAIN | SCHEDULE_FREE | {"momentum": st.sampled_from([0.5, 0.9])},
    ),
    "ScheduleFreeRAdam": free(
        rules.RAdamScheduleFreeRule,
        "pytorch_optimizer:ScheduleFreeRAdam",
        PLAIN
        | {n: s for n, s in SCHEDULE_FREE.items() if n != "warmup_steps"}
        | FREE_BETAS
        | {"silent_sgd_phase": SWITCH},
    ),
    # Prodigy reads most options, and pytorch_optimizer's the learning rate too, from the first group for all groups.
    "Prodigy": Entry(
        rules.ProdigyRule,
        "prodigyopt:Prodigy",
        {
            "lr": st.floats(1e-2, 1.0),
            "betas": BETAS,
            "beta3": st.sampled_from([None, 0.5]),
            "eps": EPS,
            "weight_decay": DECAY,
            "decouple": SWITCH,
            "use_bias_correction": SWITCH,
            "safeguard_warmup": SWITCH,
            "d0": st.sampled_from([1e-6, 1e-1]),
            "d_coef": st.sampled_from([1.0, 2.0]),
            "growth_rate": st.sampled_from([float("inf"), 1.02]),
            "slice_p": st.sampled_from([1, 3]),
        },
        {"weight_decay": st.sampled_from([0.0, 0.01, 0.2]), "eps": EPS},
    ),
    "Prodigy of pytorch_optimizer": Entry(
        rules.PytorchOptimizerProdigyRule,
        "pytorch_optimizer:Prodigy",
        COMMON
        | {
            "lr": st.floats(1e-2, 1.0),
            "betas": BETAS,
            "beta3": st.sampled_from([None, 0.5]),
            "d0": st.sampled_from([1e-6, 1e-1]),
            "d_coef": st.sampled_from([1.0, 2.0]),
            "growth_rate": st.sampled_from([float("inf"), 1.02]),
            "bias_correction": SWITCH,
            "safeguard_warmup": SWITCH,
            "eps": st.sampled_from([1e-8, 1e-3, None]),
        },
        {"weight_decay": st.sampled_from([0.0, 0.01, 0.2])},
    ),
    "SOAP": Entry(
        rules.SOAPRule,
        "pytorch_optimizer:SOAP",
        {
            "lr": LR,
            "betas": BETAS,
            "shampoo_beta": st.sampled_from([None, 0.5]),
            "weight_decay": DECAY,
            "precondition_frequency": st.sampled_from([1, 2, 10]),
            "max_precondition_dim": st.sampled_from([3, 4, 10000]),
            "precondition_1d": SWITCH,
            "correct_bias": SWITCH,
            "normalize_gradient": SWITCH,
            "eps": EPS,
            "maximize": SWITCH,
        },
        ADAPTIVE,
    ),
    "SOAP, merging axes": Entry(
        rules.SOAPRule,
        "pytorch_optimizer:SOAP",
        {
            "lr": LR,
            "merge_dims": st.just(True),
            # At least two axes must be left: with one, this class reshapes to a single element and fails.
            "max_precondition_dim": st.sampled_from([2, 6]),
            "precondition_frequency": st.sampled_from([1, 3]),
            "data_format": st.sampled_from(["channels_first", "channels_last"]),
            "normalize_gradient": SWITCH,
        },
        SCHEDULED,
        shapes=((4, 5), (2, 3, 2), (2, 3, 2, 4)),
    ),
    "Shampoo": Entry(
        rules.ShampooRule,
        "pytorch_optimizer:Shampoo",
        {
            "lr": LR,
            "weight_decay": DECAY,
            "weight_decouple": SWITCH,
            "fixed_decay": SWITCH,
            "preconditioning_compute_steps": st.sampled_from([1, 2]),
            "matrix_eps": st.sampled_from([1e-6, 1e-2]),
            "maximize": SWITCH,
        },
        SCHEDULED,
    ),
    "Shampoo with momentum": Entry(
        rules.ShampooRule,
        "pytorch_optimizer:Shampoo",
        {
            "lr": LR,
            "momentum": st.sampled_from([0.5, 0.9]),
            "weight_decay": DECAY,
            "weight_decouple": SWITCH,
            "fixed_decay": SWITCH,
            "preconditioning_compute_steps": st.sampled_from([1, 2]),
            "matrix_eps": st.sampled_from([1e-6, 1e-2]),
            "maximize": SWITCH,
        },
        SCHEDULED | {"momentum": st.sampled_from([0.0, 0.5])},
        tolerance=1e-10,
    ),
    "AdaBelief": Entry(
        rules.AdaBeliefRule,
        "pytorch_optimizer:AdaBelief",
        COMMON
        | ADANORM
        | RECTIFY
        | {"betas": BETAS, "eps": st.sampled_from([1e-16, 1e-3]), "ams_bound": SWITCH, "adam_debias": SWITCH},
        ADAPTIVE,
    ),
    "LaProp": Entry(
        rules.LaPropRule,
        "pytorch_optimizer:LaProp",
        COMMON
        | {
            "betas": BETAS,
            "eps": st.sampled_from([1e-15, 1e-3]),
            "centered": SWITCH,
            "steps_before_using_centered": st.sampled_from([1, 10]),
            "ams_bound": SWITCH,
            "cautious": SWITCH,
        },
        SCHEDULED,
    ),
    "QHAdam": Entry(
        rules.QHAdamRule,
        "pytorch_optimizer:QHAdam",
        COMMON | {"betas": BETAS, "eps": EPS, "nus": st.sampled_from([(1.0, 1.0), (0.7, 0.5), (0.0, 0.0)])},
        ADAPTIVE,
    ),
    "QHM": Entry(
        rules.QHMRule,
        "pytorch_optimizer:QHM",
        COMMON | {"momentum": st.sampled_from([0.0, 0.9]), "nu": st.sampled_from([0.0, 0.7, 1.0])},
        SCHEDULED | {"momentum": st.sampled_from([0.0, 0.9]), "nu": st.sampled_from([0.0, 0.3, 1.0])},
    ),
    "AggMo": Entry(
        rules.AggMoRule,
        "pytorch_optimizer:AggMo",
        COMMON | {"betas": st.sampled_from([(0.0, 0.9, 0.99), (0.5, 0.9)])},
        SCHEDULED,
    ),
}


def installed(path: str) -> bool:
    """Whether the package of an entry can be imported."""
    try:
        importlib.import_module(path.partition(":")[0])
    except ImportError:
        return False
    return True
