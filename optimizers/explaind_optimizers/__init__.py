"""Built-in optimizer rules, one family a file, registered like any other plugin (entry-point group ``explaind``)."""

from __future__ import annotations

import explaind_core as explaind
from explaind_optimizers.adafactor import AdafactorRule
from explaind_optimizers.adagrad import AdadeltaRule, AdagradRule
from explaind_optimizers.adam import AdamRule, AdamWRule
from explaind_optimizers.adamax import AdamaxRule, NAdamRule, RAdamRule
from explaind_optimizers.muon import MuonRule
from explaind_optimizers.rmsprop import RMSpropRule
from explaind_optimizers.rprop import ASGDRule, RpropRule
from explaind_optimizers.sgd import SGDRule

_RULES = (
    ASGDRule,
    AdadeltaRule,
    AdafactorRule,
    AdagradRule,
    AdamRule,
    AdamWRule,
    AdamaxRule,
    MuonRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    RpropRule,
    SGDRule,
)
__all__ = [
    "ASGDRule",
    "AdadeltaRule",
    "AdafactorRule",
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "AdamaxRule",
    "MuonRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "RpropRule",
    "SGDRule",
    "explaind_update_rules",
]


@explaind.hookimpl
def explaind_update_rules() -> list[explaind.UpdateRule]:
    """All rules of this package."""
    return [rule() for rule in _RULES]
