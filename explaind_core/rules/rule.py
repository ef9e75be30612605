r"""What a plugin declares: one optimizer step as step-wise coefficients.

For one parameter tensor at step s, with g_i the gradient that step i was fed::

    u_s     = E_s[g_s] + W_s[theta_{s-1}]               input of the filter
    out_s   = C_s m_{s-1} + D_s u_s                     what the filter reads out
    m_s     = A_s m_{s-1} + B_s u_s                     k filter states
    theta_s = theta_{s-1} - P_s[out_s] - rho_s theta_{s-1}

Unrolled, this is the paper's step learning rate ``alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i`` (``D_s`` for i = s),
the preconditioner ``P_s`` and the regularization ``r_s`` (Theorem 3.1, Corollary 3.2), for any optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError, UnsupportedOptionError
from explaind_core.naming import qualified_name
from explaind_core.rules.filters import LinearFilter, _is_finite
from explaind_core.rules.held_options import held_options, is_same
from explaind_core.rules.linear_operator import LinearOperator, Scalar, as_operator

__all__ = ["OptimizerState", "RecordedStep", "StepCoefficients", "UpdateRule"]


@dataclass(frozen=True)
class StepCoefficients:
    """One optimizer step of one parameter tensor, declared.

    Args:
        preconditioner: P_s, which holds the learning rate; a number or an operator.
        filter: (A, B, C, D), the step learning rates alpha_{s,i}.
        gradient_operator: E_s, a frozen operator in front of the filter (-1 to maximize).
        coupled_decay: W_s: weight decay that enters the filter.
        decoupled_decay: rho_s: weight decay that does not.

    Raises:
        CoefficientError: an entry is not an operator, or a number is not finite.

    Example:
        >>> StepCoefficients(preconditioner=0.1, decoupled_decay=0.01).preconditioner
        Scalar(factor=0.1)
    """

    preconditioner: LinearOperator | float
    filter: LinearFilter = field(default_factory=LinearFilter)
    gradient_operator: LinearOperator | float = 1.0
    coupled_decay: LinearOperator | float = 0.0
    decoupled_decay: LinearOperator | float = 0.0

    def __post_init__(self) -> None:
        for name in ("preconditioner", "gradient_operator", "coupled_decay", "decoupled_decay"):
            operator = as_operator(getattr(self, name), name)
            if isinstance(operator, Scalar) and not _is_finite(operator.factor):
                raise CoefficientError(f"{name} is not finite", got=operator.factor)
            object.__setattr__(self, name, operator)


class OptimizerState(Mapping[str, Any]):
    """Read-only state of one parameter in the optimizer; a missing entry is an error that says what there is.

    Args:
        parameter: the parameter's name, for the error.
        entries: its entries in the optimizer's state.
        kind: what they are, for the error.

    Example:
        >>> OptimizerState("weight", {"step": 3})["step"]
        3
    """

    def __init__(self, parameter: str, entries: Mapping[str, Any], kind: str = "optimizer state") -> None:
        self._parameter, self._entries, self._kind = parameter, entries, kind

    def __getitem__(self, key: str) -> Any:
        if key not in self._entries:
            raise CoefficientError(
                f"the {self._kind} has no entry {key!r}",
                where=f"parameter {self._parameter!r}",
                expected=f"one of {sorted(self._entries)}",
                got=key,
            )
        return self._entries[key]

    # Mapping.get and Mapping.__contains__ look for KeyError, which a clear error is not.
    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or ``default`` where there is none."""
        return self._entries.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class RecordedStep:
    """What a rule may look at: one step of one parameter tensor. Tensors are float64.

    Attributes:
        name: the parameter's name.
        step: s, counted from 1.
        clock: t, this PARAMETER's own steps so far, this one included (a parameter without gradient does not tick).
        hyper: its group's hyper-parameters as they stood before the step.
        theta: theta_{s-1}, where the gradient was taken.
        gradient: g_s as it was fed.
        displacement: the observed theta_s - theta_{s-1}.
        before: its entry in the optimizer's state before the step.
        after: its entry there after the step.
        dtype: what the optimizer computed in.
        hyper_after: after it; some optimizers keep counters and estimates of their own there.
        mask: for a sparse gradient, 1 where it stores a value (an explicit zero too) and 0 elsewhere; None for a
            dense one.
        point: ``"gradient"``: theta is where gradients are taken. ``"evaluated"``: the displacement is that of the
            point where the model is evaluated (see :meth:`UpdateRule.evaluated`); decay still acts on ``theta``.

    For a rule with ``flat`` set, all tensors are vectors over all trained parameters, one behind the other.
    """

    name: str
    step: int
    clock: int
    hyper: Mapping[str, Any]
    theta: Tensor
    gradient: Tensor
    displacement: Tensor
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    dtype: torch.dtype = torch.float64
    hyper_after: Mapping[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    point: str = "gradient"


class UpdateRule(ABC):
    """The algebra of one optimizer. Subclass it, register it by a plugin, and every lens works.

    Attributes:
        optimizers: qualified names of the classes it speaks for (exactly these; a subclass is another optimizer).
        options: hyper-parameters that it models, at any value.
        fixed: hyper-parameters that it models at the listed values only.
        filter_states: the optimizer-state entries that hold the filter's states m, in order. Needed for
            runs whose recording starts with a non-empty state.
        proved_for: option -> values that :func:`explaind_core.symbolic.prove` goes through, in every combination.
            ``...`` stands for any positive number, ``(..., ...)`` for a pair of them, a list for one value a step, a
            function for a value that follows from the optimizer's step s (a counter), and ``NotImplemented`` for an
            option that is not there. An option that is not listed is any positive number. Names separated by spaces
            take their values together. Two names are no options: ``point`` and ``ndim``, the :class:`RecordedStep`'s
            point and its tensors' number of axes.
        no_closed_form: why there is no recursion to prove the coefficients against, where there is none.
        attributes: constructor option -> the optimizer's attribute that holds it, for options that it does not keep in
            its parameter groups; they are checked, recorded and shown as if they stood there.
        outside: state entries that are computed from more than the gradients (a Hessian): they are stored at every step
            that changes them, and given back to the optimizer in replay (:meth:`replay_step`).
        flat: the optimizer treats all its tensors as one vector: ``coefficients`` is called once a step, with
            vectors over all of them.
        closed_by_secant: P_s is known only approximately: the engine adds a rank-one secant that makes every step exact
            (:func:`explaind_core.rules.closed`), and reports its size as the step's correction.
        inferred: the rule is a guess and not a declaration; every result says so.
        evaluates_elsewhere: the model is evaluated at another point than its gradients are taken at (see
            :meth:`evaluated`), and the optimizer moves the parameters there and back between steps.

    Example:
        >>> class PlainDescent(UpdateRule):
        ...     optimizers = ("my_package.PlainDescent",)
        ...     options = frozenset({"lr"})
        ...     def coefficients(self, step):
        ...         return StepCoefficients(preconditioner=step.hyper["lr"])
    """

    optimizers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    filter_states: ClassVar[tuple[str, ...]] = ()
    proved_for: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    no_closed_form: ClassVar[str] = ""
    attributes: ClassVar[Mapping[str, str]] = {}
    outside: ClassVar[tuple[str, ...]] = ()
    flat: ClassVar[bool] = False
    closed_by_secant: ClassVar[bool] = False
    inferred: ClassVar[bool] = False
    evaluates_elsewhere: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """The coefficients of this step; called for every step of every parameter that had a gradient."""

    def filter_start(self, step: RecordedStep) -> Sequence[Tensor | float]:  # noqa: ARG002
        """m_0: what the filter's states hold before ``step``, which creates them; nothing, the default, is zero.

        For momenta and averages that an optimizer starts at a constant, or at anything else that is no gradient: what
        they add to updates is counted as prehistory. Asked for once a state; a state that a recording found in the
        optimizer (see ``filter_states``) starts at what it held.

        Args:
            step: the first step of this parameter in which the filter has the state.

        Returns:
            A number or a tensor for each state, in their order; states behind the last one start at zero.

        Example:
            >>> class Warm(UpdateRule):
            ...     filter_states = ("momentum",)
            ...     def coefficients(self, step):
            ...         return StepCoefficients(preconditioner=step.hyper["lr"], filter=LinearFilter.momentum(0.9))
            ...     def filter_start(self, step):
            ...         return (step.hyper["initial_value"],)
            >>> Warm().starts_elsewhere
            True
        """
        return ()

    @property
    def starts_elsewhere(self) -> bool:
        """Whether the rule declares a :meth:`filter_start`."""
        return type(self).filter_start is not UpdateRule.filter_start

    def recursion(self, step: Any) -> Any:  # noqa: ARG002
        """The optimizer's own step, as its paper writes it, for :func:`explaind_core.symbolic.prove`.

        Args:
            step: a :class:`explaind_core.symbolic.RecursionStep`: ``theta``, ``gradient``, ``hyper``, ``clock``, and
                the optimizer's ``state`` of this parameter, which this method updates.

        Returns:
            The parameter after the step.
        """
        return NotImplemented

    @property
    def has_recursion(self) -> bool:
        """Whether the rule writes its optimizer's step down, in :meth:`recursion`, to be proved against."""
        return type(self).recursion is not UpdateRule.recursion

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """The step learning rate ``alpha_{s,i}`` for i <= s, in closed form, at constant hyper-parameters.

        Args:
            s: the step whose update is read.
            i: the step whose gradient is in it.
            hyper: the group's hyper-parameters, the same at every step.
        """
        return NotImplemented

    def evaluated(self, theta: Tensor, state: Mapping[str, Any], hyper: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Where the model is evaluated when one parameter's gradients are taken at ``theta``: there, by default.

        Args:
            theta: the parameter in training, in its own dtype.
            state: its optimizer state at that moment.
            hyper: its group's hyper-parameters.
        """
        return theta

    def iterations(self, state: Mapping[str, Any]) -> int | None:  # noqa: ARG002
        """How many iterations an optimizer whose ``step(closure)`` iterates inside has made, by its state.

        None, the default, says that one call of ``step`` is one step.
        """
        return None

    def one_iteration(self, hyper: Mapping[str, Any], evaluations: int) -> Mapping[str, Any]:  # noqa: ARG002
        """Hyper-parameters under which one call of ``step(closure)`` makes one iteration (see :meth:`iterations`).

        Args:
            hyper: the hyper-parameters of the group.
            evaluations: how often the whole call has evaluated the closure so far, at the present point included.
        """
        return {}

    def check_correction(self, correction: float, step: int) -> None:  # noqa: B027
        """Refuse a step whose secant is too large to be trusted; a declared rule refuses none.

        Args:
            correction: ``||what secants added|| / ||update||`` over all parameters of the step.
            step: s, for the error.
        """

    def settings(self) -> dict[str, Any]:
        """What the rule was made with, to be made again when a run is opened; nothing for most."""
        return {}

    def claims(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this rule speaks for ``optimizer``: by the exact name of its class."""
        return qualified_name(type(optimizer)) in self.optimizers

    def replay_step(
        self,
        optimizer: torch.optim.Optimizer,
        outside: Mapping[Tensor, Mapping[str, Tensor]],  # noqa: ARG002
    ) -> None:
        """Make one step in replay, gradients being set.

        Args:
            optimizer: the rebuilt optimizer.
            outside: parameter -> the recorded entries of ``outside`` that this step changed.
        """
        optimizer.step()

    def member(self, hyper: Mapping[str, Any]) -> UpdateRule:  # noqa: ARG002
        """The rule that speaks for a parameter group with these hyper-parameters: this one, unless it is several."""
        return self

    def options_aside(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The options that ``optimizer`` keeps as attributes of itself (see ``attributes``)."""
        return {
            option: getattr(optimizer, held) for option, held in self.attributes.items() if hasattr(optimizer, held)
        }

    def check_held_options(self, optimizer: torch.optim.Optimizer, *, unused: bool = False) -> None:
        """Refuse an optimizer that holds an option outside of its groups which this rule does not model.

        Args:
            optimizer: compared with the defaults of its constructor.
            unused: whether it has not stepped yet; then attributes of any name are compared.

        Raises:
            UnsupportedOptionError: naming the option, its attribute, its value and its default.
        """
        modelled = {*self.options, *self.attributes}
        for held in held_options(optimizer, modelled, unused=unused):
            if any(is_same(held.value, value) for value in self.fixed.get(held.option, ())):
                continue
            usual = self.fixed.get(held.option, (held.default,))
            raise UnsupportedOptionError(
                f"{type(self).__name__} does not model the option {held.option}={_shown(held.value)}",
                where=f"attribute {held.attribute!r} of {qualified_name(type(optimizer))}, not in its parameter groups",
                expected=f"{held.option}={' or '.join(map(_shown, usual))}, as by default",
                got=f"{held.option}={_shown(held.value)}",
                remedy="train without this option, or model it: name it in the rule's options and in its attributes = "
                f"{{option: {held.attribute!r}}}",
            )

    def check_options(self, group: Mapping[str, Any], names: Sequence[str]) -> None:
        """Refuse a parameter group that uses an option this rule does not model.

        Args:
            group: the group's hyper-parameters.
            names: which of its keys are the optimizer's options (the keys of ``optimizer.defaults``).

        Raises:
            UnsupportedOptionError: naming the option, its value and the values that are modelled.
        """
        for name in names:
            if name not in group:  # torch adds names to a loaded optimizer's defaults that its groups do not have
                continue
            value = group[name]
            if name in self.options or value in self.fixed.get(name, ()):
                continue
            modelled = f"{name} in {list(self.fixed[name])}" if name in self.fixed else sorted(self.options)
            raise UnsupportedOptionError(
                f"{type(self).__name__} does not model the option {name}={value!r}",
                expected=modelled,
                got=f"{name}={value!r}",
                remedy="train without this option, or register a rule that models it",
            )


def _shown(value: Any) -> str:
    """A value of an option to be read: a function by its name."""
    return str(getattr(value, "__qualname__", None) or repr(value))
