"""A recorded run: its steps, with the model, the loss and the rules that explain them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from explaind_core.copies import plain_copy, without_backward_hooks
from explaind_core.data import IndexedDataset
from explaind_core.errors import QuestionError, StoreError, printable
from explaind_core.naming import plain, plain_name
from explaind_core.rules import Registry, UpdateRule
from explaind_core.run.description import RunDescription
from explaind_core.run.explained_steps import ExplainedSteps, OptimizerFactory
from explaind_core.run.recompute import Recomputation
from explaind_core.run.restore import restore
from explaind_core.store import RunStore, damages, settle
from explaind_core.training_step import (
    Batch,
    GradientFunction,
    LossFunction,
    MicroBatch,
    ParameterInfo,
    model_parts,
    rebuild_loss,
)

__all__ = ["Batch", "MicroBatch", "ParameterInfo", "Run", "open_run"]


class Run(ExplainedSteps):
    """A recorded run, read-only; nothing is read before it is asked for. Open one with :func:`open_run`.

    Args:
        path: see :func:`open_run`, which has the same arguments.

    Attributes:
        steps: ``range(1, N + 1)``.
        parameters: name -> :class:`ParameterInfo`.
        model: a private copy of the architecture in evaluation mode, None if none was given.
        loss: the recorded loss if it is one of torch's own or was given, None otherwise.
        complete: whether the recording ended in order.
        first_damage: what is wrong with the first step that ``until="intact"`` left out, None where nothing is.
        mode: what was stored: ``"steps"``, ``"parameters"`` or ``"snapshots"``; the rest is computed again.
        rule: the rule that was given, or inferred; None where the registered one explains the run.
        penalty: the term of the loss that depends on the parameters alone, None without.
        dataset: where batches that were not stored are read again, None without.
        point: which parameters ``theta`` returns: ``"gradient"`` or ``"evaluated"`` (see :func:`open_run`).

    Example:
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=3)
        >>> run.steps, list(run.parameters), run.complete
        (range(1, 4), ['0.weight', '0.bias', '2.weight', '2.bias'], True)
        >>> (run.theta(3)["2.bias"] - run.theta(0)["2.bias"]).abs().max() > 0
        tensor(True)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        loss: LossFunction | None = None,
        make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
        until: int | str | None = None,
        point: str = "gradient",
        rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
        registry: Registry | None = None,
        gradient: GradientFunction | None = None,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        damaged: bool = False,
        dataset: IndexedDataset | None = None,
    ) -> None:
        settle(path)
        super().__init__(
            RunStore(path), until=until, damaged=damaged, dataset=dataset, point=point, rule=rule, registry=registry,
            make_optimizer=make_optimizer,
        )  # fmt: skip
        self.penalty = penalty
        #: Embeddings whose gradients, in training, were divided by how often an index stood in the batch.
        self._by_frequency: dict[str, bool] = {}
        self.model = None if model is None else self._check_model(model)
        self.loss = loss if loss is not None else rebuild_loss(self.manifest["loss"])
        self._gradient = gradient
        #: As it was given: of a run that is computed again, not even an evaluation mode may be set for good.
        self._architecture = None if model is None or self.mode == "steps" else plain_copy(model)
        self._models: dict[bool, nn.Module] = {}
        #: What it is made of, before anything in its copies is set for derivatives.
        self.modules = {} if model is None else model_parts(plain(model))
        #: Whether the model is known to be the recorded one, or meant to be another.
        self.model_accepted = False
        #: Whether it is known to return what the recorded one returned, or meant not to.
        self.outputs_accepted = False

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}: {len(self.steps)} steps of {printable(self.manifest['optimizer'])} on "
            f"{sum(p.shape.numel() for p in self.parameters.values()):,} parameters"
            f"{f', explained by {self.rule}' if self.rule is not None and self.rule.inferred else ''})"
        )

    def accept_model(self) -> None:
        """Take the model as it is, though it is made of other modules than the recorded one, or other code.

        Otherwise the first question compares: a model that is made of something else must give the gradient that was
        recorded of the first batch, and every model the outputs that were recorded of some batches.
        """
        self.model_accepted = self.outputs_accepted = True

    def explained_by(self, rule: UpdateRule) -> Run:
        """The same run, explained by another rule.

        Args:
            rule: it speaks for all of the run's optimizers.

        Returns:
            A run that shares everything else with this one.
        """
        other = copy.copy(self)
        other.rule = rule
        return other

    def _check_model(self, model: nn.Module) -> nn.Module:
        model = plain(model)
        given = {plain_name(n, model): (tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()}
        recorded = {n: (tuple(p.shape), str(p.dtype)) for n, p in self.parameters.items()}
        if given != recorded:
            differing = [n for n in [*recorded, *given] if recorded.get(n) != given.get(n)]
            name = differing[0]
            raise StoreError(
                f"the run was recorded with another model: {len(set(differing))} parameters differ",
                where=f"{self.path}, parameter {name!r}",
                expected=recorded.get(name, "no such parameter"),
                got=given.get(name, "no such parameter"),
                remedy=f"build the architecture that was recorded ({self.manifest['model']})",
            )
        private = without_backward_hooks(plain_copy(model)).eval().requires_grad_(False)
        for name, module in private.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # how a gradient is laid out, not what it is: dense ones can be batched
                self._by_frequency[name] = module.scale_grad_by_freq
                module.scale_grad_by_freq = False  # no derivative of f: of training's gradients only
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False  # training: outputs are the same, and no buffer is written to
        return private

    def model_in(self, training: bool) -> nn.Module:
        """A private copy of the architecture in training or in evaluation mode.

        Args:
            training: which of the two.

        Returns:
            The same module at every call.

        Raises:
            QuestionError: the run was opened without its model.
        """
        if self.model is None:
            raise QuestionError(
                "the run was opened without its model", where=self.path, remedy="open_run(path, model=model)"
            )
        if training not in self._models:
            self._models[training] = plain_copy(self.model).train(training)
            for name, scaled in self._by_frequency.items():
                self._models[training].get_submodule(name).scale_grad_by_freq = scaled  # type: ignore[assignment]
        return self._models[training]

    @cached_property
    def _recomputed(self) -> Recomputation:
        return Recomputation(self, self._architecture, loss=self.loss, gradient=self._gradient, penalty=self.penalty)

    def close(self) -> None:
        """Delete what was kept on disk of steps that were computed again. The run can be read on."""
        if "_recomputed" in self.__dict__:
            self._recomputed.close()

    # ------------------------------------------------------------------ the whole run
    @property
    def description(self) -> RunDescription:
        """What the run says of itself: classes, hyper-parameters, versions, seed, commit, data; prints as a table."""
        return RunDescription.of(self)

    def check_files(self, *, progress: bool = True) -> tuple[StoreError, ...]:
        """Read every file of the run and compare it with its checksums.

        Args:
            progress: show a bar.

        Returns:
            What is damaged or missing, an error each; empty where all is well.
        """
        return damages(self.store, progress=progress)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        s: int | None = None,
    ) -> int:
        """Put a model and an optimizer where step s (the last by default) left them, to train on from there.

        The optimizer's state is replayed from the nearest snapshot with the recorded gradients, and so are the
        counters that some optimizers keep in their groups; options, such as a learning rate, are the loop's business.

        Args:
            model: the architecture.
            optimizer: one, or the list of several as it was given to the Recorder.
            s: 0..N, the last step by default.

        Returns:
            s.

        Raises:
            QuestionError: not as many optimizers as were recorded; a parameter whose state was recorded with one of
                several is in none of that one's groups.
        """
        self._check_model(model)
        return restore(self, model, optimizer, s)


