"""The models and the data of the matrix of loop features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, CLASSES, STEPS = 16, 3, 6


CROSS_ENTROPY = nn.CrossEntropyLoss()


class Convolutional(nn.Module):
    """Batch normalisation, whose samples are coupled, and whose statistics move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


class Transformer(nn.Module):
    """Dropout in attention and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


class Recurrent(nn.Module):
    """An LSTM that reads and writes with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 6, batch_first=True)
        self.decoder, self.head = nn.Linear(6, 7, bias=False), nn.Linear(7, CLASSES)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.decoder(self.lstm(self.embedding(tokens))[0][:, -1])))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def numbers(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(SAMPLES, *shape, generator=generator)


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(7, (SAMPLES, 5), generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "MLP": (perceptron, numbers(4)),
    "CNN with batch norm": (Convolutional, numbers(1, 6, 6)),
    "Transformer with dropout": (Transformer, tokens),
    "LSTM, tied weights": (Recurrent, tokens),
}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, weight_decay=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.01),
}
