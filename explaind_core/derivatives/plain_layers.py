r"""Per-sample gradients of plain layers, from one batched backward pass.

A layer whose output is linear in its parameter tensor W has, for a sample k with positions t (tokens),

    g_k = sum_t  delta_kt (x) a_kt

with a what the layer saw and delta the gradient at its output. Both are there after an ordinary backward pass of the
whole batch. A layer that is used several times in a pass has one such sum per use, and so has a tensor that several
layers share.

Not for convolutions: unfolding what they saw costs what it saves.

Nothing says that a tensor is used by its layers alone, or that the first axis of what a layer saw counts samples. So
the sums over samples are checked against what autograd gives for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from explaind_core.derivatives.factored_gradients import Factors, Outer, Scatter, Sum

__all__ = ["PlainLayers", "Use"]


# ---------------------------------------------------------------- the layers: from what one saw to factors
def _linear(layer: nn.Linear, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:
    left = delta.reshape(b, -1, layer.out_features)
    return Sum(left) if attribute == "bias" else Outer(left, a.reshape(b, -1, layer.in_features))


def _embedding(layer: nn.Embedding, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:  # noqa: ARG001
    rows, terms = a.reshape(b, -1), delta.reshape(b, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        terms = terms * (rows != layer.padding_idx).unsqueeze(2)
    return Scatter(rows, terms, layer.num_embeddings)


def _normalisation(layer: Any, attribute: str, a: Tensor, delta: Tensor, b: int) -> Factors:
    if attribute == "weight":  # what the scale multiplies: the output for scale 1 and shift 0
        plain = {n: torch.ones_like(p) if n == "weight" else torch.zeros_like(p) for n, p in layer.named_parameters()}
        delta = delta * functional_call(layer, plain, (a,))
    return Sum(delta.reshape(b, -1, *layer.normalized_shape))


#: Exactly these classes: a subclass may compute something else.
_FACTORS: dict[type[nn.Module], Callable[[Any, str, Tensor, Tensor, int], Factors]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _normalisation,
    nn.RMSNorm: _normalisation,
}


def _is_plain(layer: nn.Module) -> bool:
    # These options make what an embedding does to a sample depend on the other samples of its batch.
    coupled = isinstance(layer, nn.Embedding) and (layer.scale_grad_by_freq or layer.max_norm is not None)
    return type(layer) in _FACTORS and not coupled


@dataclass
class Use:
    """One use of a layer in a forward pass.

    Attributes:
        layer: the layer that was called.
        a: its input.
        edge: its output, as a place in the graph that in-place operations behind it do not move.
        delta: the gradient there; None for zero.
    """

    layer: nn.Module
    a: Tensor
    edge: GradientEdge
    delta: Tensor | None = None

    def fits(self, b: int) -> bool:
        """Whether the first axis can be that of b samples, or of their parts one after the other."""
        # Axes of an input with samples: a linear layer's features besides, none for an embedding, all normalised ones.
        least = {nn.Linear: 2, nn.Embedding: 1}
        normalised = len(getattr(self.layer, "normalized_shape", ()))
        return self.a.ndim >= least.get(type(self.layer), normalised + 1) and len(self.a) % b == 0

    def factors(self, attribute: str, b: int) -> Factors:
        """The factors of one of the layer's parameters, for b samples."""
        assert self.delta is not None
        return _FACTORS[type(self.layer)](self.layer, attribute, self.a, self.delta, b)


class PlainLayers:
    """The layers of a model whose per-sample gradients are sums of outer products, and what they saw.

    Args:
        model: its hooks are used for the time of a forward pass.
        names: the parameters that are asked for.

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

    def factors(self, name: str, uses: Sequence[Use], b: int) -> list[Factors]:
        """The factors of parameter ``name`` for b samples, one of each use of its layers.

        It is dropped from ``names``, and there are none, where the first axis of a use cannot be that of the samples.

        Args:
            name: the parameter.
            uses: of all layers, as :meth:`watched` collected them.
            b: how many samples went through the model.
        """
        own = [(use, self._owned[use.layer][name]) for use in uses if name in self._owned[use.layer]]
        if not all(use.fits(b) for use, _ in own):
            self.names.discard(name)
            return []
        return [use.factors(attribute, b) for use, attribute in own if use.delta is not None]
