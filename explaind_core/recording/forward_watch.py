"""Hooks on a model: how it stands when a batch is passed through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError
from explaind_core.naming import COMPILED, inner_name, plain, plain_name, wrapping
from explaind_core.recording.model_calls import ModelCalls
from explaind_core.recording.wrapped import autocast_inside
from explaind_core.training_step import ForwardState, output_entries, random_state

__all__ = ["ForwardWatch"]

#: Passes that are held until one of them is known to be the declared batch's.
_HELD = 16


@dataclass(eq=False)
class _Pass:
    """A call of the model with gradients enabled.

    Attributes:
        state: how it stood before.
        given: the tensors that it was given.
        outputs: entries of what it returned, where these are kept.
    """

    state: ForwardState
    given: list[Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)


class ForwardWatch:
    """Watches a model's forward passes and remembers how it stood before the first one.

    Only passes with gradients enabled count: those of an evaluation under ``torch.no_grad()`` are not looked at.

    Args:
        model: containers that cannot be called (``nn.ModuleList``) are watched through their children.
        first: called before every first pass that :meth:`take` will tell of.
        calls: what counts the calls, if another one than its own.
        keeps_outputs: asked at every pass whether entries of what the model returns are kept.

    Attributes:
        calls: how often the model was called for the coming gradient.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> watch = ForwardWatch(model)
        >>> watch.take() is None
        True
        >>> _ = model(torch.zeros(1, 1))
        >>> watch.take()
        ForwardState(training=True, exceptions=(), autocast=None, device_type='cpu', rng={}, scale=1.0)
        >>> watch.close()
    """

    def __init__(
        self,
        model: nn.Module,
        first: Callable[[], object] = tuple,
        calls: ModelCalls | None = None,
        keeps_outputs: Callable[[], bool] = bool,
    ) -> None:
        self._model, self._first, self._keeps_outputs = plain(model), first, keeps_outputs
        self.calls = ModelCalls(lambda: list(model.parameters())) if calls is None else calls
        named = [(name, module) for name, module in self._model.named_modules() if inner_name(module) is None]
        self._names = [(plain_name(name, self._model), module) for name, module in named if name]
        devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
        self._devices = [torch.device("cpu"), *sorted(devices, key=str)]
        # Autocast is asked for where the model lies; on the processor for parts of it that lie there.
        self._types = list(dict.fromkeys(device.type for device in reversed(self._devices)))
        #: Since the last look.
        self._passes: list[_Pass] = []
        self._running: _Pass | None = None
        self._watched = _watched(model)
        self._handles = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self._watched]
        self._handles += [module.register_forward_hook(self._after, always_call=True) for module in self._watched]

    def take(self, inputs: Any = None) -> ForwardState | None:
        """How the model stood before a pass since the last call: the one that was given ``inputs``, or else the first.

        A random state is kept only where the generator has been drawn from since: by the model, or by the loss.

        Args:
            inputs: of the pass that is meant, where there may be others (a validation with gradients); None for any.

        Returns:
            None where there was no pass.
        """
        passes, self._passes = self._passes, []
        if not passes:
            return None
        asked = inputs is not None and (len(passes) > 1 or bool(passes[0].outputs))
        meant = [p for p in passes if _given(p.given, inputs)] if asked else []
        seen = (meant or passes)[0]
        rng = seen.state.rng
        drawn = {name: state for name, state in rng.items() if not torch.equal(state, random_state(name))}
        return replace(seen.state, rng=drawn, outputs=seen.outputs if meant else {})

    def check_declared(self, inputs: Any, targets: Any, where: str) -> None:
        """Refuse inputs and targets that are declared one for the other.

        Args:
            inputs: as they are declared.
            targets: likewise.
            where: for the error.

        Raises:
            RecordingError: the model was given the targets, and not the inputs.
        """
        calls = [each.given for each in self._passes]
        swapped = any(_given(call, targets) and len(call) == len(trees.leaves(targets)) for call in calls)
        if not swapped or any(_given(call, inputs) for call in calls):
            return
        raise RecordingError(
            "inputs and targets are declared one for the other",
            where=where,
            expected="first what the model was called with, then what the loss compares its outputs with",
            got="targets that the model was called with",
            remedy="recorder.batch(inputs, targets, ids=ids)",
        )

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, _memo: Any) -> ForwardWatch:
        return self  # copies of the model have the hook too, but are not watched

    def __reduce__(self) -> Any:  # a pickled model takes its hooks along
        return ForwardWatch, (nn.Module(),)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Inside torch.compile nothing can be looked at; what is compiled from outside calls the hook as usual.
        if torch.compiler.is_compiling() or not any(module is watched for watched in self._watched):
            return
        self.calls.begin(module, args, kwargs)
        if self.calls.nested:
            return
        self._running = None
        if not torch.is_grad_enabled():
            return
        if not self._passes:
            self._first()
        training = self._model.training
        cast = next((kind for kind in self._types if torch.is_autocast_enabled(kind)), None)
        inside = None if cast is not None else autocast_inside(self._model)
        state = ForwardState(
            training,
            tuple(name for name, module in self._names if module.training is not training),
            str(torch.get_autocast_dtype(cast)) if cast is not None else str(inside.fast_dtype) if inside else None,
            cast if cast is not None else inside.device if inside else self._types[0],
            {str(device): random_state(device) for device in self._devices},
        )
        self._running = _Pass(state, trees.leaves((args, kwargs)))
        self._passes.append(self._running)
        if len(self._passes) > _HELD:  # a validation of many batches: the first pass and the last ones
            del self._passes[1]

    def _after(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not any(module is watched for watched in self._watched):
            return
        if self._running is not None and not self.calls.nested and self._keeps_outputs():
            self._running.outputs = output_entries(output)
        self.calls.end(output)


def _given(call: list[Tensor], declared: Any) -> bool:
    """Whether a call was given all tensors that are declared."""
    tensors = trees.leaves(declared)

    def there(tensor: Tensor) -> bool:
        alike = [t for t in call if t.shape == tensor.shape and t.dtype == tensor.dtype and t.layout == tensor.layout]
        return any(t is tensor or (t.layout == torch.strided and torch.equal(t, tensor.to(t.device))) for t in alike)

    return bool(tensors) and all(map(there, tensors))


def _watched(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, whichever of them the loop calls; but nothing inside a compiled one."""
    found: list[nn.Module] = []
    for module in wrapping(model):
        found.append(module)
        if COMPILED in module._modules:
            break
    return [*found[:-1], *_callable(found[-1])]


def _callable(model: nn.Module) -> list[nn.Module]:
    # Asked of the instance: torch.compile puts the method there.
    if getattr(model.forward, "__func__", None) is not nn.Module.forward:
        return [model]
    return [module for child in model.children() for module in _callable(child)]
