"""The user's own model and optimizers put back where a recorded step left them, to train on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from explaind_core.errors import QuestionError
from explaind_core.naming import plain, plain_name, qualified_name
from explaind_core.rules import JOINED_BY, OWNER, each_optimizer, hand_over
from explaind_core.run.explained_steps import ExplainedSteps
from explaind_core.run.replay import Replay

__all__ = ["restore"]


def restore(
    run: ExplainedSteps,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    s: int | None = None,
) -> int:
    """See :meth:`explaind_core.Run.restore`.

    Args:
        run: the run.
        model: of the run's architecture.
        optimizer: one, or the list of several as it was given to the Recorder.
        s: 0..N, the last step by default.

    Returns:
        s.

    Raises:
        QuestionError: there is no such step; these are not the optimizers that were recorded.
    """
    s = len(run.steps) if s is None else run.check_step(s, first=0)
    optimizers = each_optimizer(optimizer)
    hand_over(optimizers)
    if len(optimizers) != len(run.optimizers):
        raise QuestionError(
            "the run was recorded with another number of optimizers",
            where=run.path,
            expected=f"{len(run.optimizers)}: {run.manifest['optimizer']}",
            got=len(optimizers),
        )
    # A run that was killed before its first step has nothing to replay, and the state that it began with.
    replay = Replay(run) if run.steps else None
    state = run.optimizer_state(0) if replay is None else replay.state_after(s)
    theta, buffers = run.theta(s, point="gradient"), run.buffers(s)
    model = plain(model)
    named = {plain_name(n, model): p for n, p in model.named_parameters()}
    owners = {id(p): k for k, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    if len(optimizers) > 1 and run.steps:
        _check_owners(run, s, optimizers, {n: owners.get(id(p)) for n, p in named.items()})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(theta[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[plain_name(name, model)])
    for each in optimizers:
        each.state.clear()  # a parameter without recorded state has none
    for name, entries in state.items():
        optimizers[owners[id(named[name])] if len(optimizers) > 1 else 0].state[named[name]] = entries
    for each, counted in zip(optimizers, replay.counters() if replay else [()] * len(optimizers), strict=True):
        for group, counters in zip(each.param_groups, counted, strict=False):
            group.update(counters)
    return s


def _check_owners(
    run: ExplainedSteps, s: int, optimizers: Sequence[torch.optim.Optimizer], given: Mapping[str, int | None]
) -> None:
    """Refuse optimizers that are not the recorded ones in their order, with the parameters that each trained."""
    kinds = JOINED_BY.join(qualified_name(type(optimizer)) for optimizer in optimizers)
    recorded = {name: group[OWNER] for group in run.groups(max(s, 1)) for name in group["params"]}
    for name, owner in recorded.items():
        if kinds != run.manifest["optimizer"] or given[name] != owner:
            raise QuestionError(
                "these are not the optimizers that the run was recorded with, in this order",
                where=f"{run.path}, parameter {name!r}",
                expected=f"{run.manifest['optimizer']}; number {owner} of them trains it",
                got=f"{kinds}; {'none' if given[name] is None else f'number {given[name]}'} trains it",
            )
