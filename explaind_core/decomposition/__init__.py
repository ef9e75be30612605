"""Every update of a run split by its rule: kernel, regularization, prehistory, penalty.

It may import run, store, training_step, rules and what these may import.
"""

from __future__ import annotations

from explaind_core.decomposition.decompose import Decomposer, StepDecomposition, decompose
from explaind_core.decomposition.fit_inferred import fit_inferred
from explaind_core.decomposition.rule_view import FLAT, split_flat
from explaind_core.decomposition.split import ParameterFilter, UpdateSplit, split_step
from explaind_core.decomposition.tape import Tape
from explaind_core.decomposition.terms import Updates, term_names, updates_of
from explaind_core.decomposition.update_check import check_update

__all__ = [
    "FLAT",
    "Decomposer",
    "ParameterFilter",
    "StepDecomposition",
    "Tape",
    "UpdateSplit",
    "Updates",
    "check_update",
    "decompose",
    "fit_inferred",
    "split_flat",
    "split_step",
    "term_names",
    "updates_of",
]
