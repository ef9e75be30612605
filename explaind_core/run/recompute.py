"""Steps that were not stored, computed again by training itself: model, batch, loss, backward, and the optimizer.

They are compared bit by bit with the hashes that were stored. Of ``mode="parameters"`` the gradient of a step is
computed again at the recorded theta_{s-1}. Of ``mode="snapshots"`` training itself is run again from the snapshot
before: forward, loss, backward, clipping, the real optimizer's step. A step that does not come out as it was recorded
is an error: nothing is ever explained that did not happen.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import ExplaindError, QuestionError, StoreError
from explaind_core.run.explained_steps import ExplainedSteps
from explaind_core.run.replay import Replay
from explaind_core.store import RunStore, StoredFile
from explaind_core.training_step import (
    GradientFunction,
    LossFunction,
    Recipe,
    differences,
    environment,
    fingerprint,
    threads,
)

__all__ = ["Recomputation"]

#: So many stretches between snapshots are kept at a time: walking back and forth over a border costs nothing.
_KEPT = 2


class Recomputation:
    """The unstored part of a run's steps.

    Args:
        run: recorded with ``mode="parameters"`` or ``mode="snapshots"``.
        model: a private copy of the architecture as it was trained; its parameters and buffers are written to.
        loss: as the loop had it; see :class:`explaind_core.training_step.Recipe`.
        gradient: what runs a micro-batch's backward pass as the loop did.
        penalty: the term of the loss that depends on the parameters alone.

    Raises:
        QuestionError: the model is missing, or the loss.
    """

    def __init__(
        self,
        run: ExplainedSteps,
        model: nn.Module | None,
        *,
        loss: LossFunction | None,
        gradient: GradientFunction | None,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None,
    ) -> None:
        what = f"a run recorded with mode={run.mode!r} is computed again where it is read"
        if model is None:
            raise QuestionError(f"{what}: that takes the model", where=run.path, remedy="open_run(path, model=model)")
        if loss is None and gradient is None:
            raise QuestionError(
                f"{what}: that takes the loss",
                where=run.path,
                expected=(run.manifest["loss"] or {}).get("name", "the loss that the loop had"),
                remedy="open_run(path, model=model, loss=loss)",
            )
        if run.manifest.get("penalty") and penalty is None and gradient is None:
            raise QuestionError(
                f"{what}: that takes the penalty that it was trained with",
                where=run.path,
                expected=run.manifest["penalty"]["name"],
                remedy="open_run(path, model=model, penalty=...)",
            )
        self._run, self._model, self._loss, self._backward, self._penalty = run, model, loss, gradient, penalty
        self._segments: OrderedDict[int, RunStore] = OrderedDict()
        self.gradients = lru_cache(maxsize=2)(self._gradients_again)

    def close(self) -> None:
        """Delete what is kept on disk."""
        while self._segments:
            shutil.rmtree(self._segments.popitem()[1].path, ignore_errors=True)
        self.gradients.cache_clear()

    # ------------------------------------------------------------------ parameters at every step
    def _gradients_again(self, s: int) -> dict[str, Tensor]:
        """The gradients that step s was fed, computed at the stored theta_{s-1}.

        Raises:
            StoreError: they are not those that were recorded.
        """
        run = self._run
        with threads(self._threads(s)):
            self._put(run.theta(s - 1, point="gradient"), run.buffers(s - 1))
            found = self._gradient(s)
        # Gradients that were set to zero, and not to None, have no negative zeros.
        wanted = run.step_header(s)["gradient_hash"]
        if fingerprint(found) != wanted:
            found = {n: g + 0.0 for n, g in found.items()}
            if fingerprint(found) != wanted:
                self._drifted(s, "its gradient")
        return found

    # ------------------------------------------------------------------ snapshots
    def stored(self, s: int) -> StoredFile:
        """Step s as ``mode="steps"`` would have stored it.

        Args:
            s: 1..N. All steps of its stretch between two snapshots are computed, and kept on disk for a while.

        Returns:
            The header and the tensors of its file.

        Raises:
            StoreError: computed again, a step is not the one that was recorded.
        """
        start = max(k for k in self._run.snapshots() if k < s)
        if start not in self._segments:
            self._segments[start] = self._run_again(start)
            while len(self._segments) > _KEPT:
                shutil.rmtree(self._segments.popitem(last=False)[1].path, ignore_errors=True)
        self._segments.move_to_end(start)
        store = self._segments[start]
        return store.read_tensors(store.step_path(s), what=f"step {s}, computed again")

    def _run_again(self, start: int) -> RunStore:
        folder = tempfile.mkdtemp(prefix="explaind-steps-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # at exit as well
        store = RunStore(folder, compress=False)
        until = min([k for k in self._run.snapshots() if k > start] + [len(self._run.steps)])
        try:
            for s, tensors in self._steps(start, until):
                store.write_tensors(store.step_path(s), self._run.step_header(s), tensors)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return store

    def _steps(self, start: int, until: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        run, named = self._run, dict(self._model.named_parameters())
        at_start = run.start_tensors("buffer/")
        self._put(run.theta(start, point="gradient"), run.buffers(start))
        replay = Replay(run, named)
        replay.load(self._moved(run.optimizer_state(start)))
        rule = replay.rule().rule
        trained = set(run.trained_until(start))
        for s in range(start + 1, until + 1):
            header = run.step_header(s)
            groups = run.groups(s)
            trained.update(n for group in groups for n in group["params"])
            with threads(self._threads(s)):
                fed = self._gradient(s)
                tensors = {f"gradient/{n}": g.detach().cpu().clone() for n, g in fed.items()}
                replay.step_again(groups, fed, run.outside(s))
            theta = {n: p.detach() for n, p in named.items() if n in trained}
            if fingerprint(theta) != header["theta_hash"]:
                self._drifted(s, "its parameters")
            buffers = {n: b.detach() for n, b in self._model.named_buffers()}
            if fingerprint(buffers) != header["buffer_hash"]:
                self._drifted(s, "its buffers")
            moved = {n: b for n, b in buffers.items() if n not in at_start or not torch.equal(b.cpu(), at_start[n])}
            tensors |= {f"theta/{n}": p.cpu().clone() for n, p in theta.items()}
            tensors |= {f"buffer/{n}": b.cpu().clone() for n, b in moved.items()}
            if rule.evaluates_elsewhere:
                state = replay.state()
                for group in groups:
                    for n in group["params"]:
                        found = rule.evaluated(theta[n], state.get(n, {}), group)
                        tensors[f"evaluated/{n}"] = found.detach().cpu().clone()
            yield s, tensors

    # ------------------------------------------------------------------ both
    def _threads(self, s: int) -> int:
        count: int = self._run.step_header(s).get("threads", self._run.manifest["environment"]["threads"])
        return count

    def _put(self, theta: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(theta[name])
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    def _moved(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """A stored state on the model's device; counters of torch's optimizers stay in main memory."""
        device = next(self._model.parameters()).device
        moved: dict[str, dict[str, Any]] = trees.map_tensors(lambda t: t.to(device) if t.ndim else t, state)
        return moved

    def _gradient(self, s: int) -> dict[str, Tensor]:
        run, header = self._run, self._run.step_header(s)
        with torch.no_grad():
            for name, buffer in run.buffers_before(s).items():
                self._model.get_buffer(name).copy_(buffer)
        names = {n for group in header["groups"] for n in group["params"]}
        trained = [n for n in run.parameters if n in names]
        micro, clips = run.batch(s).micro, run.clips(s)
        try:
            found = Recipe(**header.get("recipe", {})).gradients(
                self._model,
                micro,
                self._loss,
                fed=[n for n in trained if n not in header["unfed"]],
                trained=trained,
                clips=clips,
                gradient=self._backward,
                penalty=self._penalty,
            )
        except ExplaindError:
            raise
        except Exception as error:  # whatever a model and a loss say of a batch that is not theirs
            raise StoreError(
                f"the gradient of step {s} cannot be computed again: {error!r}",
                where=run.store.step_path(s),
                expected="a batch that the model and the loss take",
                remedy="open the run with the model, the loss and gradient= that it was trained with",
            ) from error
        return {n: g.detach() for n, g in found.items()}

    def _drifted(self, s: int, what: str) -> NoReturn:
        # The thread count is not among the differences: it is set to what it was.
        count = {"threads": self._threads(s)}
        then = self._run.manifest["environment"] | count
        now = environment(next(self._model.parameters()).device) | count
        raise StoreError(
            f"computed again, step {s} does not come out as it was recorded, in {what}",
            where=f"{self._run.path}, step {s}",
            expected="the same bits as in training",
            got=f"others, with {count['threads']} threads as then; what differs: {differences(then, now)}",
            remedy="open the run with the model, the loss, gradient= and make_optimizer= that it was trained with, on "
            "the kind of machine and with the versions that trained it; where a computation is not reproducible there "
            "(torch.use_deterministic_algorithms), record with mode='steps'",
        )
