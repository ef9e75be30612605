"""How the conformance kit draws trainings for a rule."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from explaind_core.errors import ConformanceError
from explaind_core.rules.held_options import constructor_options
from explaind_core.rules.rule import UpdateRule

if TYPE_CHECKING:  # loaded where trainings are drawn, and by plugins that say how: nobody else needs hypothesis
    from hypothesis import strategies as st

__all__ = ["PRESENCE", "SHAPES", "MakeOptimizer", "Shapes", "Trials", "default_trials", "find_optimizer"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Shapes = tuple[tuple[int, ...], ...]
#: Tensors without axes, vectors, matrices and more.
SHAPES: Shapes = ((), (3,), (4, 5), (2, 3, 2))


#: Which kinds of gradient a parameter may have in a step.
PRESENCE = ("yes", "yes", "none", "zero", "some zeros")

Strategies = Mapping[str, "st.SearchStrategy[Any]"]


def _learning_rates() -> Strategies:
    from hypothesis import strategies as st

    return {"lr": st.floats(1e-4, 1.0)}


@dataclass(frozen=True)
class Trials:
    """One family of trainings.

    Attributes:
        make_optimizer: called with parameter groups and the options drawn from ``hyper``.
        hyper: constructor option -> hypothesis strategy; under a key that starts with ``*``, a strategy of
            dictionaries, for options that are drawn together.
        scheduled: hyper-parameter -> strategy, for values set anew in a group before a step, and for a second group.
        shapes: of the parameters, a tuple for each.
        presence: which kinds of gradient occur (see :class:`~explaind_core.testing.Case`).
        groups: how many parameter groups, 1 or 2.
        closure: whether training goes by ``step(closure)``.
        point: ``"evaluated"`` for the point where the model is evaluated.
        tolerance: the largest error of one step in float64, relative to what is compared.
        name: what is special about this family; empty for the plain one.
        untested: options that are left at their default values.
        may_refuse: whether the optimizer's constructor may refuse drawn combinations with a ValueError, which are then
            counted and left out.
    """

    make_optimizer: MakeOptimizer
    hyper: Strategies = field(default_factory=dict)
    scheduled: Strategies = field(default_factory=_learning_rates)
    shapes: Shapes = SHAPES
    presence: Sequence[str] = PRESENCE
    groups: int = 2
    closure: bool = False
    point: str = "gradient"
    tolerance: float = 1e-14
    name: str = ""
    untested: tuple[str, ...] = ()
    may_refuse: bool = False


def find_optimizer(rule: UpdateRule) -> type[torch.optim.Optimizer]:
    """The first of the classes that ``rule`` speaks for which can be imported here.

    Raises:
        ConformanceError: none can.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> find_optimizer(SGDRule())
        <class 'torch.optim.sgd.SGD'>
    """
    for name in rule.optimizers:
        module, _, attribute = name.rpartition(".")
        try:
            kind: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
        return kind
    raise ConformanceError(
        f"no optimizer that {type(rule).__name__} speaks for is installed here",
        expected="one of " + ", ".join(rule.optimizers) if rule.optimizers else "qualified names in rule.optimizers",
        remedy="install its package, or correct the name (module.Class)",
    )


def default_trials(rule: UpdateRule) -> Trials:
    """Trainings drawn from what the optimizer's constructor tells: names and default values of its options.

    Learning rates, decay, momenta, betas and switches are drawn; what cannot be guessed stays at its default and is
    listed as ``untested``.

    Raises:
        ConformanceError: no optimizer that the rule speaks for is installed.
    """
    from hypothesis import strategies as st

    kind = find_optimizer(rule)
    hyper: dict[str, st.SearchStrategy[Any]] = {}
    scheduled: dict[str, st.SearchStrategy[Any]] = {}
    untested = []
    for name, default in constructor_options(kind).items():
        if name in rule.fixed:
            hyper[name] = st.sampled_from(list(rule.fixed[name]))
        elif name not in rule.options or (found := _guess(name, default)) is None:
            untested.append(name)
        else:
            hyper[name] = found
            if not isinstance(default, bool):
                scheduled[name] = found
    return Trials(kind, hyper, scheduled, untested=tuple(untested), may_refuse=True)


def _guess(name: str, default: Any) -> st.SearchStrategy[Any] | None:
    from hypothesis import strategies as st

    if isinstance(default, bool):
        return st.booleans()
    if name == "lr":
        return st.floats(1e-4, 1.0)
    if isinstance(default, tuple) and all(isinstance(x, float) and 0 < x < 1 for x in default):
        return st.tuples(*(st.sampled_from([0.5, x]) for x in default))
    if isinstance(default, int | float):
        if "decay" in name and default < 0.5:
            return st.sampled_from([0.0, 0.1])
        if name.startswith("eps"):
            return st.sampled_from([default, 1e-3])
        if 0 <= default < 1:  # a momentum, a dampening, an average
            return st.sampled_from([default, 0.5])
    return None
