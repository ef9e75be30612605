"""What a rule's ``recursion`` is shown, and the hyper-parameters that a proof goes through."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.rules import UpdateRule
from explaind_core.symbolic.branches import Datum, Option
from explaind_core.symbolic.tensor import SymbolicTensor, exact

__all__ = ["Configuration", "RecursionStep", "State", "configurations", "hyper_parameters"]

Configuration = Mapping[str, Any]
#: What a configuration may say that is no option of the optimizer.
ASIDE = ("point", "ndim")


class State(dict[str, Any]):
    """The optimizer's state of one parameter; an entry that is missing reads as 0."""

    def __init__(self, entries: Mapping[str, Any], keep: Callable[[str, Any], Any] | None = None) -> None:
        super().__init__(entries)
        self._keep = keep

    def __missing__(self, key: str) -> SymbolicTensor:
        return SymbolicTensor(0)

    def __setitem__(self, key: str, value: Any) -> None:
        value = value if isinstance(value, SymbolicTensor) else SymbolicTensor(value)
        if self._keep:
            # In place, so that in v = state["v"] = ... both are the same symbol.
            value.expr = self._keep(key, value.expr)
        super().__setitem__(key, value)


@dataclass
class RecursionStep:
    """One step, as :meth:`explaind_core.UpdateRule.recursion` is shown it; numbers are :class:`SymbolicTensor` too.

    Attributes:
        theta: this parameter before the step.
        gradient: of this parameter, as it is fed.
        hyper: its group's hyper-parameters before the step.
        clock: t, this parameter's own steps so far, this one included.
        step: s, the optimizer's own count.
        state: this parameter's state in the optimizer, to be updated; an entry that is missing reads as 0.
        hyper_after: the group's entries that the optimizer changes by itself, to be written.
        name: of the step, in the names of its symbols.
        point: ``"evaluated"`` where the recursion is to return ``theta`` + the change of the point where the model is
            evaluated, as ``proved_for`` says (see :attr:`explaind_core.RecordedStep.point`).
        sparse: whether the recursion has read ``mask``, which says that gradients are sparse.
        mask: of a sparse gradient: 1 where it stores a value, 0 elsewhere.

    Example:
        >>> two = SymbolicTensor(2)
        >>> step = RecursionStep(theta=two, gradient=two, hyper={"lr": 0.5})
        >>> step.state["m"] = 0.5 * step.state["m"] + step.gradient
        >>> step.theta - step.hyper["lr"] * step.sqrt(step.state["m"] * 2)
        SymbolicTensor(1)
    """

    theta: Any
    gradient: Any
    hyper: Mapping[str, Any]
    clock: Any = 1
    step: Any = 1
    state: State = field(default_factory=lambda: State({}))
    hyper_after: State = field(default_factory=lambda: State({}))
    name: str = ""
    point: str = "gradient"
    sparse: bool = False

    @property
    def mask(self) -> SymbolicTensor:  # noqa: D102
        self.sparse = True
        return SymbolicTensor(Datum(f"mask_{self.name}", real=True))

    def given(self, name: str, *, nonnegative: bool = False) -> SymbolicTensor:
        """Something from outside of this parameter's gradients (a Hessian, a sum over all tensors): any value."""
        sign = {"nonnegative" if nonnegative else "real": True}
        return SymbolicTensor(Datum(f"{name}_{self.name}", **sign))

    @staticmethod
    def sqrt(x: Any) -> SymbolicTensor:
        """The square root."""
        return SymbolicTensor(sympy.sqrt(exact(x)))

    @staticmethod
    def log(x: Any) -> SymbolicTensor:
        """The natural logarithm."""
        return SymbolicTensor(sympy.log(exact(x)))

    @staticmethod
    def exp(x: Any) -> SymbolicTensor:
        """The exponential function."""
        return SymbolicTensor(sympy.exp(exact(x)))

    @staticmethod
    def sign(x: Any) -> SymbolicTensor:
        """-1, 0 or 1."""
        return SymbolicTensor(sympy.sign(exact(x)))

    @staticmethod
    def max(*x: Any) -> SymbolicTensor:
        """The largest, elementwise."""
        return SymbolicTensor(sympy.Max(*map(exact, x)))

    @staticmethod
    def min(*x: Any) -> SymbolicTensor:
        """The smallest, elementwise."""
        return SymbolicTensor(sympy.Min(*map(exact, x)))

    @staticmethod
    def mean(x: Any) -> SymbolicTensor:
        """The mean over the tensor."""
        return SymbolicTensor(x).mean()

    @staticmethod
    def norm(x: Any) -> SymbolicTensor:
        """The 2-norm of the tensor."""
        return SymbolicTensor(x).norm()


def configurations(rule: UpdateRule) -> Iterator[Configuration]:
    """Every combination of the values in ``proved_for`` and ``fixed``."""
    listed = {**rule.fixed, **rule.proved_for}
    for values in itertools.product(*listed.values()):
        found: dict[str, Any] = {}
        for names, value in zip(listed, values, strict=True):
            together = names.split()
            found |= {names: value} if len(together) == 1 else zip(together, value, strict=True)  # type: ignore[call-overload]
        yield found


def hyper_parameters(
    rule: UpdateRule, configuration: Configuration, label: object = "", step: Any = None
) -> dict[str, Any]:
    """The hyper-parameters of the step named ``label``: symbols, but where the configuration has a value.

    Args:
        rule: whose options they are.
        configuration: option -> value, or ``...`` for a symbol.
        label: the step's name, which ends the symbols' names.
        step: the optimizer's step, for those that are a function of it; with None these are symbols too.

    Example:
        >>> from explaind_optimizers import AdamWRule
        >>> hyper_parameters(AdamWRule(), {"betas": (..., 0.5)}, 2)["betas"]
        (SymbolicTensor(beta1_2), SymbolicTensor(1/2))
    """
    present = {n: v for n, v in configuration.items() if v is not NotImplemented and n not in ASIDE}
    listed = {name: _value(name, value, label, step) for name, value in present.items()}
    free = {n: SymbolicTensor(Option(_named(n, label), positive=True)) for n in rule.options - set(configuration)}
    return {**free, **listed}


def _value(name: str, value: Any, label: object, step: Any = None) -> Any:
    if callable(value):
        return SymbolicTensor(Option(_named(name, label), positive=True)) if step is None else value(step)
    if isinstance(value, list):
        value = value[(label - 1) % len(value) if isinstance(label, int) else 0]
    if value is ...:
        return SymbolicTensor(sympy.Symbol(_named(name, label), positive=True))
    if isinstance(value, tuple):
        single = name if name == "eps" else name.removesuffix("s")
        return tuple(_value(f"{single}{k}", v, label) for k, v in enumerate(value, start=1))
    number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    return SymbolicTensor(value) if number else value


def _named(name: str, label: object) -> str:
    return f"{name}_{label}" if label != "" else name
