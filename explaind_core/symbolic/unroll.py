"""A rule's recursion and its declaration, side by side on symbols."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sympy  # type: ignore[import-untyped]

from explaind_core.errors import ExplaindError, ProofError
from explaind_core.rules import (
    LinearOperator,
    OfReadout,
    RecordedStep,
    StepCoefficients,
    UpdateRule,
    as_operator,
    checked_count,
)
from explaind_core.symbolic.algebra import as_symbols, is_nonnegative, linear_coefficients
from explaind_core.symbolic.branches import Datum
from explaind_core.symbolic.recursion import Configuration, RecursionStep, State, hyper_parameters
from explaind_core.symbolic.shown import GroupAfter, ShownEntries, counted_after
from explaind_core.symbolic.tensor import SymbolicTensor, exact, mean

__all__ = ["Declared", "Path", "UnrolledStep", "declare"]

NAME = "parameter"
_IN_GROUP = (
    "name {key!r} in the rule's options; or list it in proved_for, as a function of the step where it is a counter: "
    "(lambda step: step - 1,)"
)
_IN_STATE = "let recursion() keep it, under the optimizer's own name: step.state[{key!r}] = ..."
_REMEDY = "use torch's elementwise operations, mean and norm, or say in no_closed_form why it cannot be proved"
#: t = 1 + EARLIER is any step but the first; the optimizer's own count may be further.
EARLIER, AHEAD = sympy.symbols("j k", integer=True, positive=True)
#: In the place of a preconditioner that is made of what the filter reads out, where nothing is read out.
P_OF_READOUT = Datum("P_s", real=True)


@dataclass(frozen=True)
class Declared:
    """The coefficients of one step, as expressions: what every operator multiplies an element by.

    Attributes:
        A: from states to new states.
        B: from the input to new states.
        C: from states to what is read out.
        D: from the input to what is read out.
        P: the preconditioner.
        E: the gradient operator.
        W: the coupled decay.
        rho: the decoupled decay.
        coefficients: as the rule returned them.
    """

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
    """Ask the rule itself, on symbols.

    Args:
        rule: the rule.
        recorded: a step whose numbers are symbols.
    """
    with _on_symbols(rule, "coefficients"):
        found = rule.coefficients(recorded)
        f = found.filter
        return Declared(
            A=tuple(tuple(map(_factor, row)) for row in f.A),
            B=tuple(map(_factor, f.B)),
            C=tuple(map(_factor, f.C)),
            D=_factor(f.D),
            P=P_OF_READOUT if isinstance(found.preconditioner, OfReadout) else _factor(found.preconditioner),
            E=_factor(found.gradient_operator),
            W=_factor(found.coupled_decay),
            rho=_factor(found.decoupled_decay),
            coefficients=found,
        )


@contextmanager
def _on_symbols(rule: UpdateRule, method: str) -> Iterator[None]:
    """Says which method does not run on symbols."""
    try:
        yield
    except ExplaindError as error:
        what = f"{type(rule).__name__}.{method} does not run on symbols: {error.what}"
        raise ProofError(what, expected=error.expected, got=error.got, remedy=error.remedy or _REMEDY) from error
    except Exception as error:
        raise ProofError(f"{type(rule).__name__}.{method} does not run on symbols: {error}", remedy=_REMEDY) from error


def _factor(coefficient: Any) -> Any:
    one: Any = SymbolicTensor(1)
    return exact(coefficient.apply(one) if isinstance(coefficient, LinearOperator) else coefficient)


@dataclass(frozen=True)
class UnrolledStep:
    """One step of both: theta_t - theta_{t-1} by the recursion and by the declaration.

    Attributes:
        label: t, a number or the name of any step.
        gradients: g_1, ..., g_t.
        thetas: theta_0, ..., theta_{t-1}.
        expected: the update by the recursion.
        got: the update by the declaration.
        declared: the coefficients of this step and those before, oldest first.
        prehistory: what the starts of the filter's states (``filter_start``) are of ``got``.
    """

    label: int | str
    gradients: tuple[Any, ...]
    thetas: tuple[Any, ...]
    expected: Any
    got: Any
    declared: tuple[Declared, ...]
    prehistory: Any = sympy.S.Zero


@dataclass(frozen=True)
class _Update:
    """The declared step: theta_t - theta_{t-1}, the filter's states after it, P_t as it is then known.

    ``prehistory`` is what the starts of the states are of the change, ``started`` what they are of the states.
    """

    change: Any
    filter: tuple[Any, ...]
    P: Any
    prehistory: Any
    started: tuple[Any, ...]


@dataclass(frozen=True)
class Path:
    """A rule's recursion and declaration, unrolled for one configuration.

    The parameter skips the optimizer's step 2, so that its own clock is not the optimizer's. theta_{t-1} is a new
    symbol at every step. State entries that are no filter states become symbols too, so that updates stay linear;
    ``definitions`` has what they stand for.

    Attributes:
        rule: what is unrolled.
        configuration: the values of its options.
        steps: the steps so far.
        state: the optimizer's state of the parameter, by entry.
        group: hyper-parameters that the optimizer has set itself.
        filter: the filter's states.
        started: what the starts of the filter's states are of them.
        definitions: symbol of a state entry -> its expression, oldest first.
        memory: the symbols of the filter's states where the path begins at any step t > 1; None where it begins at the
            first.
        sparse: whether gradients are.
        unwritten: entries of ``hyper_after`` that were read and not written, and taken to be as before the step.
    """

    rule: UpdateRule
    configuration: Configuration
    steps: tuple[UnrolledStep, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    filter: tuple[Any, ...] = ()
    started: tuple[Any, ...] = ()
    definitions: Mapping[Any, Any] = field(default_factory=dict)
    memory: tuple[Any, ...] | None = None
    sparse: bool = False
    unwritten: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[Any, ...]:
        """What following steps depend on."""
        entries = (*self.state.items(), *self.group.items())
        return (*((name, exact(x)) for name, x in entries), *map(exact, self.filter))

    def merged(self, other: Path) -> Path:
        """This path, for another that led to the same state; what its symbols stand for may differ there."""
        common = {x: e for x, e in self.definitions.items() if other.definitions.get(x) == e}
        return replace(self, definitions=common, unwritten=self.unwritten | other.unwritten)

    def anywhere(self, signless: Collection[str] = ()) -> Path:
        """Before any step but the first: everything that the state holds is a symbol.

        The hypothesis of an induction: the filter's states are those entries that ``filter_states`` names, and no entry
        is negative but the ``signless`` ones.
        """

        def symbol(name: str) -> SymbolicTensor:
            return SymbolicTensor(Datum(f"{name}_t-1", **{"real" if name in signless else "nonnegative": True}))

        state, group = ({name: symbol(name) for name in entries} for entries in (self.state, self.group))
        memory = tuple(state.get(name, SymbolicTensor(0)) for name in self.rule.filter_states)[: len(self.filter)]
        return replace(
            Path(self.rule, self.configuration, state=state, group=group),
            filter=memory,
            memory=tuple(map(exact, memory)),
        )

    def constant(self) -> dict[Any, Any]:
        """Every step's hyper-parameters -> the constant ones."""
        found: dict[Any, Any] = {}
        once = hyper_parameters(self.rule, self.configuration)
        for step in self.steps:
            for name, value in hyper_parameters(self.rule, self.configuration, step.label).items():
                several = (value, once[name]) if isinstance(value, tuple) else ((value,), (once[name],))
                pairs = zip(*several, strict=True)
                found |= {exact(v): exact(c) for v, c in pairs if isinstance(v, SymbolicTensor)}
        return found

    def advance(self) -> Path:
        """One step further."""
        names = _Names(self)
        t, number = (SymbolicTensor(x) for x in names.clocks)
        theta, gradient = (SymbolicTensor(x) for x in (names.thetas[-1], names.gradients[-1]))
        theta.ndim = gradient.ndim = self.configuration.get("ndim", 0)
        point = self.configuration.get("point", "gradient")
        hyper = {**hyper_parameters(self.rule, self.configuration, names.label, number), **self.group}
        names.taken = {str(x) for value in hyper.values() for x in getattr(value, "free_symbols", ())}
        group = ShownEntries(NAME, hyper, "parameter group", _IN_GROUP)
        state, changed = State(self.state, names.keep), State({}, names.keep)
        with _on_symbols(self.rule, "recursion"):
            shown = RecursionStep(theta, gradient, group, t, number, state, changed, str(names.label), point)
            following = exact(self.rule.recursion(shown))
        after = GroupAfter(NAME, hyper, counted_after(self.configuration, number), changed)
        recorded = RecordedStep(
            name=NAME,
            step=number,  # type: ignore[arg-type]
            clock=t,  # type: ignore[arg-type]
            hyper=group,
            theta=theta,  # type: ignore[arg-type]
            gradient=gradient,  # type: ignore[arg-type]
            displacement=SymbolicTensor(Datum(f"displacement_{names.label}", real=True, nonzero=True)),  # type: ignore[arg-type]
            before=ShownEntries(NAME, self.state, "state before the step, by the rule's recursion,", _IN_STATE),
            after=ShownEntries(NAME, dict(state), "state after the step, by the rule's recursion,", _IN_STATE),
            hyper_after=after,
            mask=shown.mask if shown.sparse else None,  # type: ignore[arg-type]
            point=point,
        )
        declared = declare(self.rule, recorded)
        with _on_symbols(self.rule, "coefficients"):
            update = self._declared_update(declared.coefficients, theta, gradient, recorded)
        step = UnrolledStep(
            label=names.label,
            gradients=names.gradients,
            thetas=names.thetas,
            expected=following - theta.expr,
            got=update.change,
            declared=(*(self.steps[-1].declared if self.steps else ()), replace(declared, P=update.P)),
            prehistory=update.prehistory,
        )
        return replace(
            self,
            steps=(*self.steps, step),
            state=dict(state),
            group={**self.group, **{n: x for n, x in changed.items() if not callable(self.configuration.get(n))}},
            filter=update.filter,
            started=update.started,
            definitions=names.definitions,
            unwritten=self.unwritten | after.unwritten,
            sparse=shown.sparse,
        )

    def _declared_update(self, found: StepCoefficients, theta: Any, gradient: Any, recorded: RecordedStep) -> _Update:
        E, W, P, rho = (
            as_operator(getattr(found, n), n)
            for n in ("gradient_operator", "coupled_decay", "preconditioner", "decoupled_decay")
        )
        new = self._started(recorded, found.filter.order)
        out, filtered = found.filter.advance((*self.filter, *new), E.apply(gradient) + W.apply(theta))
        if isinstance(P, OfReadout):
            P = P.make(out)
        prehistory, started = sympy.S.Zero, self.started
        if self.rule.starts_elsewhere and self.memory is None:
            read, started = found.filter.advance((*started, *new), SymbolicTensor(0))  # type: ignore[arg-type]
            prehistory = exact(-P.apply(read))
        return _Update(exact(-P.apply(out) - rho.apply(theta)), filtered, _factor(P), prehistory, started)

    def _started(self, recorded: RecordedStep, order: int) -> list[Any]:
        """What the rule declares that those of the filter's ``order`` states hold which this step creates."""
        if order <= len(self.filter):
            return []
        declared = checked_count(self.rule, recorded, self.rule.filter_start(recorded), order)
        starts = [*map(SymbolicTensor, declared), *(SymbolicTensor(0) for _ in range(order - len(declared)))]
        return starts[len(self.filter) :]


