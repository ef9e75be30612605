"""Whether test samples are coupled in evaluation: whether one alone gives what it gives among others.

Batch normalisation without running statistics, centring by the batch's mean, graphs, sets, experts with a capacity, or
an output function that compares samples. A coupling that is multiplied by zero at that moment shows in gradients only,
so that these are compared as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from explaind_core.derivatives.differentiable import Parameters, too_little_memory
from explaind_core.derivatives.explained_function import ExplainedFunction, FunctionAtStep
from explaind_core.derivatives.kernels import differentiable_kernels
from explaind_core.tensors import tolerance

__all__ = ["coupled", "takes_statistics"]

#: How much a value may differ, of the largest one, where matrices of other sizes are multiplied.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
#: Test samples that are passed without the others, the first one apart; and among how many of them gradients are taken.
_SPREAD, _DIFFERENTIATED = 15, 64


def coupled(first: FunctionAtStep, theta_first: Parameters, last: FunctionAtStep, theta_last: Parameters) -> bool:
    """Whether the values or the gradients of test samples depend on which others are there, at one of both ends.

    Args:
        first: f where the path begins.
        theta_first: the parameters there.
        last: f where it ends.
        theta_last: the parameters there.
    """
    function = first.function
    if function.given < 2:
        return False
    for at, theta in ((first, theta_first), (last, theta_last)):
        here = at.on_device(theta)
        with differentiable_kernels():
            if _values_depend(at, here) or _gradients_depend(at, here):
                return True
    return False


def takes_statistics(function: ExplainedFunction) -> bool:
    """Whether a normalisation takes the batch's own statistics in evaluation, whatever its scale makes of them.

    Args:
        function: f.
    """
    return any(isinstance(module, _BatchNorm) and module.running_mean is None for module in function.model.modules())


def _spread(count: int) -> Tensor:
    """Rows all over ``count`` but the first one, the last among them: what is shared out by order is gone there."""
    return torch.tensor(sorted({round(1 + k * (count - 2) / (_SPREAD - 1)) for k in range(_SPREAD)}))


def _values_depend(at: FunctionAtStep, theta: Parameters) -> bool:
    count = min(at.function.given, max(at.function.chunk, _SPREAD + 1))
    try:
        whole = at.alone(theta, slice(0, count))
    except Exception as error:  # nodes that are linked to others, which are not there
        if count == at.function.given or too_little_memory(error):
            raise
        return True
    bound = _ROUNDING.get(at.dtype, tolerance(at.dtype)) * whole.abs().amax()
    for rows in (torch.tensor([0]), _spread(count)):
        try:
            part = at.alone(theta, rows)
        except Exception as error:  # a sample alone is no batch to this model
            if too_little_memory(error):
                raise
            return True
        expected = whole[rows.to(whole.device)]
        if part.shape != expected.shape:
            return True
        difference = torch.where(part == expected, 0, (part - expected).abs()).amax()
        if bool(difference > bound):  # values that are not finite are refused elsewhere
            return True
    return False


def _gradients_depend(at: FunctionAtStep, theta: Parameters) -> bool:
    """Whether the gradient of some samples' values is another one where further samples are there."""
    count = min(at.function.given, _DIFFERENTIATED)
    rows, autograd = _spread(count), at.function.differentiator.autograd
    point = {n: t for n, t in theta.items() if t.is_floating_point()}
    among = at.of_parameters(theta, lambda p: at.alone(p, slice(0, count))[rows.to(at.function.device)])
    alone = at.of_parameters(theta, lambda p: at.alone(p, rows))
    shape = at.alone(theta, rows).shape
    c = torch.linspace(0.5, 1.5, shape.numel(), dtype=at.dtype, device=at.function.device).reshape(1, *shape)
    try:
        expected, found = autograd.pull(among, point, (c,)), autograd.pull(alone, point, (c,))
    except (RuntimeError, UserWarning):
        return False  # no ordinary derivative to compare with
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    eps = torch.finfo(at.dtype).eps
    for n, g in expected.items():
        bound = tolerance(at.dtype) * (g.norm() + found[n].norm()) + 1000 * eps * size
        if bool((g - found[n]).norm() > bound):
            return True
    return False
