"""A rule's recursion and its declaration, unrolled side by side on symbols."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from explaind_core.coefficients import OptimizerState, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.errors import ExplaindError, ProofError
from explaind_core.operators import LinearOperator
from explaind_core.symbolic.algebra import as_symbols, is_nonnegative, linear_coefficients
from explaind_core.symbolic.branches import Datum, Option
from explaind_core.symbolic.tensor import SymbolicTensor, exact

__all__ = ["Declared", "RecursionStep", "Unrolled", "UnrolledStep", "configurations", "declare", "hyper_parameters"]

Configuration = Mapping[str, Any]
NAME = "parameter"


class State(dict[str, Any]):
    """The optimizer's state of one parameter; an entry that is missing reads as 0."""

    def __init__(self, entries: Mapping[str, Any], keep: Callable[[str, Any], Any] | None = None) -> None:
        super().__init__(entries)
        self._keep = keep

    def __missing__(self, key: str) -> SymbolicTensor:
        return SymbolicTensor(0)

    def __setitem__(self, key: str, value: Any) -> None:
        value = SymbolicTensor(value)
        super().__setitem__(key, self._keep(key, value) if self._keep else value)


@dataclass
class RecursionStep:
    """One step, as :meth:`UpdateRule.recursion` is shown it; numbers and tensors are :class:`SymbolicTensor`.

    Attributes:
        theta, gradient: of this parameter, before the step. hyper: its group's hyper-parameters before the step.
        clock: t, this parameter's own steps so far, this one included. step: s, the optimizer's.
        state: this parameter's state in the optimizer, to be updated; an entry that is missing reads as 0.
        hyper_after: the group's entries that the optimizer changes by itself, to be written.

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

    @staticmethod
    def sqrt(x: Any) -> SymbolicTensor:
        """The square root."""
        return SymbolicTensor(sympy.sqrt(exact(x)))

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
        yield dict(zip(listed, values, strict=True))


def hyper_parameters(rule: UpdateRule, configuration: Configuration, label: object = "") -> dict[str, Any]:
    """The hyper-parameters of the step named ``label``: symbols, but where the configuration has a value."""
    symbols = {name: _value(name, value, label) for name, value in configuration.items()}
    free = {n: SymbolicTensor(Option(_named(n, label), positive=True)) for n in rule.options - set(configuration)}
    return {**free, **symbols}


def _value(name: str, value: Any, label: object) -> Any:
    if isinstance(value, list):
        value = value[(int(str(label) or 1) - 1) % len(value)]
    if value is ...:
        return SymbolicTensor(sympy.Symbol(_named(name, label), positive=True))
    if isinstance(value, tuple):
        return tuple(_value(f"{name.removesuffix('s')}{k}", v, label) for k, v in enumerate(value, start=1))
    number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    return SymbolicTensor(value) if number else value


def _named(name: str, label: object) -> str:
    return f"{name}_{label}" if label != "" else name


@dataclass(frozen=True)
class Declared:
    """The coefficients of one step, as expressions: what every operator multiplies an element by."""

    A: tuple[tuple[Any, ...], ...]
    B: tuple[Any, ...]
    C: tuple[Any, ...]
    D: Any
    P: Any
    E: Any
    W: Any
    rho: Any
    coefficients: StepCoefficients


def declare(rule: UpdateRule, recorded: RecordedStep) -> Declared:
    """Ask the rule itself, on symbols."""
    try:
        found = rule.coefficients(recorded)
        f = found.filter
        return Declared(
            tuple(tuple(map(_factor, row)) for row in f.A),
            tuple(map(_factor, f.B)),
            tuple(map(_factor, f.C)),
            _factor(f.D),
            _factor(found.preconditioner),
            _factor(found.gradient_operator),
            _factor(found.coupled_decay),
            _factor(found.decoupled_decay),
            found,
        )
    except ExplaindError:
        raise
    except Exception as error:
        raise ProofError(
            f"{type(rule).__name__}.coefficients does not run on symbols: {error}",
            where=f"step {recorded.step}",
            remedy="use torch's elementwise operations, mean and norm, or say in no_closed_form why it cannot",
        ) from error


def _factor(coefficient: Any) -> Any:
    return exact(coefficient.apply(SymbolicTensor(1)) if isinstance(coefficient, LinearOperator) else coefficient)


@dataclass(frozen=True)
class UnrolledStep:
    """One step of both: theta_s - theta_{s-1} by the recursion and by the declaration, and what it is made of.

    Attributes:
        clock: t. gradients: g_1, ..., g_t. thetas: theta_0, ..., theta_{t-1}.
        expected, got: the update by the recursion, and by the declaration.
        filter_states: the filter's states after the step. state: the recursion's. declared: the coefficients.
    """

    clock: int
    gradients: list[Any]
    thetas: list[Any]
    expected: Any
    got: Any
    filter_states: tuple[Any, ...]
    state: Mapping[str, Any]
    declared: Declared


class Unrolled:
    """Both, unrolled from the start for one configuration.

    The parameter skips the optimizer's step 2, so that its own clock is not the optimizer's. theta_{t-1} is a new
    symbol at every step. State entries that are no filter states become symbols too, so that updates stay linear;
    ``definitions`` has what they stand for.

    Attributes:
        steps: the unrolled steps. definitions: symbol of a state entry -> its expression, oldest first.
        constant: symbol of a step's hyper-parameter -> the one without a step.
    """

    def __init__(self, rule: UpdateRule, configuration: Configuration, steps: int) -> None:
        self.rule, self.configuration = rule, configuration
        self.steps: list[UnrolledStep] = []
        self.definitions: dict[Any, Any] = {}
        self.constant: dict[Any, Any] = {}
        self._gradients: list[Any] = []
        self._thetas: list[Any] = []
        self._symbols: dict[Any, Any] = {}
        self._filter: tuple[Any, ...] = ()
        self._clock = 0
        self._state = State({}, self._keep)
        self._group: dict[str, Any] = {}
        for _ in range(steps):
            self._advance()

    def expand(self, expr: Any) -> Any:
        """``expr`` with every state entry's symbol replaced by what it stands for."""
        for symbol, definition in reversed(self.definitions.items()):
            if expr.has(symbol):
                expr = expr.xreplace({symbol: definition})
        return expr

    def _hyper(self, label: object) -> dict[str, Any]:
        return hyper_parameters(self.rule, self.configuration, label) | self._group

    def _advance(self) -> None:
        self._clock += 1
        t, number = SymbolicTensor(self._clock), SymbolicTensor(self._clock + (self._clock > 1))
        theta, gradient = (Datum(n, real=True) for n in (f"theta_{self._clock - 1}", f"g_{self._clock}"))
        self._thetas, self._gradients = [*self._thetas, theta], [*self._gradients, gradient]
        hyper = OptimizerState(NAME, self._hyper(self._clock), "parameter group")
        self._remember_constants()
        before, after_group = dict(self._state), State({}, self._keep)
        recursion_step = RecursionStep(
            SymbolicTensor(theta), SymbolicTensor(gradient), hyper, t, number, self._state, after_group
        )
        following = self._known(exact(self.rule.recursion(recursion_step)))
        self._group |= after_group
        recorded = RecordedStep(
            name=NAME,
            step=number,  # type: ignore[arg-type]
            clock=t,  # type: ignore[arg-type]
            hyper=hyper,
            theta=recursion_step.theta,
            gradient=recursion_step.gradient,
            displacement=SymbolicTensor(Datum(f"displacement_{self._clock}", real=True)),  # type: ignore[arg-type]
            before=OptimizerState(NAME, before, "state before the step, by the rule's recursion,"),
            after=OptimizerState(NAME, dict(self._state), "state after the step, by the rule's recursion,"),
            dtype=torch.float64,
            hyper_after=OptimizerState(NAME, {**hyper, **after_group}, "parameter group after the step"),
        )
        declared = declare(self.rule, recorded)
        self.steps.append(
            UnrolledStep(
                self._clock,
                self._gradients,
                self._thetas,
                following - theta,
                self._declared_update(declared, recorded),
                self._filter,
                dict(self._state),
                declared,
            )
        )

    def _declared_update(self, declared: Declared, recorded: RecordedStep) -> Any:
        found = declared.coefficients
        E, W, P, rho = (
            getattr(found, n) for n in ("gradient_operator", "coupled_decay", "preconditioner", "decoupled_decay")
        )
        u = E.apply(recorded.gradient) + W.apply(recorded.theta)
        new = found.filter.order - len(self._filter)
        out, self._filter = found.filter.advance((*self._filter, *(SymbolicTensor(0) for _ in range(new))), u)
        return exact(-P.apply(out) - rho.apply(recorded.theta))

    def _remember_constants(self) -> None:
        each, once = (hyper_parameters(self.rule, self.configuration, label) for label in (self._clock, ""))
        for name, value in each.items():
            values = value if isinstance(value, tuple) else (value,)
            plain = once[name] if isinstance(value, tuple) else (once[name],)
            pairs = zip(values, plain, strict=True)
            self.constant |= {exact(v): exact(c) for v, c in pairs if isinstance(v, SymbolicTensor)}

    def _known(self, expr: Any) -> Any:
        """Definitions that an author wrote out, instead of reading the state entry back, as the entry's symbol."""
        return expr.xreplace(self._symbols)

    def _keep(self, name: str, value: SymbolicTensor) -> SymbolicTensor:
        """A state entry: itself where it is a filter's state or nothing much, else a symbol that is given."""
        expr = self._known(value.expr)
        simple = not expr.args or not (-expr).args
        if simple or name in self.rule.filter_states or (not self.rule.filter_states and self._is_linear(expr)):
            return SymbolicTensor(expr)
        label = f"{name}_{self._clock}"
        while any(symbol.name == label for symbol in self.definitions):
            label += "'"
        symbol = Datum(label, **({"nonnegative": True} if is_nonnegative(expr) else {"real": True}))
        self.definitions[symbol] = expr
        if expr.has(Datum):
            self._symbols[expr] = symbol
        return SymbolicTensor(symbol)

    def _is_linear(self, expr: Any) -> bool:
        found = linear_coefficients(as_symbols(expr), [*self._gradients, *self._thetas])
        return found is not None and any(c != 0 for c in found[:-1])
