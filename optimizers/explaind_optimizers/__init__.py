"""Built-in optimizer rules, one family a file, registered like any other plugin (entry-point group ``explaind``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import explaind_core as explaind
from explaind_optimizers.adafactor import AdafactorRule
from explaind_optimizers.adagrad import AdadeltaRule, AdagradRule
from explaind_optimizers.adam import AdamRule, AdamWRule
from explaind_optimizers.adamax import AdamaxRule, NAdamRule, RAdamRule
from explaind_optimizers.ademamix import AdEMAMixRule, SimplifiedAdEMAMixRule
from explaind_optimizers.lamb import LambRule
from explaind_optimizers.lars import LARSRule, SGDWRule
from explaind_optimizers.lbfgs import LBFGSRule
from explaind_optimizers.lion import LionRule, SignSGDRule, TigerRule
from explaind_optimizers.muon import MuonRule
from explaind_optimizers.prodigy import ProdigyRule, PytorchOptimizerProdigyRule
from explaind_optimizers.relatives import AdaBeliefRule, AggMoRule, LaPropRule, QHAdamRule, QHMRule
from explaind_optimizers.rmsprop import RMSpropRule
from explaind_optimizers.rprop import ASGDRule, RpropRule
from explaind_optimizers.schedule_free import (
    AdamWScheduleFreePaperRule,
    AdamWScheduleFreeRule,
    RAdamScheduleFreeRule,
    SGDScheduleFreeRule,
)
from explaind_optimizers.sgd import SGDRule
from explaind_optimizers.shampoo import ShampooRule
from explaind_optimizers.soap import SOAPRule
from explaind_optimizers.sophia import SophiaGRule, SophiaHRule
from explaind_optimizers.sparse_adam import SparseAdamRule

if TYPE_CHECKING:
    from explaind_core.rules import Trials

_RULES = (
    AdaBeliefRule,
    AdadeltaRule,
    AdafactorRule,
    AdagradRule,
    AdamaxRule,
    AdamRule,
    AdamWRule,
    AdamWScheduleFreePaperRule,
    AdamWScheduleFreeRule,
    AdEMAMixRule,
    AggMoRule,
    ASGDRule,
    LambRule,
    LaPropRule,
    LARSRule,
    LBFGSRule,
    LionRule,
    MuonRule,
    NAdamRule,
    ProdigyRule,
    PytorchOptimizerProdigyRule,
    QHAdamRule,
    QHMRule,
    RAdamRule,
    RAdamScheduleFreeRule,
    RMSpropRule,
    RpropRule,
    SGDRule,
    SGDScheduleFreeRule,
    SGDWRule,
    ShampooRule,
    SignSGDRule,
    SimplifiedAdEMAMixRule,
    SOAPRule,
    SophiaGRule,
    SophiaHRule,
    SparseAdamRule,
    TigerRule,
)
__all__ = [
    "ASGDRule",
    "AdEMAMixRule",
    "AdaBeliefRule",
    "AdadeltaRule",
    "AdafactorRule",
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "AdamWScheduleFreePaperRule",
    "AdamWScheduleFreeRule",
    "AdamaxRule",
    "AggMoRule",
    "LARSRule",
    "LBFGSRule",
    "LaPropRule",
    "LambRule",
    "LionRule",
    "MuonRule",
    "NAdamRule",
    "ProdigyRule",
    "PytorchOptimizerProdigyRule",
    "QHAdamRule",
    "QHMRule",
    "RAdamRule",
    "RAdamScheduleFreeRule",
    "RMSpropRule",
    "RpropRule",
    "SGDRule",
    "SGDScheduleFreeRule",
    "SGDWRule",
    "SOAPRule",
    "ShampooRule",
    "SignSGDRule",
    "SimplifiedAdEMAMixRule",
    "SophiaGRule",
    "SophiaHRule",
    "SparseAdamRule",
    "TigerRule",
    "explaind_trials",
    "explaind_update_rules",
]


@explaind.hookimpl
def explaind_update_rules() -> list[explaind.UpdateRule]:
    """All rules of this package."""
    return [rule() for rule in _RULES]


@explaind.hookimpl
def explaind_trials(rule: explaind.UpdateRule) -> tuple[Trials, ...] | None:
    """How the conformance kit checks the rules of this package."""
    from explaind_optimizers.trials import torch_trials  # brings hypothesis along
    from explaind_optimizers.trials_elsewhere import trials_elsewhere

    if not isinstance(rule, _RULES):
        return None
    return torch_trials().get(type(rule).__name__) or trials_elsewhere(rule) or None
