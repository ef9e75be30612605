"""Where the last step left a model, known by hashes alone: nothing of the parameters' size is copied or kept."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.naming import plain_name
from explaind_core.recording.subject import Subject
from explaind_core.training_step import fingerprint

__all__ = ["Marks"]


class Marks:
    """The hashes of a model's parameters and buffers as they stood after a step.

    Args:
        subject: the model and its optimizer; where they stand now is the first mark.

    Attributes:
        header: what a step's header keeps of it.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._starts = {n: fingerprint({n: p}) for n, p in subject.parameters.items()}
        self._names: set[str] = set()
        self.header: dict[str, str] = {}
        self.set(n for group in subject.groups() for n in group["params"])

    def set(self, trained: Iterable[str]) -> None:
        """Mark where the model stands; ``trained`` are the parameters that have been trained up to now."""
        self._names = set(trained)
        self.header = {"theta_hash": self._theta(), "buffer_hash": fingerprint(self._live_buffers())}

    def set_starts(self, starts: dict[str, Tensor]) -> None:
        """Tell where recording began, where that was before (a run that is resumed)."""
        self._starts = {n: fingerprint({n: p}) for n, p in starts.items()}

    def check(self, how: str, step: int) -> None:
        """Refuse parameters that changed since the mark; ``step`` is the last finished one.

        Raises:
            RecordingError: a trained parameter changed, or one that has just joined.
        """
        joined = {n for group in self._subject.optimizers[0].param_groups for n in self._of(group)} - self._names
        changed = [n for n in joined if fingerprint({n: self._subject.parameters[n]}) != self._starts[n]]
        if changed or self._theta() != self.header["theta_hash"]:
            raise RecordingError(
                f"a parameter changed {how}",
                where=f"{f'parameter {changed[0]!r}, ' if changed else ''}between step {step} and step {step + 1}",
                expected="the value that the last step left",
                remedy="make the Recorder after the model is initialised, and change parameters in step() only",
            )

    def check_frozen(self, step: int) -> None:
        """Refuse a change of parameters that were never trained.

        Raises:
            RecordingError: one changed.
        """
        for name in self._subject.parameters.keys() - self._names:
            if fingerprint({name: self._subject.parameters[name]}) != self._starts[name]:
                raise RecordingError(
                    "a parameter that the optimizer does not train changed", where=f"{name!r}, up to step {step}"
                )

    def moved_buffers(self) -> bool:
        """Whether a buffer changed since the mark."""
        return fingerprint(self._live_buffers()) != self.header["buffer_hash"]

    def _of(self, group: dict[str, list[Tensor]]) -> list[str]:
        return [self._subject.names[id(p)] for p in group["params"]]

    def _theta(self) -> str:
        return fingerprint({n: p for n, p in self._subject.parameters.items() if n in self._names})

    def _live_buffers(self) -> dict[str, Tensor]:
        return {plain_name(name): buffer for name, buffer in self._subject.model.named_buffers()}
