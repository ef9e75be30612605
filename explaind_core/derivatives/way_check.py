"""Are the derivatives of f right, by whichever way they are taken?

A way may be silent about what it does wrong: an autograd function with a wrong forward mode, an operator whose rule for
vmap is wrong (that of ``cdist`` is), a part without gradients that forward mode passes all the same. So some
derivatives of two test samples are taken by the ways that will be taken, and by ordinary backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.derivatives.differentiable import Differentiable, Parameters
from explaind_core.derivatives.differentiator import ONE_BY_ONE, VECTORISED
from explaind_core.derivatives.explained_function import FunctionAtStep
from explaind_core.derivatives.kernels import differentiable_kernels
from explaind_core.errors import ExplaindError

__all__ = ["check_ways"]


def check_ways(at: FunctionAtStep, theta_first: Parameters, theta_last: Parameters) -> None:
    """Refuse ways whose derivatives are others than those of ordinary backward passes.

    Args:
        at: f where the path ends.
        theta_first: the parameters where it begins.
        theta_last: the parameters there.
    """
    differentiator, theta = at.function.differentiator, at.on_device(theta_last)
    point = {n: t for n, t in theta.items() if t.is_floating_point()}
    along = {n: t - theta_first[n].to(t) for n, t in point.items()}
    with differentiable_kernels():
        block = slice(0, min(2, at.samples))
        shape = at.block_values(theta, block).shape
        # Not alike, so that outputs which add up to a constant tell something.
        one = torch.linspace(0.5, 1.5, shape.numel(), dtype=at.dtype, device=at.function.device)
        both = torch.stack([one, one.flip(0).square()]).reshape(2, *shape)
        directions = {n: torch.stack([t, point[n]]) for n, t in along.items()}
        _Comparison(at, theta, point, directions, block, both).run()
    differentiator.begin()


@dataclass(frozen=True)
class _Comparison:
    """``<c, Df v>`` by several ways, for two c and two v at once: ``[2, 2]``.

    Attributes:
        at: f.
        theta: all parameters.
        point: those that f is differentiated by.
        directions: v, the path's and the parameters themselves: name -> ``[2, *shape]``.
        block: the test samples.
        cotangents: c, ``[2, b, J]``.
    """

    at: FunctionAtStep
    theta: Parameters
    point: Parameters
    directions: Parameters
    block: slice
    cotangents: Tensor

    def run(self) -> None:
        """Try what torch.func gives, and refuse what is wrong."""
        differentiator = self.at.function.differentiator
        autograd, of_block = differentiator.autograd, self._of_block()
        try:
            each = [autograd.pull(of_block, self.point, (c[None],)) for c in self.cotangents]
        except (RuntimeError, UserWarning):
            return  # no ordinary derivative to compare with
        expected, size = self._products({n: torch.cat([g[n] for g in each]) for n in self.point})
        if not bool(expected.isfinite().all()):
            return  # refused elsewhere
        bound = math.sqrt(torch.finfo(self.at.dtype).eps) * size
        if autograd.batched:
            together = self._products(autograd.pull(of_block, self.point, (self.cotangents,)))[0]
            autograd.batched = autograd.batched and bool(((together - expected).abs() <= bound).all())
        for forwards in (True, False):
            for way in (VECTORISED, ONE_BY_ONE):
                try:
                    found = self.forwards() if forwards else self.backwards()
                except ExplaindError:
                    break  # raised again where it is needed
                error = (found - expected).abs()
                if bool((error <= bound).all()):
                    break
                why = f"{'forwards' if forwards else 'backwards'} {float(found[0, 0]):.6g}, "
                why += f"by ordinary backward passes {float(expected[0, 0]):.6g} along the path"
                if forwards and bool(((self.secants() - found).abs() < error / 2)[error > bound].all()):
                    differentiator.refuse_backward(why)
                    return
                differentiator.refuse(way, why)

    def _of_block(self) -> Differentiable:
        return self.at.of_parameters(self.theta, lambda p: self.at.block_values(p, self.block))

    def forwards(self) -> Tensor:
        """By pushing both v at once."""
        pushed = self.at.function.differentiator.push(self._of_block(), self.point, self.directions)[0]
        return self.cotangents.double().flatten(1) @ pushed.double().flatten(1).T

    def backwards(self) -> Tensor:
        """By pulling both c at once, as test samples are differentiated: alone or together."""
        at = self.at
        if at.function.together:
            found = at.function.differentiator.pull(self._of_block(), self.point, (self.cotangents,))
            return self._products(found)[0]
        of_row = at.of_parameters(self.theta, at.row_values)
        rows = at.function.rows[self.block].to(self.cotangents.device)
        each = at.function.differentiator.pull_each(of_row, self.point, rows, (self.cotangents.transpose(0, 1),))
        return self._products({n: g.sum(0) for n, g in each.items()})[0]

    def secants(self) -> Tensor:
        """By differences of values: rough, but no derivative is needed for them."""
        found = []
        for r in range(2):
            direction = {n: t[r] for n, t in self.directions.items()}
            length = max(_length(direction), torch.finfo(torch.float64).tiny)
            h = float(torch.finfo(self.at.dtype).eps ** (1 / 3) * max(_length(self.point), 1e-3) / length)
            moved = [{n: self.theta[n] + move * t for n, t in direction.items()} for move in (h, -h)]
            ends = [self.at.block_values({**self.theta, **there}, self.block).detach().double() for there in moved]
            found.append((ends[0] - ends[1]) / (2 * h))
        return self.cotangents.double().flatten(1) @ torch.stack(found).flatten(1).T

    def _products(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``<g, v>``, and the sum of the sizes of its terms: ``[2, 2]`` each."""
        total = torch.zeros((2, 2), dtype=torch.float64, device=self.cotangents.device)
        size = total.clone()
        for n, v in self.directions.items():
            g, flat = gradients[n].double().reshape(2, -1), v.double().reshape(2, -1)
            total += g @ flat.T
            size += g.abs() @ flat.abs().T
        return total, size


def _length(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