def open_run(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    loss: LossFunction | None = None,
    make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
    until: int | str | None = None,
    point: str = "gradient",
    rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
    registry: Registry | None = None,
    gradient: GradientFunction | None = None,
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    damaged: bool = False,
    dataset: IndexedDataset | None = None,
) -> Run:
    """Open a recorded run: lazily, read-only, from any process, without running code from the store.

    Args:
        path: what was passed to :class:`~explaind_core.Recorder`.
        model: the architecture. It is copied: its weights are never read nor changed. Needed to explain
            predictions, not to look at parameters.
        loss: the training loss, where it is not one of torch's own.
        make_optimizer: builds the optimizer from a list of parameter groups, where its class cannot be
            called with the recorded hyper-parameters. For several optimizers a list, with None where none is needed.
        until: open the steps 1..until only; ``"intact"``: those before the first that is damaged or missing, as a loss
            of power leaves the last ones. :attr:`Run.first_damage` tells what was wrong.
        point: for optimizers that evaluate the model elsewhere than they take gradients (Schedule-Free):
            ``"gradient"`` explains the training parameters y, ``"evaluated"`` the model after ``optimizer.eval()``, x.
        rule: explain the run by this rule, and not by the one it was recorded with. For several optimizers a list,
            with None for the registered one; a single rule speaks for all of them.
        registry: the plugins to look for rules in; all installed ones by default.
        gradient: ``gradient(model, micro_batch)`` runs a micro-batch's backward pass as the loop did, for runs that are
            computed again (``mode="parameters"``, ``mode="snapshots"``) and whose loop does not call
            ``(loss(model(inputs), targets) * weight).backward()``.
        penalty: ``penalty(parameters by name) -> 0-d``, the term of one optimizer step's loss that depends on the
            parameters alone; its share of every update is then a term of its own.
        damaged: open a run of which files are damaged or missing: whatever is intact can be read, and asking for
            the rest is an error. By default such a run is refused at once.
        dataset: where the batches of a run recorded with ``inputs="reread"`` are read again, and compared.

    Returns:
        The run.

    Raises:
        StoreError: no run, another version, damaged, or recorded with another model.
        QuestionError: there is no such point; there is not one rule or maker for each optimizer.

    Example:
        >>> import explaind_core as explaind
        >>> from explaind_core.testing import record_example
        >>> recorded = record_example(steps=3)  # its files go with it
        >>> run = explaind.open_run(recorded.path, until=2)
        >>> len(run.steps), run.hyper(1)[0]["lr"]
        (2, 0.01)
        >>> explaind.open_run("nowhere")
        Traceback (most recent call last):
        explaind_core.errors.StoreError: this is not a recorded run
        ...
    """
    return Run(
        path,
        model,
        loss=loss,
        make_optimizer=make_optimizer,
        until=until,
        point=point,
        rule=rule,
        registry=registry,
        gradient=gradient,
        penalty=penalty,
        damaged=damaged,
        dataset=dataset,
    )
