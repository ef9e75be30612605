"""A rule's recursion and its declaration, unrolled side by side on symbols."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
from explaind_core.coefficients import OptimizerState, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.errors import ExplaindError, ProofError
from explaind_core.operators import LinearOperator, as_operator
from explaind_core.symbolic.algebra import as_symbols, is_nonnegative, linear_coefficients
from explaind_core.symbolic.branches import Datum, Option
from explaind_core.symbolic.tensor import SymbolicTensor, exact

__all__ = ["Declared", "Path", "RecursionStep", "UnrolledStep", "configurations", "declare", "hyper_parameters"]

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
    """One step of both: theta_t - theta_{t-1} by the recursion and by the declaration.

    Attributes:
        clock: t. gradients: g_1, ..., g_t. thetas: theta_0, ..., theta_{t-1}.
        expected, got: the update by the recursion, and by the declaration.
        declared: the coefficients of this step and those before, oldest first.
    """

    clock: int
    gradients: tuple[Any, ...]
    thetas: tuple[Any, ...]
    expected: Any
    got: Any
    declared: tuple[Declared, ...]


@dataclass(frozen=True)
class Path:
    """A rule's recursion and declaration, unrolled from the start for one configuration.

    The parameter skips the optimizer's step 2, so that its own clock is not the optimizer's. theta_{t-1} is a new
    symbol at every step. State entries that are no filter states become symbols too, so that updates stay linear;
    ``definitions`` has what they stand for.

    Attributes:
        rule, configuration: what is unrolled. steps: the steps so far. state: the optimizer's state of the parameter.
        group: hyper-parameters that the optimizer has set itself. filter: the filter's states.
        definitions: symbol of a state entry -> its expression, oldest first.
    """

    rule: UpdateRule
    configuration: Configuration
    steps: tuple[UnrolledStep, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    filter: tuple[Any, ...] = ()
    definitions: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What following steps depend on."""
        entries = (*self.state.items(), *self.group.items())
        return (*((name, exact(x)) for name, x in entries), *map(exact, self.filter))

    def expand(self, expr: Any) -> Any:
        """``expr`` with every state entry's symbol replaced by what it stands for."""
        for symbol, definition in reversed(self.definitions.items()):
            if expr.has(symbol):
                expr = expr.xreplace({symbol: definition})
        return expr

    def constant(self) -> dict[Any, Any]:
        """Every step's hyper-parameters -> the constant ones."""
        found = {}
        once = hyper_parameters(self.rule, self.configuration)
        for step in self.steps:
            for name, value in hyper_parameters(self.rule, self.configuration, step.clock).items():
                several = (value, once[name]) if isinstance(value, tuple) else ((value,), (once[name],))
                pairs = zip(*several, strict=True)
                found |= {exact(v): exact(c) for v, c in pairs if isinstance(v, SymbolicTensor)}
        return found

    def advance(self) -> Path:
        """One step further."""
        clock = len(self.steps) + 1
        names = _Names(self, clock)
        number, t = SymbolicTensor(clock + (clock > 1)), SymbolicTensor(clock)
        theta, gradient = (SymbolicTensor(x) for x in (names.thetas[-1], names.gradients[-1]))
        hyper = {**hyper_parameters(self.rule, self.configuration, clock), **self.group}
        group = OptimizerState(NAME, hyper, "parameter group")
        state, changed = State(self.state, names.keep), State({}, names.keep)
        following = self.rule.recursion(RecursionStep(theta, gradient, group, t, number, state, changed))
        recorded = RecordedStep(
            name=NAME,
            step=number,  # type: ignore[arg-type]
            clock=t,  # type: ignore[arg-type]
            hyper=group,
            theta=theta,  # type: ignore[arg-type]
            gradient=gradient,  # type: ignore[arg-type]
            displacement=SymbolicTensor(Datum(f"displacement_{clock}", real=True)),  # type: ignore[arg-type]
            before=OptimizerState(NAME, self.state, "state before the step, by the rule's recursion,"),
            after=OptimizerState(NAME, dict(state), "state after the step, by the rule's recursion,"),
            hyper_after=OptimizerState(NAME, {**hyper, **changed}, "parameter group after the step"),
        )
        declared = declare(self.rule, recorded)
        got, filtered = self._declared_update(declared.coefficients, theta, gradient)
        past = self.steps[-1].declared if self.steps else ()
        step = UnrolledStep(
            clock,
            names.gradients,
            names.thetas,
            names.known(exact(following)) - theta.expr,
            got,
            (*past, declared),
        )
        return Path(
            self.rule, self.configuration, (*self.steps, step), dict(state), {**self.group, **changed}, filtered,
            names.definitions,
        )  # fmt: skip

    def _declared_update(self, found: StepCoefficients, theta: Any, gradient: Any) -> tuple[Any, tuple[Any, ...]]:
        """The declared theta_t - theta_{t-1}, and the filter's states after it."""
        E, W, P, rho = (
            as_operator(getattr(found, n), n)
            for n in ("gradient_operator", "coupled_decay", "preconditioner", "decoupled_decay")
        )
        new = (SymbolicTensor(0) for _ in range(found.filter.order - len(self.filter)))
        out, filtered = found.filter.advance((*self.filter, *new), E.apply(gradient) + W.apply(theta))
        return exact(-P.apply(out) - rho.apply(theta)), filtered


class _Names:
    """The symbols of one more step, and for state entries."""

    def __init__(self, path: Path, clock: int) -> None:
        past = path.steps[-1] if path.steps else None
        self._rule, self._clock = path.rule, clock
        self.gradients = (*(past.gradients if past else ()), Datum(f"g_{clock}", real=True))
        self.thetas = (*(past.thetas if past else ()), Datum(f"theta_{clock - 1}", real=True))
        self.definitions = dict(path.definitions)

    def known(self, expr: Any) -> Any:
        """``expr`` with the symbols of state entries that it writes out instead of reading them back."""
        return expr.xreplace({x: symbol for symbol, x in self.definitions.items() if x.has(Datum)})

    def keep(self, name: str, value: SymbolicTensor) -> SymbolicTensor:
        """A state entry: itself where it is a filter's state or nothing much, else a symbol that is given."""
        expr = self.known(value.expr)
        simple = not expr.args or not (-expr).args
        if simple or name in self._rule.filter_states or (not self._rule.filter_states and self._is_linear(expr)):
            return SymbolicTensor(expr)
        label = f"{name}_{self._clock}"
        while any(symbol.name == label for symbol in self.definitions):
            label += "'"
        symbol = Datum(label, **({"nonnegative": True} if is_nonnegative(expr) else {"real": True}))
        self.definitions[symbol] = expr
        return SymbolicTensor(symbol)

    def _is_linear(self, expr: Any) -> bool:
        found = linear_coefficients(as_symbols(expr), [*self.gradients, *self.thetas])
        return found is not None and any(c != 0 for c in found[:-1])
