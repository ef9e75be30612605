"""A proof in sympy that a rule's declaration is the optimizer's own recursion.

A rule's author writes one step of the optimizer as its paper has it, :meth:`explaind_core.UpdateRule.recursion`.
:func:`prove` runs that and the rule's own ``coefficients`` on symbols, unrolls both, and shows that they agree.
"""

from __future__ import annotations

from explaind_core.symbolic.branches import Datum
from explaind_core.symbolic.proof import Proof, ProvedConfiguration, prove
from explaind_core.symbolic.recursion import RecursionStep
from explaind_core.symbolic.standing import Standing, standing
from explaind_core.symbolic.tensor import SymbolicTensor

__all__ = ["Datum", "Proof", "ProvedConfiguration", "RecursionStep", "Standing", "SymbolicTensor", "prove", "standing"]
