"""The paper's modular-addition task and Transformer (appendix C.2).

A sample is the token sequence ``[a] [+] [b] [=]`` with ``p > a >= b >= 0``; its label is
``(a + b) mod p``. The vocabulary has ``p + 2`` tokens: the numbers, then ``+``, then ``=``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LAYERS", "ModularAddition", "ModularTransformer", "modular_addition"]

#: The six layers of the paper's Figure 3a, as patterns over parameter names, first to last.
LAYERS: dict[str, str] = {
    "embedding": "embedding.*",
    "attention encoder": "attention.encoders.*",
    "attention decoder": "attention.decoders.*",
    "linear 1": "linear1.*",
    "linear 2": "linear2.*",
    "decoder": "decoder.*",
}


@dataclass(frozen=True)
class ModularAddition:
    """Train and test split of the pairs ``a >= b`` modulo ``p``.

    Shapes: ``*_inputs`` int64 ``[n, 4]`` (tokens), ``*_targets`` int64 ``[n]`` in ``range(p)``.
    """

    p: int
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    @property
    def vocabulary(self) -> int:
        """Number of tokens: the p numbers, ``+`` and ``=``."""
        return self.p + 2


def modular_addition(p: int = 113, train: int = 4000, test: int = 2000, *, seed: int = 0) -> ModularAddition:
    """Draw disjoint train and test sets from the ``p (p + 1) / 2`` pairs with ``a >= b``.

    Args:
        p: the modulus.
        train: how many pairs to train on.
        test: how many other pairs to test with.
        seed: of the draw.

    Raises:
        ValueError: more samples are asked for than pairs exist.

    Example:
        >>> task = modular_addition(5, train=10, test=5)
        >>> task.train_inputs.shape, task.vocabulary
        (torch.Size([10, 4]), 7)
    """
    pairs = torch.tensor([(a, b) for a in range(p) for b in range(a + 1)])
    if train + test > len(pairs):
        raise ValueError(
            f"modulo {p} there are {len(pairs)} pairs a >= b; {train} train + {test} test samples asked for"
        )
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[: train + test]]
    plus, equals = torch.full((len(pairs),), p), torch.full((len(pairs),), p + 1)
    tokens = torch.stack([pairs[:, 0], plus, pairs[:, 1], equals], dim=1)
    targets = pairs.sum(dim=1) % p
    return ModularAddition(p, tokens[:train], targets[:train], tokens[train:], targets[train:])


class SharedProjectionAttention(nn.Module):
    """Attention whose heads use one projection as query, key and value alike; the heads are summed.

    ``sum_h D_h softmax(E_h x_last (E_h x)^T / sqrt(width)) E_h x`` for the last position. Only that
    position is read by the model (nothing mixes positions after this layer), so only its row of the
    attention matrix is computed: the same function at a quarter of the cost.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(head_width)
        self.encoders = nn.ModuleList(nn.Linear(width, head_width, bias=False) for _ in range(heads))
        self.decoders = nn.ModuleList(nn.Linear(head_width, width, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width] -> [n, width]``, the last position's output."""
        total = x.new_zeros(())
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            projected = encoder(x)
            scores = (projected * projected[:, -1:]).sum(-1) * self.scale
            mixed = (scores.softmax(-1).unsqueeze(-1) * projected).sum(1)
            total = total + decoder(mixed)
        return total


class ModularTransformer(nn.Module):
    """The paper's one-layer Transformer: 89,024 parameters for p = 113.

    Embedding of width 64 times 8 (the square root of the width), no positional encoding; four heads
    of width 16 without a residual around them; ``x + relu(linear2(relu(linear1(x))))`` of width 512;
    a bias-free decoder; log-probabilities at the last token. Initialisation is torch's default.

    Example:
        >>> model = ModularTransformer(115)
        >>> sum(p.numel() for p in model.parameters())
        89024
    """

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = SharedProjectionAttention(width, heads, width // heads)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the token that follows: int64 ``[n, 4] -> [n, vocabulary]``."""
        x = self.attention(self.embedding(tokens) * self.scale)
        x = x + torch.relu(self.linear2(torch.relu(self.linear1(x))))
        return torch.log_softmax(self.decoder(x), dim=-1)
