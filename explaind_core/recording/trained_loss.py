"""A loss with weights of its own, which the optimizer trains, too: they are parameters of what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from explaind_core.errors import RecordingError

__all__ = ["WITH_LOSS", "check_loss"]

#: A module that a loss's own weights are parameters of, and that can be split by samples.
WITH_LOSS = """record a module that returns each sample's loss, so that the loss's weights are among its parameters:

    class WithLoss(torch.nn.Module):
        def __init__(self, model, loss):
            super().__init__()
            self.model, self.loss = model, loss

        def forward(self, inputs, targets):
            outputs = self.model(inputs)
            rows = [self.loss(outputs[k : k + 1], targets[k : k + 1]) for k in range(len(targets))]
            return torch.stack([row.reshape(()) for row in rows])

    def mean(losses, targets):
        return losses.mean()

    trained = WithLoss(model, loss)
    with Recorder(path, trained, optimizer, mean) as recorder:
        ...
        mean(trained(inputs, targets), None).backward()
        recorder.batch((inputs, targets), None, ids=ids)
    run = open_run(path, model=trained, loss=mean)   # explain output=Activation("model"), or each sample's loss
"""


def check_loss(loss: Callable[..., Any] | None, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse a loss whose own parameters the optimizers train.

    Args:
        loss: what the Recorder was given; anything but a module has no weights that can be seen.
        optimizers: without the shells of frameworks.

    Raises:
        RecordingError: it has some.
    """
    if not isinstance(loss, nn.Module):
        return
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    own = [name for name, parameter in loss.named_parameters() if id(parameter) in held]
    if own:
        raise RecordingError(
            "the optimizer trains weights of the loss, which a run cannot tell apart by samples",
            where=f"loss {type(loss).__name__}, parameter {own[0]!r}",
            expected="a loss of outputs and targets alone",
            got=f"{len(own)} trained tensors of its own",
            remedy=WITH_LOSS,
        )
