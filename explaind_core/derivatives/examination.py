"""Before any work: is f a function of the parameters, are its samples coupled, are its derivatives right?

A few evaluations at both ends of the path tell. What they find is kept in the function itself: how it is guarded,
whether its samples go together, and which ways to its derivatives are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from explaind_core.derivatives.coupling import coupled, takes_statistics
from explaind_core.derivatives.differentiable import Parameters, too_little_memory
from explaind_core.derivatives.explained_function import FunctionAtStep
from explaind_core.derivatives.global_random_state import GlobalRandomState, undisturbed
from explaind_core.derivatives.module_attributes import ModuleAttributes
from explaind_core.derivatives.way_check import check_ways
from explaind_core.errors import QuestionError

__all__ = ["examine"]

#: Two evaluations of one function may differ by so many units of rounding.
_ROUNDING = 32


def examine(
    first: FunctionAtStep, theta_first: Parameters, last: FunctionAtStep, theta_last: Parameters
) -> tuple[Tensor, Tensor]:
    """The values of f at both ends of its path: ``[n, J]`` each, once it is known what f is.

    Args:
        first: f where the path begins.
        theta_first: the parameters there.
        last: f where it ends.
        theta_last: the parameters there.

    Raises:
        QuestionError: f has other values when it is evaluated again.
    """
    function = first.function
    if function.examined:
        return first.values(theta_first), last.values(theta_last)
    attributes = ModuleAttributes(function.model)
    with undisturbed(function.device) as state:
        initial = _first_values(first, theta_first)
        moved, changed = state.moved(), attributes.changed()
        final = last.values(theta_last)
        block = function.chunks[0]
        again = first.values(theta_first, block)
        if _differ(again, initial[block], function.dtype):
            raise _no_function(first, theta_first, again, initial[block], moved, changed)
        if changed:
            attributes.restore()
            afresh = last.values(theta_last, block)
            if _differ(afresh, final[block], function.dtype):
                raise _remembers(afresh, final[block], changed)
            attributes.restore()
        function.habits.draws, function.habits.keeps = bool(moved), bool(changed)
        if not function.together and coupled(first, theta_first, last, theta_last):
            function.together = True
            initial, final = first.values(theta_first), last.values(theta_last)
        check_ways(last, theta_first, theta_last)
    function.examined = True
    return initial, final


def _first_values(first: FunctionAtStep, theta: Parameters) -> Tensor:
    """Values at the beginning; what the model writes into buffers is seen, and undone."""
    function, before = first.function, {n: t.clone() for n, t in first.buffers.items()}
    function.together = function.together or takes_statistics(function)
    values = _tried(first, theta)
    if any(not torch.equal(t, before[n]) for n, t in first.buffers.items()):
        function.habits.writes = True
        for n, t in first.buffers.items():
            t.copy_(before[n])
    return values


def _tried(first: FunctionAtStep, theta: Parameters) -> Tensor:
    """Values, by a model that takes gradients itself (forces, physical losses), or to which one sample is no batch."""
    function, habits = first.function, first.function.habits
    given, refusal = function.together, None
    for together, gradients in ((given, False), (given, True), (True, False), (True, True)):
        function.together, habits.needs_gradients = together, gradients
        try:
            return first.values(theta)
        except Exception as error:
            if too_little_memory(error):
                raise
            refusal = refusal or error
    function.together, habits.needs_gradients = given, False
    assert refusal is not None
    raise refusal


# ---------------------------------------------------------------------- is it a function?
def _differ(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if found.shape != expected.shape:
        return True
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = torch.where(same, 0, (found - expected).abs())
    bound = _ROUNDING * torch.finfo(dtype).eps * torch.where(expected.isfinite(), expected, 0).abs().amax()
    return not bool(difference.amax() <= bound)


def _size_of(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"values of shape {tuple(found.shape)} and {tuple(expected.shape)}"
    return f"values that differ by up to {(found - expected).abs().amax():.3g}, of {expected.abs().amax():.3g}"


def _no_function(
    first: FunctionAtStep, theta: Parameters, again: Tensor, before: Tensor, moved: list[str], changed: list[str]
) -> QuestionError:
    """F evaluated twice is not the same: what moved, and where."""
    where = "evaluation mode"
    if moved:
        drawing = _who_draws(first, theta)
        where = f"{drawing}, in evaluation mode" if drawing else "the output function, in evaluation mode"
    causes = [f"random numbers were drawn from {', '.join(moved)}"] if moved else []
    causes += [f"changed by the pass: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"] if changed else []
    if moved:
        remedy = (
            "make evaluation deterministic (dropout(..., training=self.training), no sampling), or say "
            "random_state=0: every evaluation then begins with the same random numbers"
        )
    elif changed:
        remedy = (
            "set back what the model keeps before every pass: output=lambda call, inputs: (model.reset(), "
            "call(inputs))[1], or give it as an input"
        )
    else:
        remedy = "let the model draw from global generators and say random_state=0, or keep nothing between two calls"
    return QuestionError(
        "the explained function is no function of the parameters: it has other values when it is evaluated again",
        where=where,
        expected="the same values at the same parameters",
        got="; ".join([_size_of(again, before), *causes]),
        remedy=remedy,
    )


def _remembers(found: Tensor, expected: Tensor, changed: list[str]) -> QuestionError:
    return QuestionError(
        "the explained function is no function of the parameters: it remembers an evaluation at other ones",
        where=f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}",
        expected="the same values, whatever was evaluated before",
        got=_size_of(found, expected),
        remedy="compute what is kept anew in every pass (no cache of what depends on parameters in evaluation mode), "
        "or clear it: output=lambda call, inputs: (model.reset(), call(inputs))[1]",
    )


def _who_draws(first: FunctionAtStep, theta: Parameters) -> str | None:
    """The innermost module in whose pass random generators move, in words."""
    model, device, found = first.function.model, first.function.device, list[str]()
    names, before = {id(m): n for n, m in model.named_modules()}, dict[int, GlobalRandomState]()

    def enter(module: torch.nn.Module, _args: object) -> None:
        before[id(module)] = GlobalRandomState.now(device)

    def leave(module: torch.nn.Module, _args: object, _result: object) -> None:
        if not found and before[id(module)].moved():
            name = names[id(module)]
            found.append(f"{f'module {name!r}' if name else 'the model'} ({type(module).__name__})")

    handles = [m.register_forward_pre_hook(enter) for m in model.modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        first.values(theta, slice(0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
