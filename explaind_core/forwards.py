"""How the model stood when a batch was passed through it: its modes, autocast, the random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core.errors import StoreError
from explaind_core.plain import plain_name

__all__ = ["ForwardState", "ForwardWatch"]


@dataclass(frozen=True, eq=False)  # it holds tensors
class ForwardState:
    """How the model stood when a micro-batch was passed through it.

    Attributes:
        training: ``model.training``.
        exceptions: names of submodules whose mode differs from the model's.
        autocast: the dtype that autocast lowered operations to, ``"torch.bfloat16"``; None without autocast.
        device_type: of autocast, or of the model: ``"cpu"``.
        rng: device -> state of its random number generator before the pass, uint8; empty where none was drawn from.
        scale: the factor of a ``GradScaler`` in the loss, where the loop declared it.

    Example:
        >>> state = ForwardState(training=True, rng={"cpu": torch.Generator().manual_seed(0).get_state()})
        >>> dropout = torch.nn.Dropout(0.5).eval()
        >>> with state.applied(dropout):
        ...     first = dropout(torch.ones(100))
        >>> with state.applied(dropout):
        ...     again = dropout(torch.ones(100))
        >>> int((first == 0).sum()) > 20, torch.equal(first, again), dropout.training
        (True, True, False)
    """

    training: bool
    exceptions: tuple[str, ...] = ()
    autocast: str | None = None
    device_type: str = "cpu"
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put ``model`` into these modes, and autocast and the random generators into this state; undone on leaving.

        Args:
            model: a private copy: the modes of its modules change.

        Raises:
            StoreError: random numbers were drawn on a device that is not here, or a submodule is missing.
        """
        with ExitStack() as stack:
            stack.enter_context(self.standing(model))
            stack.enter_context(self.cast())
            yield

    @contextmanager
    def standing(self, model: nn.Module) -> Iterator[None]:
        """:meth:`applied` without autocast, which a backward pass must not run under."""
        modes = {module: module.training for module in model.modules()}
        with _generators(self.rng):
            try:
                model.train(self.training)
                for name in self.exceptions:
                    _submodule(model, name).training = not self.training
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def cast(self) -> AbstractContextManager[Any]:
        """Autocast as it was, off where it was off."""
        dtype = None if self.autocast is None else getattr(torch, self.autocast.removeprefix("torch."))
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def header(self) -> dict[str, Any]:
        """All but the random states, as JSON; :meth:`stored` is the inverse."""
        return {
            "training": self.training,
            "exceptions": list(self.exceptions),
            "autocast": self.autocast,
            "device_type": self.device_type,
            "rng": list(self.rng),
            "scale": self.scale,
        }

    @classmethod
    def stored(cls, header: Mapping[str, Any] | None, rng: Mapping[str, Tensor]) -> ForwardState | None:
        """What :meth:`header` described, with the random states by device; None where nothing was seen."""
        if header is None:
            return None
        kept = {device: rng[device] for device in header["rng"]}
        return cls(**{**header, "exceptions": tuple(header["exceptions"]), "rng": kept})


class ForwardWatch:
    """Watches a model's forward passes and remembers how it stood before the first one.

    Only passes with gradients enabled count: those of an evaluation under ``torch.no_grad()`` are not looked at.

    Args:
        model: containers that cannot be called (``nn.ModuleList``) are watched through their children.
        first: called before every first pass that :meth:`take` will tell of.

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

    def __init__(self, model: nn.Module, first: Callable[[], object] = tuple) -> None:
        self._model, self._first = model, first
        named = ((plain_name(name), module) for name, module in model.named_modules())
        self._names = [(name, module) for name, module in named if name]
        devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
        self._devices = [torch.device("cpu"), *sorted(devices, key=str)]
        # Autocast is asked for where the model lies; on the processor for parts of it that lie there.
        self._types = list(dict.fromkeys(device.type for device in reversed(self._devices)))
        self._seen: ForwardState | None = None
        self._watched = _callable(model)
        self._handles = [module.register_forward_pre_hook(self._before) for module in self._watched]

    def take(self) -> ForwardState | None:
        """How the model stood before the first pass since the last call; None if there was none.

        A random state is kept only where the generator has been drawn from since: by the model, or by the loss.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        drawn = {name: state for name, state in seen.rng.items() if not torch.equal(state, _random_state(name))}
        return replace(seen, rng=drawn)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, _memo: Any) -> ForwardWatch:
        return self  # copies of the model have the hook too, but are not watched

    def __reduce__(self) -> Any:  # a pickled model takes its hooks along
        return ForwardWatch, (nn.Module(),)

    def _before(self, module: nn.Module, _inputs: Any) -> None:
        # Inside torch.compile nothing can be looked at; what is compiled from outside calls the hook as usual.
        if self._seen is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if not any(module is watched for watched in self._watched):
            return
        self._first()
        training = self._model.training
        cast = next((kind for kind in self._types if torch.is_autocast_enabled(kind)), None)
        self._seen = ForwardState(
            training,
            tuple(name for name, module in self._names if module.training is not training),
            None if cast is None else str(torch.get_autocast_dtype(cast)),
            self._types[0] if cast is None else cast,
            {str(device): _random_state(device) for device in self._devices},
        )


def _callable(model: nn.Module) -> list[nn.Module]:
    # Asked of the instance: torch.compile puts the method there.
    if getattr(model.forward, "__func__", None) is not nn.Module.forward:
        return [model]
    return [module for child in model.children() for module in _callable(child)]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise StoreError(
            "the model lacks a module that was there when the run was recorded",
            where=f"module {name!r}",
            remedy="build the architecture that was recorded",
        ) from error


def _random_state(device: str | torch.device) -> Tensor:
    device = torch.device(device)
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


@contextmanager
def _generators(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Random generators in the given states; whatever they stood at is put back."""
    others = [torch.device(name) for name in states if torch.device(name).type != "cpu"]
    for device in others:
        backend = torch.get_device_module(device)
        if not backend.is_available() or (device.index or 0) >= backend.device_count():
            raise StoreError(
                "random numbers of the pass were drawn on a device that is not here",
                where=str(device),
                got=f"{backend.device_count()} devices of this kind",
                remedy="ask where the run was recorded: another device draws other numbers",
            )
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the processor's
        for device in others:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        for name, state in states.items():
            device = torch.device(name)
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
        yield
