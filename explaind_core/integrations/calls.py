"""What a model was called with in training, and by which factor a framework multiplied the loss of that batch.

Frameworks divide losses by accumulated batches or counted tokens, in ways that differ by version and model. They are
not asked. The gradient that arrives at the model's outputs in the backward pass is that of the framework's loss; that
of the declared loss is taken once more at the same outputs; their ratio is the weight of the batch, and where they are
not proportional, the declared loss is not the one that was trained on. This costs a pass through the loss alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError
from explaind_core.tensors import tolerance
from explaind_core.training_step import LossFunction
from explaind_core.trees import rebuilt

__all__ = ["CallWatch", "SeenCall"]


@dataclass(eq=False)
class SeenCall:
    """One call of the model with gradients enabled.

    Attributes:
        args: what it was called with by position.
        kwargs: what it was called with by name.
        extra: what was taken out of the keywords before.
        output: what it returned.
        gradients: at the tensors in the output, by their position in ``trees.leaves(output)``, once the backward pass
            has run.
        value: of a loss that the model returned.
        factor: the gradient at that loss: by what it was multiplied where it was trained on.
        autocast: device and dtype of autocast at the call; None where it was off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: Any
    output: Any = None
    gradients: dict[int, Tensor] = field(default_factory=dict)
    value: Tensor | None = None
    factor: Tensor | None = None
    autocast: tuple[str, torch.dtype] | None = None

    def inputs(self, module: nn.Module) -> Any:
        """What the model was called with as ``recorder.batch`` takes it.

        Args:
            module: the model, whose ``forward`` names its arguments.

        Returns:
            A tensor, a tuple, or a dict of keywords.

        Raises:
            RecordingError: there are keywords, and arguments that have no name.
        """
        if not self.kwargs:
            alone = len(self.args) == 1 and isinstance(self.args[0], Tensor)
            return self.args[0] if alone else self.args
        signature = inspect.signature(module.forward)
        bound = signature.bind(*self.args, **self.kwargs).arguments
        found: dict[str, Any] = {}
        for name, value in bound.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise RecordingError(
                    "the model was called with keywords and with arguments that have no name",
                    where=f"{type(module).__name__}.forward{signature}",
                    remedy="call it with keywords alone",
                )
            else:
                found[name] = value
        return found

    def weight(self, loss: LossFunction, targets: Any, where: str, total: Tensor | None = None) -> float:
        """By which factor the declared loss of this batch was multiplied before ``backward()``.

        With c the gradient that arrived at the outputs and d that of ``loss(output, targets)``, the w of ``c = w d``.
        Gradients in half precision tell few digits of it. Where the model returned its loss, and it is the declared one
        to the last digits, w is that loss's gradient; where ``total`` is the declared loss times w, the ratio of these.
        The inverse of a whole number is taken as that.

        Args:
            loss: the declared one.
            targets: of the batch, as declared.
            where: which batch it is, for errors.
            total: the loss that ``backward()`` was called on, where it is known.

        Returns:
            The factor w.

        Raises:
            RecordingError: there is no such w: the model was trained on another loss.
        """
        value, declared = self._declared(loss, targets, where)
        seen = {i: g.to(declared[i]) if i in declared else g for i, g in self.gradients.items()}
        for i, gradient in seen.items():
            declared.setdefault(i, torch.zeros_like(gradient))
        pairs = [(seen.get(i, torch.zeros_like(d)).double(), d.double()) for i, d in declared.items()]
        square = sum(float((d * d).sum()) for _, d in pairs)
        weight = sum(float((c * d).sum()) for c, d in pairs) / square if square else 0.0
        dtype = max((g.dtype for g in self.gradients.values()), key=lambda t: torch.finfo(t).eps)
        coarse, fine = torch.finfo(dtype).eps, torch.finfo(value.dtype).eps
        own = self.value is not None and bool((self.value - value).abs() <= 16 * fine * value.abs())
        if own and self.factor is not None:
            weight = _whole(float(self.factor), fine)
        elif total is not None and abs(float(total) - weight * float(value)) <= coarse * abs(float(total)) > 0:
            weight = _whole(float(total) / float(value), 4 * fine)
        else:
            weight = _whole(weight, 4 * coarse)
        error, size = _norm(c - weight * d for c, d in pairs), _norm(c for c, _ in pairs)
        if error > tolerance(dtype) * size and error > abs(weight) * self._rounding(loss, targets, declared):
            raise RecordingError(
                "the declared loss is not the one that the model was trained on",
                where=where,
                expected=f"{weight:.6g} times the gradient of {_name(loss)} at the model's outputs",
                got=f"a gradient of norm {size:.3g} that differs from it by {error:.3g}",
                remedy="pass the loss of the training as loss(output, targets), with reduction and class weights",
            )
        return weight

    def _declared(self, loss: LossFunction, targets: Any, where: str) -> tuple[Tensor, dict[int, Tensor]]:
        """The declared loss, and its gradients at the outputs by their position."""
        leaves = trees.leaves(self.output)
        cut = [t.detach().requires_grad_() if t.is_floating_point() else t for t in leaves]
        device, dtype = self.autocast or ("cpu", None)
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=self.autocast is not None):
            value = loss(rebuilt(self.output, iter([t.clone() for t in cut])), targets)
            if isinstance(value, Tensor) and value.ndim:
                value = value.mean()
        differentiable = {i: t for i, t in enumerate(cut) if t.requires_grad}
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise RecordingError(
                "the declared loss does not depend on the model's outputs",
                where=where,
                expected="loss(output, targets): a tensor",
                got=type(value).__name__,
            )
        found = torch.autograd.grad(value, list(differentiable.values()), allow_unused=True)
        gradients = {i: g for i, g in zip(differentiable, found, strict=True) if g is not None}
        return value.detach(), gradients

    def _rounding(self, loss: LossFunction, targets: Any, gradients: Mapping[int, Tensor]) -> float:
        """What outputs that are off by rounding do to the gradients: of a loss near zero hardly a digit is left."""
        generator = torch.Generator().manual_seed(0)

        def beside(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            signs = (torch.randint(2, t.shape, generator=generator) * 2 - 1).to(t)
            return t * (1 + torch.finfo(t.dtype).eps * signs)

        other = SeenCall(self.args, self.kwargs, None, trees.map_tensors(beside, self.output), autocast=self.autocast)
        moved = other._declared(loss, targets, "")[1]
        return 64 * _norm((g - moved[i]).double() for i, g in gradients.items() if i in moved)


class CallWatch:
    """Sees every call of a module with gradients enabled, and the gradients that reach what it returned.

    Args:
        module: the model. Hooks of its ``forward`` see it; calls of its parts alone are not seen.
        take: takes out of the keywords of a call what is not the model's; returns that, or None.
        pick: which part of what the model returns the loss is a function of.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> watch = CallWatch(model)
        >>> inputs, targets = torch.ones(2, 1), torch.zeros(2, 1)
        >>> (nn.functional.mse_loss(model(inputs), targets) / 4).backward()
        >>> [call] = watch.finished()
        >>> call.weight(nn.MSELoss(), targets, "step 1")
        0.25
        >>> watch.remove()
    """

    def __init__(
        self,
        module: nn.Module,
        take: Callable[[dict[str, Any]], Any] = lambda _: None,
        pick: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        self._module, self._take, self._pick = module, take, pick
        self._calls: list[SeenCall] = []
        self._open: SeenCall | None = None
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """See no more."""
        for handle in self._handles:
            handle.remove()
        self._calls, self._open = [], None

    def __deepcopy__(self, _memo: Any) -> CallWatch:
        return self  # copies of the model have the hooks too, but are not watched

    def finished(self) -> list[SeenCall]:
        """The calls since the last time that a backward pass has reached; others were evaluations.

        Returns:
            In order; they are forgotten here.
        """
        found, self._calls = [call for call in self._calls if call.gradients], []
        return found

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        extra = self._take(kwargs)
        if module is not self._module:
            return args, kwargs
        self._open = None
        if torch.is_grad_enabled():
            self._open = SeenCall(args, dict(kwargs), extra, autocast=_autocast(module))
        return args, kwargs

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module is not self._module or self._open is None:
            return
        call, self._open = self._open, None
        own = output.get("loss") if isinstance(output, Mapping) else None
        picked = self._pick(output)
        if isinstance(own, Tensor) and own.requires_grad and own.ndim == 0:
            call.value = own.detach().clone()

            def keep(gradient: Tensor) -> None:
                call.factor = gradient.detach() if call.factor is None else call.factor + gradient.detach()

            own.register_hook(keep)  # type: ignore[no-untyped-call]
        for position, leaf in enumerate(trees.leaves(picked)):
            if leaf.requires_grad:
                _when_reached(leaf, call.gradients, position)
        # In-place changes behind the model (a loss that divides its logits) must not reach what is kept.
        call.output = trees.map_tensors(lambda t: t.detach().clone(), picked)
        self._calls.append(call)


def _when_reached(leaf: Tensor, gradients: dict[int, Tensor], position: int) -> None:
    """Keep the gradient that arrives at ``leaf``, or, where it is a copy in another precision, at its original."""

    def keep(gradient: Tensor | None) -> None:
        if gradient is not None:
            found = gradient.detach().clone()
            gradients[position] = gradients[position] + found if position in gradients else found

    node = leaf.grad_fn
    before, index = node.next_functions[0] if node is not None and node.name() == "ToCopyBackward0" else (None, 0)
    if before is not None:
        # Mixed precision converts outputs on their way out; a loss inside the model was computed from the original.
        before.register_prehook(lambda found: keep(found[index]))
    else:
        leaf.register_hook(keep)  # type: ignore[no-untyped-call]


def _whole(weight: float, eps: float) -> float:
    """1 / k for a whole number k, where the weight is that but for its rounding."""
    if not 0 < weight <= 1:
        return weight
    exact = 1 / round(1 / weight)
    return exact if abs(weight - exact) <= eps * exact else weight


def _autocast(module: nn.Module) -> tuple[str, torch.dtype] | None:
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _norm(tensors: Any) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__