class _Names:
    """The symbols of a path's next step."""

    def __init__(self, path: Path) -> None:
        past, clock = path.steps[-1] if path.steps else None, len(path.steps) + 1
        self._rule, self._configuration = path.rule, path.configuration
        self.label: int | str = clock if path.memory is None else "t"
        # alpha(s, i) of an optimizer that counts its own steps knows of no step that the parameter skips.
        skips = clock > 1 and not any(map(callable, path.configuration.values()))
        self.clocks = (clock, clock + skips) if path.memory is None else (1 + EARLIER, 1 + EARLIER + AHEAD)
        self.taken: set[str] = set()
        before = clock - 1 if path.memory is None else "t-1"
        self.gradients = (*(past.gradients if past else ()), Datum(f"g_{self.label}", real=True))
        self.thetas = (*(past.thetas if past else ()), Datum(f"theta_{before}", real=True))
        self.definitions = dict(path.definitions)

    def keep(self, name: str, expr: Any) -> Any:
        """A state entry: itself where it is a filter's state or nothing much, else a symbol that is given."""
        simple = not expr.args or not (-expr).args or callable(self._configuration.get(name))
        if simple or name in self._rule.filter_states:
            return expr
        linear = None if self._rule.filter_states else self._linear(expr)
        if linear is not None:
            return linear
        label = f"{name}_{self.label}"
        while label in self.taken or any(symbol.name == label for symbol in self.definitions):
            label += "'"
        sign = "positive" if expr.is_positive else "nonnegative" if is_nonnegative(expr) else "real"
        symbol = Datum(label, **{sign: True})
        self.definitions[symbol] = expr
        return symbol

    def _linear(self, expr: Any) -> Any:
        """A sum over gradients and parameters with what cancels left out; None where it is none."""
        inputs, means = [*self.gradients, *self.thetas], {as_symbols(m): m for m in expr.atoms(mean)}
        found = linear_coefficients(as_symbols(expr), inputs)
        if found is None or all(c == 0 for c in found[:-1]):
            return None
        total = sympy.Add(*(sympy.factor(c) * x for c, x in zip(found, (*inputs, 1), strict=True)))
        return total.xreplace(means)
