"""Where the last recorded step left a model: what the next step must start from, and what is stored of that.

It is known in one of two forms. Where parameters are written at every step, copies of them are kept
(:class:`CopiedState`). With ``mode="snapshots"`` nothing of their size is copied or kept, only hashes are
(:class:`HashedState`). A state is a value: a step that was written has a state of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.naming import plain_name
from explaind_core.recording.subject import Subject
from explaind_core.run import Run
from explaind_core.tensors import copied
from explaind_core.training_step import fingerprint

__all__ = ["CopiedState", "HashedState", "LastState", "state_at_start", "stored_state"]

NOTHING: Mapping[str, Tensor | None] = MappingProxyType({})


def state_at_start(
    mode: str, subject: Subject, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> LastState:
    """Where a model stands when recording begins, in the form that the mode needs.

    Args:
        mode: of the recording; see :class:`explaind_core.Recorder`.
        subject: the model and its optimizers.
        parameters: copies of the parameters as they stand.
        buffers: copies of the buffers as they stand.

    Returns:
        The state before step 1.
    """
    if mode == "snapshots":
        starts = {name: fingerprint({name: tensor}) for name, tensor in parameters.items()}
        return HashedState(subject, 0, frozenset(), fingerprint({}), fingerprint(buffers), starts)
    return CopiedState(subject, 0, frozenset(), parameters, buffers, frozenset(), exact=mode != "steps")


def stored_state(mode: str, subject: Subject, run: Run) -> LastState:
    """Where a stored run ended.

    Args:
        mode: of the run.
        subject: the model and its optimizers, which may stand elsewhere.
        run: the run that is continued behind its last step.

    Returns:
        The state after the run's last step.
    """
    step = len(run.steps)
    header = run.step_header(step) if step else {}
    trained = frozenset(n for s in run.steps for group in run.step_header(s)["groups"] for n in group["params"])
    buffers_at_start = run.start_tensors("buffer/")
    if mode == "snapshots":
        starts = {name: fingerprint({name: tensor}) for name, tensor in run.start_tensors("theta/").items()}
        theta_hash = header["theta_hash"] if step else fingerprint({})
        buffer_hash = header["buffer_hash"] if step else fingerprint(buffers_at_start)
        return HashedState(subject, step, trained, theta_hash, buffer_hash, starts)
    buffers = run.buffers(step)
    changed = frozenset(_different(buffers, buffers_at_start))
    return CopiedState(subject, step, trained, run.theta(step), buffers, changed, exact=mode != "steps")


@dataclass(frozen=True, eq=False)
class LastState(ABC):
    """Where the last recorded step left a model.

    Attributes:
        subject: the model, which may have moved since, and its optimizers.
        step: the number of the step that left the model here; 0 where recording began.
        trained: the names of all parameters that a step trained up to now; a step's file tells where all of these
            stand, so that one file tells a whole state.
    """

    subject: Subject
    step: int
    trained: frozenset[str]

    @property
    @abstractmethod
    def header(self) -> dict[str, str]:
        """What the header of the step's file keeps of this state, as JSON."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the step's file keeps of this state.

        Returns:
            By name: ``theta/``, ``buffer/`` and ``evaluated/`` with those of parameters and buffers.
        """

    @abstractmethod
    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a snapshot behind the step keeps of this state, beside the optimizer's own.

        Returns:
            ``(header, tensors)``.

        Raises:
            RecordingError: a parameter that was never trained changed.
        """

    @abstractmethod
    def check_untouched(self, how: str, *, moved: Mapping[str, Tensor | None] = NOTHING) -> None:
        """Refuse parameters that do not stand here any more.

        Args:
            how: where they may have changed, for the error: ``"outside optimizer.step()"``.
            moved: parameters that steps of several optimizers moved since, within one recorded step, and where to;
                None for one that may stand anywhere.

        Raises:
            RecordingError: a parameter changed.
        """

    @abstractmethod
    def difference(self) -> str | None:
        """What of the model does not stand here, when a stored run is continued.

        Returns:
            The parameter, or the hash, that differs, in words; None where the model stands here.

        Raises:
            RecordingError: a parameter that was never trained differs.
        """

    @abstractmethod
    def moved_buffers(self) -> dict[str, Tensor]:
        """The buffers that do not stand here any more.

        Returns:
            Copies by name; where only hashes are kept, of all buffers as soon as one has moved.
        """

    @abstractmethod
    def parameters_now(self) -> dict[str, Tensor]:
        """Where the parameters stand now, as :meth:`after` takes them.

        Returns:
            By name: copies, where copies are kept; else the parameters themselves.
        """

    @abstractmethod
    def after(
        self,
        trained: Iterable[str],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The state that the coming step leaves.

        Args:
            trained: the parameters in its groups.
            parameters: where the parameters stand after it; those that are left out stand where they stood before.
            buffers: copies of the buffers after it, where these are not the present ones.

        Returns:
            The next state; this one is as it was.

        Raises:
            RecordingError: a parameter that was never trained changed.
        """


@dataclass(frozen=True, eq=False)
class CopiedState(LastState):
    """A state of which copies are kept.

    Attributes:
        parameters: copies of the parameters, by name.
        buffers: copies of the buffers, by name.
        changed_buffers: the names of all buffers that a step changed up to now; a step's file holds all of these.
        exact: whether a parameter must stand here to the last bit, also where going to the point at which the model is
            evaluated, and back, rounds.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    changed_buffers: frozenset[str]
    exact: bool = field(kw_only=True)

    @property
    def header(self) -> dict[str, str]:
        """Nothing: the tensors tell all."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`LastState.tensors`."""
        tensors = {f"theta/{name}": self.parameters[name] for name in self.trained}
        tensors |= {f"buffer/{name}": self.buffers[name] for name in self.changed_buffers & self.buffers.keys()}
        return tensors | {f"evaluated/{n}": t for n, t in self.subject.evaluated(self.parameters).items()}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`LastState.snapshot`: nothing, since the step's own file holds it."""
        return {}, {}

    def check_untouched(self, how: str, *, moved: Mapping[str, Tensor | None] = NOTHING) -> None:
        """See :meth:`LastState.check_untouched`."""
        for name, parameter in self.subject.parameters.items():
            left = moved.get(name, self.parameters[name])
            if left is not None and not self._stands(left, parameter.detach().cpu(), exact=self.exact):
                raise _touched(how, self.step, f"parameter {name!r}")

    def difference(self) -> str | None:
        """See :meth:`LastState.difference`: a parameter; buffers may have moved, which the next step notes."""
        for name, parameter in self.subject.parameters.items():
            if not self._stands(self.parameters[name], parameter.detach().cpu(), exact=False):
                return f"parameter {name!r}"
        return None

    def _stands(self, left: Tensor, found: Tensor, *, exact: bool) -> bool:
        if exact or not self.subject.rule.evaluates_elsewhere or left.numel() == 0:
            return torch.equal(left, found)
        # Going to the evaluated point and back rounds; anything beyond that rounding is a change.
        allowed = 16 * torch.finfo(left.dtype).eps * float(left.abs().max())
        return float((left.double() - found.double()).abs().max()) <= allowed

    def moved_buffers(self) -> dict[str, Tensor]:
        """See :meth:`LastState.moved_buffers`."""
        return _different(self.subject.buffers(), self.buffers)

    def parameters_now(self) -> dict[str, Tensor]:
        """See :meth:`LastState.parameters_now`."""
        return self.subject.theta()

    def after(
        self,
        trained: Iterable[str],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
    ) -> CopiedState:
        """See :meth:`LastState.after`."""
        ever_trained, reached = self.trained.union(trained), {**self.parameters, **parameters}
        for name in self.subject.parameters:
            if name not in ever_trained and not torch.equal(reached[name], self.parameters[name]):
                raise _frozen_moved(f"{name!r}, step {self.step + 1}")
        left = self.subject.buffers() if buffers is None else buffers
        changed = self.changed_buffers.union(_different(left, self.buffers))
        return CopiedState(self.subject, self.step + 1, ever_trained, reached, left, changed, exact=self.exact)


@dataclass(frozen=True, eq=False)
class HashedState(LastState):
    """A state of which hashes are kept; of one optimizer.

    Attributes:
        theta_hash: of the parameters ``trained``, as the step left them.
        buffer_hash: of all buffers.
        start_hashes: of every parameter on its own, where recording began: there those stand that were never trained.
    """

    theta_hash: str
    buffer_hash: str
    start_hashes: Mapping[str, str]

    @property
    def header(self) -> dict[str, str]:
        """The two hashes."""
        return {"theta_hash": self.theta_hash, "buffer_hash": self.buffer_hash}

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`LastState.tensors`: nothing, since snapshots hold them."""
        return {}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :meth:`LastState.snapshot`: where the model stands, and which parameters were trained up to now."""
        self._check_frozen()
        theta = {n: copied(p) for n, p in self.subject.parameters.items() if n in self.trained}
        tensors = {f"theta/{n}": t for n, t in theta.items()}
        tensors |= {f"buffer/{n}": b for n, b in self.subject.buffers().items()}
        tensors |= {f"evaluated/{n}": t for n, t in self.subject.evaluated(theta).items()}
        return {"trained": sorted(self.trained)}, tensors

    def check_untouched(self, how: str, *, moved: Mapping[str, Tensor | None] = NOTHING) -> None:  # noqa: ARG002
        """See :meth:`LastState.check_untouched`; parameters that have just joined stand where recording began."""
        groups = self.subject.optimizers[0].param_groups
        joined = {self.subject.names[id(p)] for group in groups for p in group["params"]} - self.trained
        elsewhere = next((name for name in self.subject.parameters if name in joined and self._left_start(name)), None)
        if elsewhere is not None or _theta_hash(self.subject, self.trained) != self.theta_hash:
            raise _touched(how, self.step, "" if elsewhere is None else f"parameter {elsewhere!r}")

    def difference(self) -> str | None:
        """See :meth:`LastState.difference`; before step 1 a parameter is named, since each has a hash of its own."""
        if self.step:
            self._check_frozen()
        elif (elsewhere := next(filter(self._left_start, self.subject.parameters), None)) is not None:
            return f"parameter {elsewhere!r}"
        now = {"theta_hash": _theta_hash(self.subject, self.trained), "buffer_hash": _buffer_hash(self.subject)}
        return next((name for name, value in self.header.items() if now[name] != value), None)

    def _left_start(self, name: str) -> bool:
        return fingerprint({name: self.subject.parameters[name]}) != self.start_hashes[name]

    def _check_frozen(self) -> None:
        for name in self.subject.parameters:
            if name not in self.trained and self._left_start(name):
                raise _frozen_moved(f"{name!r}, up to step {self.step}")

    def moved_buffers(self) -> dict[str, Tensor]:
        """See :meth:`LastState.moved_buffers`."""
        return self.subject.buffers() if _buffer_hash(self.subject) != self.buffer_hash else {}

    def parameters_now(self) -> dict[str, Tensor]:
        """See :meth:`LastState.parameters_now`: they are only looked at."""
        return {name: parameter.detach() for name, parameter in self.subject.parameters.items()}

    def after(
        self,
        trained: Iterable[str],
        parameters: Mapping[str, Tensor],  # noqa: ARG002
        buffers: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> HashedState:
        """See :meth:`LastState.after`: the hashes of the model as it stands.

        Parameters that were never trained are looked at behind every snapshot only.
        """
        names = self.trained.union(trained)
        hashes = _theta_hash(self.subject, names), _buffer_hash(self.subject)
        return HashedState(self.subject, self.step + 1, names, *hashes, self.start_hashes)


def _touched(how: str, step: int, parameter: str) -> RecordingError:
    return RecordingError(
        f"a parameter changed {how}",
        where=", ".join(filter(None, [parameter, f"between step {step} and step {step + 1}"])),
        expected="the value that the last step left",
        remedy="make the Recorder after the model is initialised, and change parameters in step() only",
    )


def _frozen_moved(where: str) -> RecordingError:
    return RecordingError("a parameter that the optimizer does not train changed", where=where)


def _different(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in found.items() if n not in before or not torch.equal(t, before[n])}


def _theta_hash(subject: Subject, names: frozenset[str]) -> str:
    return fingerprint({n: p for n, p in subject.parameters.items() if n in names})


def _buffer_hash(subject: Subject) -> str:
    # Of the buffers where they lie: no copies.
    return fingerprint({plain_name(name, subject.model): b for name, b in subject.model.named_buffers()})
