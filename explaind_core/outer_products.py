r"""Per-sample gradients of plain layers, from one batched backward pass.

A layer whose output is linear in its parameter tensor W has, for a sample k with positions t (tokens, pixels),

    g_k = sum_t  delta_kt (x) a_kt

with a what the layer saw and delta the gradient at its output. Both are there after an ordinary backward pass of the
whole batch. A layer that is used several times in a pass has one such sum per use, and so has a tensor that several
layers share.

Nothing says that a tensor is used by its layers alone, or that the first axis of what a layer saw counts samples. So
the sums over samples are checked against what autograd gives for the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.nn import functional as F

from explaind_core.factors import Factors, Outer, Scatter, Sum, slices

__all__ = ["PlainLayers", "Use"]


# ---------------------------------------------------------------- the layers: from what one saw to factors
def _linear(layer: nn.Linear, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:
    left = delta.reshape(b, 1, -1, layer.out_features)
    if attribute == "bias":
        return Sum(left[:, 0])
    return Outer(left, a.reshape(b, 1, -1, layer.in_features), layer.weight.shape)


def _convolution(layer: nn.Conv1d | nn.Conv2d, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:
    if attribute == "bias":
        return Sum(delta.flatten(2).transpose(1, 2).reshape(b, -1, layer.out_channels))
    # Every padding, "same" included, is one of the input; a 1-d convolution is a 2-d one of height 1.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a = F.pad(a, layer._reversed_padding_repeated_twice, mode=mode)
    flat = a.ndim == 3
    kernel, dilation, stride = (
        (1, *size) if flat else size for size in (layer.kernel_size, layer.dilation, layer.stride)
    )
    patches = F.unfold(a.unsqueeze(2) if flat else a, kernel, dilation=dilation, stride=stride)

    def grouped(values: Tensor) -> Tensor:
        """``[uses * b, channels, T]`` as ``[b, G, uses * T, channels / G]``."""
        T = values.shape[-1]
        return (
            values.reshape(b, -1, layer.groups, values.shape[1] // layer.groups, T).permute(0, 2, 1, 4, 3).flatten(2, 3)
        )

    return Outer(grouped(delta.flatten(2)), grouped(patches), layer.weight.shape)


def _embedding(layer: nn.Embedding, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:  # noqa: ARG001
    rows, terms = a.reshape(b, -1), delta.reshape(b, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        terms = terms * (rows != layer.padding_idx).unsqueeze(2)
    return Scatter(rows, terms, layer.num_embeddings)


def _normalisation(layer: Any, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:
    if attribute == "weight":  # what the scale multiplies: the output for scale 1 and shift 0
        plain = {n: torch.ones_like(p) if n == "weight" else torch.zeros_like(p) for n, p in layer.named_parameters()}
        delta = delta * functional_call(layer, plain, (a,))
    if isinstance(layer, nn.GroupNorm):
        return Sum(delta.reshape(len(delta), layer.num_channels, -1).transpose(1, 2).reshape(b, -1, layer.num_channels))
    return Sum(delta.reshape(b, -1, *layer.normalized_shape))


#: Exactly these classes: a subclass may compute something else.
_FACTORS: dict[type[nn.Module], Callable[[Any, str, Tensor, Tensor, int], Factors]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _normalisation,
    nn.RMSNorm: _normalisation,
    nn.GroupNorm: _normalisation,
}


def _is_plain(layer: nn.Module) -> bool:
    # These options make what an embedding does to a sample depend on the other samples of its batch.
    coupled = isinstance(layer, nn.Embedding) and (layer.scale_grad_by_freq or layer.max_norm is not None)
    return type(layer) in _FACTORS and not coupled


@dataclass
class Use:
    """One use of a layer in a forward pass.

    Attributes:
        layer: which. a: what it saw. edge: its output, as a place in the graph that in-place operations behind it
            do not move. delta: the gradient there, None for zero.
    """

    layer: nn.Module
    a: Tensor
    edge: GradientEdge
    delta: Tensor | None = None

    def fits(self, b: int) -> bool:
        """Whether the first axis can be that of b samples, or of their parts one after the other."""
        layer, rank = self.layer, self.a.ndim
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            batched = rank == len(layer.kernel_size) + 2
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            batched = rank > len(layer.normalized_shape)
        else:
            batched = rank > (0 if isinstance(layer, nn.Embedding) else 1)
        return batched and len(self.a) % b == 0

    def factors(self, attribute: str, b: int, rows: slice) -> Factors:
        """The factors of one of its parameters, for the samples ``rows`` of b."""
        assert self.delta is not None
        parts = len(self.a) // b
        chosen = slice(rows.start * parts, rows.stop * parts)
        make = _FACTORS[type(self.layer)]
        return make(self.layer, attribute, self.a[chosen], self.delta[chosen], rows.stop - rows.start)

    def numbers(self) -> int:
        """How many numbers an entry of the first axis unfolds to: the pixels that each place of a convolution sees."""
        if not isinstance(self.layer, nn.Conv1d | nn.Conv2d) or self.delta is None:
            return 1
        return self.layer.in_channels * math.prod(self.layer.kernel_size) * self.delta[0, 0].numel()


class PlainLayers:
    """The layers of a model whose per-sample gradients are sums of outer products, and what they saw.

    Args:
        model: its hooks are used for the time of a forward pass. names: the parameters that are asked for.

    Attributes:
        names: those whose gradients can be had this way, as far as is known; it shrinks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        known = {id(p): n for n, p in model.named_parameters()}
        self._owned: dict[nn.Module, dict[str, str]] = {}
        for layer in filter(_is_plain, model.modules()):
            own = {known[id(p)]: a for a, p in layer.named_parameters(recurse=False) if a in ("weight", "bias")}
            if own.keys() & set(names):
                self._owned[layer] = own
        self.names = {n for own in self._owned.values() for n in own} & set(names)

    @contextmanager
    def watched(self, names: Sequence[str]) -> Iterator[list[Use]]:
        """Collect the uses of the layers that own some of ``names`` while the model runs."""
        uses: list[Use] = []

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            (a,) = (*args, *kwargs.values())
            if output.requires_grad:
                uses.append(Use(layer, a.detach(), get_gradient_edge(output)))

        wanted = self.names & set(names)
        handles = [
            layer.register_forward_hook(see, with_kwargs=True)
            for layer, own in self._owned.items()
            if own.keys() & wanted
        ]
        try:
            yield uses
        finally:
            for handle in handles:
                handle.remove()

    def factors(self, name: str, uses: Sequence[Use], b: int, memory: int) -> Iterator[tuple[slice, list[Factors]]]:
        """The factors of parameter ``name``, one of each use, for some of b samples at a time.

        It is rejected, and there are none, where the first axis of a use cannot be that of the samples.

        Args:
            memory: in bytes, what may be unfolded at a time.
        """
        own = [(use, self._owned[use.layer][name]) for use in uses if name in self._owned[use.layer]]
        if not all(use.fits(b) for use, _ in own):
            self.names.discard(name)
            return
        own = [(use, attribute) for use, attribute in own if use.delta is not None]
        numbers = max((use.numbers() * use.a.element_size() for use, _ in own), default=1)
        for rows in slices(b, memory // numbers):
            yield rows, [use.factors(attribute, b, rows) for use, attribute in own]
