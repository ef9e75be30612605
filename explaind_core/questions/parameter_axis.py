"""The entries on the layer and the parameter axis."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from explaind_core.questions.layers import Layer
from explaind_core.questions.question import Question

__all__ = ["Places"]


class Places:
    """Where the entries of each parameter tensor stand on the layer and the parameter axis.

    Args:
        question: the question.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.names = [n for n in question.run.parameters if any(n in layer.masks for layer in question.layers)]
        self.codes = {n: code for code, n in enumerate(question.run.parameters)}
        self._columns: dict[str, Tensor] = {}
        start = 0
        for name in self.names:
            covered = self._covered(name)
            columns = torch.full((covered.numel(),), -1, dtype=torch.int64)
            columns[covered] = torch.arange(start, start + int(covered.sum()))
            self._columns[name] = columns
            start += int(covered.sum())

    def _covered(self, name: str) -> Tensor:
        """[d]: which entries of a tensor belong to a layer."""
        covered = torch.zeros(self.question.run.parameters[name].shape, dtype=torch.bool)
        for layer in self.question.layers:
            if name in layer.masks:
                mask = layer.masks[name]
                covered |= torch.ones_like(covered) if mask is None else mask.bool()
        return covered.reshape(-1)

    def of(self, name: str) -> Iterator[tuple[int, Layer, Tensor | None]]:
        """The layers that hold entries of a tensor: (position on the layer axis, layer, mask)."""
        for position, layer in enumerate(self.question.layers):
            if name in layer.masks:
                yield position, layer, layer.masks[name]

    def columns(self, name: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(entries of the flattened tensor inside ``mask``, their places on the parameter axis)."""
        columns = self._columns[name]
        inside = torch.arange(len(columns)) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        return inside, columns[inside]

    def labels(self) -> tuple[Tensor, Tensor]:
        """The parameter axis: (position among all entries of all parameters, code of the tensor)."""
        flat, tensors, start = [], [], 0
        for name, info in self.question.run.parameters.items():
            if name in self._columns:
                inside = (self._columns[name] >= 0).nonzero().squeeze(1)
                flat.append(inside + start)
                tensors.append(torch.full_like(inside, self.codes[name]))
            start += info.shape.numel()
        return torch.cat(flat), torch.cat(tensors)
