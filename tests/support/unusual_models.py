"""Models that torch.func refuses in one way or another, in float64, with inputs of five samples."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

__all__ = ["MODELS", "WrongForwards", "unusual"]

N = 5


class Sine(torch.autograd.Function):
    """Of the old style: no setup_context, no forward mode, no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class NumpySine(torch.autograd.Function):
    """Its backward pass has no derivative, and says nothing of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.detach().numpy() * np.cos(ctx.saved_tensors[0].detach().numpy()))


class WrongForwards(torch.autograd.Function):
    """A forward-mode derivative that is not that of its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(_ctx, tangent):
        return torch.zeros_like(tangent)


class Between(nn.Module):
    """A linear layer, something in between, another linear layer."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x):
        return self.b(self.between(self.a, x))


class Nested(nn.Module):
    """Activations recomputed inside of recomputed ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def inner(self, h):
        return self.b(h).tanh()

    def outer(self, x):
        return checkpoint(self.inner, self.a(x).tanh(), use_reentrant=False).sin()

    def forward(self, x):
        return self.c(checkpoint(self.outer, x, use_reentrant=False))


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state = self.recurrent(packed)[1]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Force(nn.Module):
    """Physics-informed: the gradient of an energy by the inputs is a part of the output."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.energy(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, force], 1)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(7, 6), nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.bags(words).tanh())


class Warped(nn.Module):
    """A spatial transformer: pictures sampled on a grid that is learned."""

    def __init__(self):
        super().__init__()
        self.grid, self.head = nn.Linear(16, 6), nn.Linear(16, 3)

    def forward(self, x):
        moved = nn.functional.affine_grid(0.3 * self.grid(x.flatten(1)).view(-1, 2, 3), list(x.shape), False)
        return self.head(nn.functional.grid_sample(x, moved, align_corners=False).flatten(1))


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.centres = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.cdist(self.a(x).unsqueeze(1), self.centres.expand(len(x), 3, 6)).squeeze(1)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.a(x.contiguous(memory_format=torch.channels_last)).tanh().flatten(1))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h) if h.detach().sum().item() > -1e9 else h


def watched_by_numpy():
    """A hook that writes activations down."""
    model, seen = Between(lambda a, x: a(x).tanh()), []
    model.a.register_forward_hook(lambda _m, _i, out: seen.append(float(out.detach().numpy().mean())) or None)
    return model


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 6))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


#: Name -> model, inputs, and the way that all derivatives of it need.
MODELS = {
    "plain": (lambda: Between(lambda a, x: a(x).tanh()), random(N, 4)),
    "checkpoint": (
        lambda: Between(lambda a, x: checkpoint(lambda z: a(z).tanh(), x, use_reentrant=False)), random(N, 4),
    ),
    "checkpoint, reentrant": (
        lambda: Between(lambda a, x: checkpoint(lambda z: a(z).tanh(), x, use_reentrant=True)), random(N, 4),
    ),
    "checkpoint, nested": (Nested, random(N, 4)),
    "packed gru": (lambda: Packed(nn.GRU), (random(N, 5, 4), torch.tensor([1, 5, 3, 2, 5]))),
    "packed lstm": (lambda: Packed(nn.LSTM), (random(N, 5, 4), torch.tensor([1, 5, 3, 2, 5]))),
    "lstm": (lambda: Recurrent(nn.LSTM), random(N, 5, 4)),
    "gru": (lambda: Recurrent(nn.GRU), random(N, 5, 4)),
    "old function": (lambda: Between(lambda a, x: Sine.apply(a(x))), random(N, 4)),
    "numpy function": (lambda: Between(lambda a, x: NumpySine.apply(a(x))), random(N, 4)),
    "wrong forward mode": (lambda: Between(lambda a, x: WrongForwards.apply(a(x))), random(N, 4)),
    "numpy hook": (watched_by_numpy, random(N, 4)),
    "branching": (Branching, random(N, 4)),
    "force": (Force, random(N, 4)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh()), random(N, 4),
    ),
    "weight norm, old": (lambda: nn.Sequential(old_weight_norm(), nn.Tanh()), random(N, 4)),
    "embedding bag": (Bags, torch.tensor([[0, 1, 2], [3, 3, 3], [6, 5, 0], [1, 2, 2], [4, 4, 1]])),
    "grid sample": (Warped, random(N, 1, 4, 4)),
    "cdist": (Distances, random(N, 4)),
    "channels last": (Pictures, random(N, 2, 4, 4)),
}  # fmt: skip


def unusual(name: str) -> tuple[nn.Module, object]:
    """A model in evaluation mode, not requiring gradients, and its inputs."""
    make, inputs = MODELS[name]
    torch.manual_seed(3)
    return make().double().eval(), inputs
