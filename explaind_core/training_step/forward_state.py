"""How the model stood when a batch was passed through it: its modes, autocast, the random state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core.errors import StoreError

__all__ = ["ForwardState", "random_state"]

#: What autocast lowers operations to, by the name that torch prints; nothing else of torch can be named.
_LOWERED = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


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
        outputs: entries of what the model returned, where these were kept
            (:func:`explaind_core.training_step.output_entries`).

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
    outputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put ``model`` into these modes, and autocast and the random generators into this state; undone on leaving.

        Args:
            model: a private copy: the modes of its modules change.

        Yields:
            Nothing.

        Raises:
            StoreError: random numbers were drawn on a device that is not here, or a submodule is missing.
        """
        with ExitStack() as stack:
            stack.enter_context(self.standing(model))
            stack.enter_context(self.cast())
            yield

    @contextmanager
    def standing(self, model: nn.Module) -> Iterator[None]:
        """:meth:`applied` without autocast, which a backward pass must not run under.

        Args:
            model: a private copy.

        Yields:
            Nothing.
        """
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
        """Autocast as it was, off where it was off.

        Returns:
            The context to compute in.
        """
        dtype = None if self.autocast is None else _lowered(self.autocast)
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def header(self) -> dict[str, Any]:
        """All but the tensors; :meth:`stored` is the inverse.

        Returns:
            JSON.
        """
        return {
            "training": self.training,
            "exceptions": list(self.exceptions),
            "autocast": self.autocast,
            "device_type": self.device_type,
            "rng": list(self.rng),
            "scale": self.scale,
        }

    @classmethod
    def stored(
        cls, header: Mapping[str, Any] | None, rng: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None
    ) -> ForwardState | None:
        """What :meth:`header` described.

        Args:
            header: JSON; None where nothing was seen.
            rng: the random states by device.
            outputs: entries of what the model returned, if they were kept.

        Returns:
            The state; None where nothing was seen.

        Raises:
            StoreError: it names a dtype or a device that is none.
        """
        if header is None:
            return None
        if header["autocast"] is not None:
            _lowered(header["autocast"])
        for name in (header["device_type"], *header["rng"]):
            _device(name)
        kept = {device: rng[device] for device in header["rng"]}
        return cls(**{**header, "exceptions": tuple(header["exceptions"]), "rng": kept, "outputs": outputs or {}})


def _lowered(name: object) -> torch.dtype:
    """A dtype that autocast was recorded with."""
    if not isinstance(name, str) or name not in _LOWERED:
        raise _unknown("dtype", name, sorted(_LOWERED))
    return _LOWERED[name]


def _device(name: object) -> torch.device:
    """A device by the name that torch prints; torch itself tells which kinds there are."""
    expected = "cpu, cuda:0 and the like"
    try:
        found = torch.device(str(name))
    except RuntimeError as error:
        raise _unknown("device", name, expected) from error
    if found.type == "meta":  # which computes nothing
        raise _unknown("device", name, expected)
    return found


def _unknown(what: str, name: object, expected: object) -> StoreError:
    return StoreError(
        f"the pass of a batch names a {what} that is none",
        where="forward, in the header of a step",
        expected=expected,
        got=repr(name)[:100],
        remedy="do not use this store: it was not written by explaind",
    )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    found: nn.Module | None = dict(model.named_modules(remove_duplicate=False)).get(
        name
    )  # no attribute that is no module is touched
    if found is None:
        raise StoreError(
            "the model lacks a module that was there when the run was recorded",
            where=f"module {name!r}",
            remedy="build the architecture that was recorded",
        )
    return found


def random_state(device: str | torch.device) -> Tensor:
    """Where a device's global random number generator stands.

    Args:
        device: ``"cpu"``, or where a model lies.

    Returns:
        Its state, uint8.

    Example:
        >>> torch.equal(random_state("cpu"), torch.get_rng_state())
        True
    """
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
