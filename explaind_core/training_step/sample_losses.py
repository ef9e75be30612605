"""A training loss, evaluated sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.errors import QuestionError
from explaind_core.training_step.losses import LossFunction, describe_loss

__all__ = ["SampleLosses"]


class SampleLosses:
    """The loss of each sample on its own.

    A loss that returns one number per sample is taken as it is. A reduced one (a 0-d result) is called on every sample
    as a batch of one. Its normaliser is then that sample's own: with class weights or ignored tokens this is not the
    sample's share of a batch mean.

    All samples are evaluated at once where ``torch.func.vmap`` can do it. Where it cannot (indexing with a mask, loops
    and branches that look at the data), they are evaluated one by one from then on: these are the same numbers.

    Args:
        loss: ``loss(output, target)``; the output may be a tensor, or tensors in tuples, lists and dicts.

    Attributes:
        vectorised: False once vmap could not evaluate this loss.

    Example:
        >>> losses = SampleLosses(lambda o, y: (o[y > 0] - 1).square().mean())
        >>> losses(torch.tensor([[0.0, 2.0], [3.0, 5.0]]), torch.tensor([[0, 1], [1, 0]])), losses.vectorised
        (tensor([1., 4.]), False)
    """

    def __init__(self, loss: LossFunction) -> None:
        self.loss, self.vectorised = loss, True
        self._tried = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Evaluate the loss of n samples.

        Args:
            outputs: of the model, over n samples.
            targets: of the same samples; None where the loss takes none.

        Returns:
            ``[n]``.

        Raises:
            QuestionError: the result is no tensor, has more than one number per sample, or was drawn at random; or the
                loss cannot be differentiated.
        """
        if not self._tried and not _inside_a_transform():
            self._tried = True
            self._check_derivative(outputs, targets)
        return self._each(outputs, targets)

    def _each(self, outputs: Any, targets: Any) -> Tensor:
        n, state = _samples(outputs, targets), torch.get_rng_state()
        values = self._checked(self.loss(outputs, targets), n)
        if values.ndim:
            return values.reshape(n)
        if n > 1:
            return self._apart(outputs, targets, n)
        self._check_drawn(state)
        return values.reshape(1)

    def _checked(self, values: Any, n: int) -> Tensor:
        if not isinstance(values, Tensor):
            raise QuestionError(
                "the loss is no tensor, and has no derivative",
                where=self._name,
                expected=f"a 0-d tensor, or shape ({n},)",
                got=type(values).__name__,
                remedy="compute it with torch's operations (no .item(), .numpy() or float())",
            )
        if values.ndim and values.numel() != n:
            raise QuestionError(
                "the loss does not return one number per sample",
                expected=f"a 0-d tensor, or shape ({n},)",
                got=tuple(values.shape),
                remedy="sum or average over the other axes",
            )
        return values

    def _apart(self, outputs: Any, targets: Any, n: int) -> Tensor:
        """Each sample as a batch of one; what has no row per sample belongs to all of them."""
        tree = (outputs, targets)
        leaves = trees.leaves(tree)
        own = [i for i, leaf in enumerate(leaves) if leaf.ndim and len(leaf) == n]

        def one(*rows: Tensor) -> Any:
            given = dict(zip(own, rows, strict=True))
            found = (given[i].unsqueeze(0) if i in given else leaf for i, leaf in enumerate(leaves))
            return self.loss(*trees.rebuilt(tree, found)).reshape(())

        stacks = [leaves[i] for i in own]
        if self.vectorised:
            try:
                # randomness="error" is vmap's default: a stochastic loss would have no fixed derivative.
                every: Tensor = torch.func.vmap(one)(*stacks)
                return every
            except Exception as error:
                if "random" in str(error):  # as vmap says it
                    raise self._drawn() from error
                # One by one gives the same numbers; a real error shows up there again.
                self.vectorised = False
        state = torch.get_rng_state()
        each = torch.stack([one(*rows) for rows in zip(*stacks, strict=True)])
        self._check_drawn(state)
        return each

    def _check_drawn(self, state: Tensor) -> None:
        if not torch.equal(state, torch.get_rng_state()):
            raise self._drawn()

    def _drawn(self) -> QuestionError:
        return QuestionError(
            "the loss draws random numbers: it is another function whenever it is called",
            where=self._name,
            expected="a loss that depends on outputs and targets alone",
            remedy="put what is drawn among the targets, or leave it out of the loss that is explained",
        )

    def _check_derivative(self, outputs: Any, targets: Any) -> None:
        """Refuse, by its name, a loss that leaves torch's operations on its way."""
        with torch.enable_grad():
            cut = (leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in trees.leaves(outputs))
            given = trees.rebuilt(outputs, iter(list(cut)))
            try:
                values = self._each(given, targets)
            except QuestionError:
                raise
            except Exception as error:
                with torch.no_grad():
                    self._each(outputs, targets)  # where it fails all the same, derivatives are not the matter
                raise self._no_derivative(f"{type(error).__name__}: {error}") from error
        if values.requires_grad or not values.is_floating_point():
            return
        moved = trees.rebuilt(
            outputs, iter([t * 1.01 + 0.01 if t.is_floating_point() else t for t in trees.leaves(outputs)])
        )
        if not torch.equal(self._each(moved, targets), values.detach()):  # a constant has one, of 0
            raise self._no_derivative("a result that no longer depends on the outputs")

    def _no_derivative(self, got: str) -> QuestionError:
        return QuestionError(
            "the loss cannot be differentiated",
            where=self._name,
            expected="torch's operations, from the outputs to the loss",
            got=got,
            remedy="compute it without .item(), .numpy(), .detach() or torch.no_grad()",
        )

    @property
    def _name(self) -> str:
        description = describe_loss(self.loss) or {}
        return f"loss {description.get('name', '?')}"


def _samples(outputs: Any, targets: Any) -> int:
    """How many samples there are: rows of the targets; of the outputs, where there are none."""
    for tree in (targets, outputs):
        for leaf in trees.leaves(tree):
            return len(leaf) if leaf.ndim else 1
    raise QuestionError(
        "the model returns nothing that a loss can be taken of, sample by sample",
        where="Loss(targets)",
        expected="a tensor, or tensors in tuples, lists, dicts and transformers' outputs",
        got=type(outputs).__name__,
    )


def _inside_a_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None
