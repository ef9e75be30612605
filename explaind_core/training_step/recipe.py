"""How a loop makes a step's gradient: what is done again when a recorded step is computed again.

Per micro-batch, in the order of their declaration, with the model, the random state and autocast as they stood::

    (loss(model(inputs), targets) * weight).backward()

and, where there is a penalty, ``penalty(parameters).backward()``. The gradients add up in ``.grad``; then they are
unscaled and clipped as the loop declared. A loss that returns one value per sample is averaged. Every rounding must be
the loop's own: the result is compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import QuestionError
from explaind_core.training_step.batch import MicroBatch
from explaind_core.training_step.forward_state import ForwardState
from explaind_core.training_step.losses import LossFunction
from explaind_core.training_step.model import run_model

__all__ = ["GradientFunction", "Recipe", "candidates"]

#: ``gradient(model, micro_batch) -> None``: runs a micro-batch's backward pass as the loop does.
GradientFunction = Callable[[nn.Module, MicroBatch], object]


@dataclass(frozen=True)
class Recipe:
    """What a loop may do in two ways that round differently.

    Attributes:
        divides: the loss is divided by 1 / weight, a whole number, and not multiplied by weight.
        loss_outside: the loss is taken outside autocast.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> batch = MicroBatch(torch.tensor([0]), torch.ones(1, 1), torch.zeros(1, 1), 0.5)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(3.0)
        >>> Recipe().gradients(model, [batch], nn.MSELoss(), fed=["weight"])  # d (0.5 w^2) / dw = w
        {'weight': tensor([[3.]])}
    """

    divides: bool = False
    loss_outside: bool = False

    def header(self) -> dict[str, bool]:
        """What is not the default.

        Returns:
            JSON.
        """
        return {name: value for name, value in asdict(self).items() if value}

    def gradients(
        self,
        model: nn.Module,
        batch: Iterable[MicroBatch],
        loss: LossFunction | None,
        *,
        fed: Sequence[str],
        trained: Sequence[str] | None = None,
        clips: Iterable[Sequence[Any]] = (),
        gradient: GradientFunction | None = None,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The gradients that the optimizer was fed, left in the ``.grad`` of the model's parameters as well.

        Args:
            model: a private copy, its parameters where the gradient was taken. Buffers change as in training.
            batch: the micro-batches.
            loss: not needed where ``gradient`` is given.
            fed: the parameters that had a gradient; all others get none.
            trained: those that were clipped, in the model's order; ``fed`` by default.
            clips: as :meth:`explaind_core.Run.clips` returns them.
            gradient: does the backward passes instead.
            penalty: of the parameters alone, added behind them.

        Returns:
            By the names in ``fed``, each of its parameter's shape.

        Raises:
            QuestionError: there is neither a loss nor ``gradient``.
        """
        named = dict(model.named_parameters())
        wanted = set(fed)
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
        device = next(iter(named.values())).device
        scale = 1.0
        with torch.enable_grad():
            for micro in batch:
                given = _on(micro, device)
                state = micro.forward or ForwardState(model.training)
                scale = state.scale
                with state.standing(model):
                    if gradient is not None:
                        gradient(model, given)
                    else:
                        self._backward(model, given, state, loss)
            if penalty is not None:
                value = penalty(named) * scale
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
        for name in fed:  # gradients that were set to zero, and never reached
            if named[name].grad is None:
                named[name].grad = torch.zeros_like(named[name])
        found = {name: named[name].grad for name in fed}
        if scale != 1.0:
            for g in found.values():
                assert g is not None
                g.mul_(1.0 / scale)
        _clip([named[name] for name in (fed if trained is None else trained)], clips)
        return {name: g for name, g in found.items() if g is not None}

    def _backward(self, model: nn.Module, micro: MicroBatch, state: ForwardState, loss: LossFunction | None) -> None:
        if loss is None:
            raise QuestionError(
                "the gradient of a step cannot be computed again without the loss",
                remedy="pass loss= to open_run: the one that the run was trained with; or gradient=",
            )
        with state.cast():
            output = run_model(model, micro.inputs)
            if not self.loss_outside:
                value = self._weighted(loss(output, micro.targets), micro.weight)
        if self.loss_outside:
            value = self._weighted(loss(output, micro.targets), micro.weight)
        if state.scale != 1.0:
            value = value * torch.tensor(state.scale, device=value.device)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]

    def _weighted(self, value: Tensor, weight: float) -> Tensor:
        if value.ndim:
            value = value.mean()
        if weight == 1.0:
            return value
        return value / round(1 / weight) if self.divides else value * weight


def candidates(batch: Sequence[MicroBatch]) -> list[Recipe]:
    """The recipes that may round differently for this batch, the default first.

    Args:
        batch: the micro-batches of a step.

    Returns:
        One recipe or more, all different.

    Example:
        >>> candidates([MicroBatch(torch.tensor([0]), None, None, 1 / 3)])
        [Recipe(divides=False, loss_outside=False), Recipe(divides=True, loss_outside=False)]
    """
    weights = {micro.weight for micro in batch} - {1.0}
    divides = bool(weights) and all(0 < w < 1 and 1 / round(1 / w) == w for w in weights)
    cast = any(micro.forward is not None and micro.forward.autocast is not None for micro in batch)
    return [Recipe(d, outside) for outside in (False, True)[: 1 + cast] for d in (False, True)[: 1 + divides]]


def _on(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Copies, where the model lies: a backward pass may write to what it is given."""
    inputs, targets = (
        trees.map_tensors(lambda t: t.detach().clone().to(device), t) for t in (micro.inputs, micro.targets)
    )
    return replace(micro, inputs=inputs, targets=targets)


def _clip(parameters: list[nn.Parameter], clips: Iterable[Sequence[Any]]) -> None:
    for kind, limit, *more in clips:
        if kind == "norm":
            nn.utils.clip_grad_norm_(parameters, limit, *more)
        else:
            nn.utils.clip_grad_value_(parameters, limit)


def different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not equal bit by bit, but for the sign of a zero.

    Args:
        found: by name.
        expected: by name.

    Returns:
        Their names; one that is in one of the two only is among them.

    Args:
        found: name -> tensor.
        expected: name -> tensor.

    Example:
        >>> different({"a": torch.zeros(1), "b": torch.ones(1)}, {"a": -torch.zeros(1), "b": torch.zeros(1)})
        ['b']
    """
    names = dict.fromkeys([*expected, *found])
    return [
        n for n in names if n not in found or n not in expected or not torch.equal(found[n].cpu(), expected[n].cpu())
    ]
