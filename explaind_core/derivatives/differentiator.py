"""Derivatives of a function of a model's parameters, by the cheapest way that gives them.

``torch.func`` differentiates functions, many directions at a time. It refuses what it cannot follow: recomputed
activations, packed sequences, autograd functions of the old style, operators without a forward-mode derivative. What
it refuses, ordinary autograd does, in more passes. Every way is tried once; one that was refused is not tried again.

======================= ============================================================================================
``VECTORISED``          ``torch.func``, all directions, samples or cotangents in one pass
``ONE_BY_ONE``          ``torch.func``, one after the other
``AUTOGRAD``            backward passes alone, as training takes them
======================= ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from explaind_core.derivatives.differentiable import (
    Differentiable,
    Parameters,
    every_entry,
    module_at_fault,
    too_little_memory,
)
from explaind_core.derivatives.ordinary_autograd import NOTHING_FLOWS, OrdinaryAutograd
from explaind_core.errors import ExplaindError, QuestionError

__all__ = ["AUTOGRAD", "ONE_BY_ONE", "VECTORISED", "Differentiator", "not_of_the_way"]

Found = TypeVar("Found")
#: A sample, and its cotangents where there are any.
Pull = Callable[[tuple[Tensor, ...], tuple[Tensor, ...] | None], Parameters]

VECTORISED = "torch.func, vectorised"
ONE_BY_ONE = "torch.func, one by one"
AUTOGRAD = "autograd"
#: All ways, the cheapest first.
WAYS = (VECTORISED, ONE_BY_ONE, AUTOGRAD)


class Differentiator:
    """Takes derivatives of functions of one model, and knows which ways to them the model allows.

    Args:
        what: what is differentiated, for errors.
        error: what is raised where no way works.

    Example:
        >>> from torch import nn
        >>> from torch.func import functional_call
        >>> model = nn.Linear(2, 1, bias=False).double().requires_grad_(False)
        >>> x, weight = torch.tensor([[3.0, 4.0]]).double(), model.weight
        >>> line = Differentiable(model, {"weight": weight}, lambda p: (functional_call(model, dict(p), (x,)),))
        >>> differentiator, tangent = Differentiator("a line"), {"weight": torch.ones(1, 1, 2).double()}
        >>> differentiator.push(line, {"weight": weight}, tangent)[0].flatten().tolist()
        [7.0]
        >>> one = torch.ones(1, 1, 1).double()
        >>> differentiator.pull(line, {"weight": weight}, (one,))["weight"].flatten().tolist()
        [3.0, 4.0]
    """

    def __init__(self, what: str, error: type[ExplaindError] = QuestionError) -> None:
        self.what, self._error = what, error
        self.autograd = OrdinaryAutograd()
        #: Kind of derivative -> way -> why it was refused.
        self._refused: dict[str, dict[str, str]] = {"push": {}, "pull": {}, "each": {}}
        self._barred: dict[str, str] = {}
        self._cut: str | None = None
        self._used: set[str] = set()

    @property
    def way(self) -> str:
        """The dearest way that was taken so far, the cheapest where none was: one of the three names above."""
        return max(self._used, key=WAYS.index, default=VECTORISED)

    def begin(self) -> None:
        """Forget which ways were taken, but not which ones were refused."""
        self._used.clear()

    def refuse(self, way: str, why: str) -> None:
        """Take a way no more.

        Args:
            way: one of the three names above.
            why: for the error, should no other one work.
        """
        self._used.discard(way)
        self._barred.setdefault(way, why)

    def refuse_nested(self, why: str) -> None:
        """Vectorise over samples or over cotangents, but not over both.

        Args:
            why: for the error, should no other way work.
        """
        self._refused["each"][VECTORISED] = why

    def refuse_backward(self, why: str) -> None:
        """Take no backward passes: they miss something.

        Args:
            why: for the error, should one be asked for.
        """
        self._cut = why

    # ------------------------------------------------------------------ forwards
    def push(self, function: Differentiable, point: Parameters, tangents: Parameters) -> tuple[Tensor, ...]:
        """``Df(point)[v_r]`` along R directions: ``[R, ...]`` for every tensor of the values.

        Args:
            function: f.
            point: the parameters that it is differentiated by, each with its own storage (forward mode costs a view
                its whole storage).
            tangents: parameter name -> ``[R, *shape]``, of every parameter in ``point``.

        Raises:
            ExplaindError: no way works.
        """

        def along(tangent: Parameters) -> tuple[Tensor, ...]:
            derivatives: tuple[Tensor, ...] = jvp(function.values, (dict(point),), (dict(tangent),))[1]
            return derivatives

        count = len(next(iter(tangents.values())))

        def one_by_one() -> tuple[Tensor, ...]:
            each = [along({n: t[r].clone() for n, t in tangents.items()}) for r in range(count)]
            return tuple(torch.stack(found) for found in zip(*each, strict=True))

        def vectorised() -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = vmap(along, randomness="same")(dict(tangents))
            return found

        return self._first("push", function, {
            VECTORISED: one_by_one if count == 1 else vectorised,
            ONE_BY_ONE: one_by_one,
            AUTOGRAD: lambda: self.autograd.push(function, point, tangents),
        })  # fmt: skip

    # ------------------------------------------------------------------ backwards
    def pull(
        self,
        function: Differentiable,
        point: Parameters,
        cotangents: tuple[Tensor, ...] | None = None,
        *,
        together: int | None = None,
    ) -> dict[str, Tensor]:
        """``c_r^T Df(point)`` for R cotangents: parameter name -> ``[R, *shape]``.

        Args:
            function: f.
            point: the parameters that it is differentiated by.
            cotangents: ``[R, ...]`` for every tensor of the values; one for every entry of them by default, where
                these are one tensor ``[J]``.
            together: so many cotangents at a time, all by default.

        Raises:
            ExplaindError: no way works.
        """
        return self._first("pull", function, {
            VECTORISED: lambda: _pulled(function, point, cotangents, vectorised=True, together=together),
            ONE_BY_ONE: lambda: _pulled(function, point, cotangents, vectorised=False),
            AUTOGRAD: lambda: self.autograd.pull(function, point, cotangents, together=together),
        })  # fmt: skip

    def pull_each(
        self,
        function: Differentiable,
        point: Parameters,
        samples: Any,
        cotangents: tuple[Tensor, ...] | None = None,
        *,
        together: int | None = None,
    ) -> dict[str, Tensor]:
        """As :meth:`pull`, for each of b samples: parameter name -> ``[b, R, *shape]``.

        Args:
            function: f; its values are functions of a sample, too.
            point: the parameters that it is differentiated by.
            samples: a tensor, or a tuple of tensors, with b rows; each row is a sample.
            cotangents: ``[b, R, ...]`` for every tensor of the values; see :meth:`pull`.
            together: so many samples at a time, all by default.

        Raises:
            ExplaindError: no way works.
        """
        several = samples if isinstance(samples, tuple) else (samples,)
        count = len(several[0])

        def one(sample: tuple[Tensor, ...], given: tuple[Tensor, ...] | None, inner: bool) -> dict[str, Tensor]:
            of = function.of_sample(sample if isinstance(samples, tuple) else sample[0])
            return _pulled(of, point, given, vectorised=inner)

        def vectorised(inner: bool) -> dict[str, Tensor]:
            # vmap cuts the samples itself: all of their activations and derivatives need not fit at once.
            if cotangents is None:
                return dict(vmap(lambda s: one(s, None, inner), chunk_size=together)(several))
            return dict(vmap(lambda s, c: one(s, c, inner), chunk_size=together)(several, cotangents))

        def one_by_one(
            each: Callable[[tuple[Tensor, ...], tuple[Tensor, ...] | None], Parameters],
        ) -> dict[str, Tensor]:
            found = [
                each(tuple(s[k] for s in several), None if cotangents is None else tuple(c[k] for c in cotangents))
                for k in range(count)
            ]
            return {n: torch.stack([f[n] for f in found]) for n in point}

        def by_autograd(sample: tuple[Tensor, ...], given: tuple[Tensor, ...] | None) -> Parameters:
            of = function.of_sample(sample if isinstance(samples, tuple) else sample[0])
            return self.autograd.pull(of, point, given)

        return self._first("each", function, {
            VECTORISED: lambda: vectorised(True),
            f"{VECTORISED} by sample": lambda: vectorised(False),
            f"{ONE_BY_ONE} by sample": lambda: one_by_one(lambda s, c: one(s, c, True)),
            ONE_BY_ONE: lambda: one_by_one(lambda s, c: one(s, c, False)),
            AUTOGRAD: lambda: one_by_one(by_autograd),
        })  # fmt: skip

    # ------------------------------------------------------------------ which way
    def _first(self, kind: str, function: Differentiable, ways: Mapping[str, Callable[[], Found]]) -> Found:
        """What the first way gives that is not refused."""
        refused = self._refused[kind]
        if self._cut is not None and kind != "push":
            raise self._cut_off(function, self._cut)
        failures: dict[str, str] = {**self._barred, **refused}
        last: Exception | None = None
        for way, attempt in ways.items():
            known = next(known for known in WAYS if way.startswith(known))
            if way in refused or known in self._barred:
                continue
            try:
                found = attempt()
            except Exception as error:
                if not_of_the_way(error):
                    raise
                failures[way], last = _in_a_line(error), error
                continue
            # Remembered only once another way has worked: what fails everywhere is no matter of the way.
            refused |= failures
            self._used.add(known)
            return found
        raise self._none_works(function, failures, last) from last

    def _cut_off(self, function: Differentiable, why: str) -> ExplaindError:
        return self._error(
            f"backward passes do not reach all that {self.what} depends on",
            where=f"the model ({type(function.model).__name__})",
            expected="the same derivative forwards and backwards",
            got=why,
            remedy="let the model take gradients where it is evaluated (no torch.no_grad or inference_mode in its "
            "forward); or say strategy='forward', where the question allows it",
        )

    def _none_works(
        self, function: Differentiable, failures: Mapping[str, str], last: Exception | None
    ) -> ExplaindError:
        module = None if last is None else module_at_fault(function.model, last)
        return self._error(
            f"{self.what} cannot be differentiated",
            where="the model" if module is None else module,
            expected="a derivative by one of: " + "; ".join(WAYS),
            got="; ".join(f"{way}: {why}" for way, why in failures.items()),
            remedy="the exception above this one is that of ordinary autograd, which training itself takes: let the "
            "part that is named return tensors that loss.backward() reaches (no numpy, no .data, nothing done in place "
            "to a parameter) in evaluation mode",
        )


def _pulled(
    function: Differentiable,
    point: Parameters,
    cotangents: tuple[Tensor, ...] | None,
    *,
    vectorised: bool,
    together: int | None = None,
) -> dict[str, Tensor]:
    result: tuple[Tensor, ...]
    result, pull = vjp(function.values, dict(point))  # type: ignore[misc]  # (three with has_aux)
    given = every_entry(result) if cotangents is None else cotangents
    count = len(given[0])
    if count == 1:
        found: dict[str, Tensor] = pull(tuple(c[0] for c in given))[0]
        return {n: g.unsqueeze(0) for n, g in found.items()}
    if vectorised:
        return dict(vmap(lambda *c: pull(c)[0], chunk_size=together)(*given))
    each = [pull(tuple(c[r] for c in given))[0] for r in range(count)]
    return {n: torch.stack([e[n] for e in each]) for n in point}


def not_of_the_way(error: Exception) -> bool:
    """Whether an exception says nothing of the way: what this library refuses, and too little memory."""
    if isinstance(error, Warning):  # a caller who makes errors of warnings is told of them
        return NOTHING_FLOWS not in str(error)
    return isinstance(error, ExplaindError) or too_little_memory(error)


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:199] + '...'}"
