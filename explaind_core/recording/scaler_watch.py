"""Steps that a gradient scaler skips: without a fused optimizer it does not even call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.amp import GradScaler

from explaind_core.errors import RecordingError

__all__ = ["ScalerWatch", "check_scaler"]


def check_scaler(scaler: object) -> None:
    """Refuse what is no gradient scaler; None is none.

    Args:
        scaler: what the Recorder was given.

    Raises:
        RecordingError: it has no ``step`` and ``update``.
    """
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("step", "update")):
        raise RecordingError(
            "this is no gradient scaler", where="scaler", expected="a torch.amp.GradScaler", got=type(scaler).__name__
        )


class ScalerWatch:
    """Tells when ``scaler.step(optimizer)`` returns without having called ``optimizer.step()``.

    That is what a scaler does where a gradient is infinite or NaN. Its scale tells it only after ``update()``, and not
    of which optimizer; so ``step`` of this one scaler is wrapped, until :meth:`close`.

    Args:
        scaler: the loop's.
        optimizers: those that are recorded.
        skipped: called with the number of the one that was skipped, counted from 0.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scaler, seen = GradScaler("cpu"), []
        >>> watch = ScalerWatch(scaler, [optimizer], seen.append)
        >>> for factor in (1.0, float("inf")):
        ...     scaler.scale(factor * optimizer.param_groups[0]["params"][0].sum()).backward()
        ...     _ = scaler.step(optimizer)
        ...     scaler.update()
        >>> seen
        [0]
        >>> watch.close()
    """

    def __init__(
        self, scaler: GradScaler, optimizers: Sequence[torch.optim.Optimizer], skipped: Callable[[int], object]
    ) -> None:
        self._scaler, self._optimizers, self._skipped = scaler, list(optimizers), skipped
        self._made = [0] * len(self._optimizers)
        self._handles = [
            optimizer.register_step_pre_hook(self._counting(member)) for member, optimizer in enumerate(optimizers)
        ]
        self._original = scaler.step
        scaler.step = self._step  # type: ignore[method-assign]

    def _counting(self, member: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self._made[member] += 1

        return count

    def _step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        member = next((k for k, known in enumerate(self._optimizers) if known is optimizer), None)
        if member is None:  # of another model
            return self._original(optimizer, *args, **kwargs)
        made = self._made[member]
        result = self._original(optimizer, *args, **kwargs)
        if self._made[member] == made:
            self._skipped(member)
        return result

    def close(self) -> None:
        """Leave the scaler and the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        if self._scaler.__dict__.get("step") == self._step:
            del self._scaler.step
