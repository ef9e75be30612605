"""Every sample's share of every prediction, by brute force: nothing of the library is used.

A plain loop trains, and keeps each sample's gradient of each step: its own loss term, differentiated alone in the graph
of the whole batch. The optimizer's algebra is written out with its full history: what step s made of a gradient of step
i. Predictions are differentiated row by row at Gauss-Legendre nodes between one step and the next, and multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, SAMPLES, TESTS, NODES = 4, 5, 12, 2, 6
LR, DECAY = 0.05, 0.1


@dataclass
class Case:
    """A model, its data, and the loss of each sample: ``terms(output, targets) -> [n]``."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    terms: Callable[[Any, Tensor], Tensor]


@dataclass
class Training:
    """What a plain loop keeps: parameters after every step, and each sample's gradient of every step."""

    names: list[str]
    theta: list[dict[str, Tensor]] = field(default_factory=list)
    shares: list[dict[int, dict[str, Tensor]]] = field(default_factory=list)
    seconds: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def trained(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Any) -> Training:
    """Train, recorded by ``recorder``; every second batch holds a sample twice."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = [dict(model.named_parameters())[n] for n in names]
    inputs, targets = case.inputs(SAMPLES), case.targets(SAMPLES)
    kept = Training(names)

    def position() -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in zip(names, parameters, strict=True)}

    kept.theta.append(position())
    for s in range(STEPS):
        ids = (torch.arange(BATCH) * (s + 1) + s) % SAMPLES
        ids[-1] = ids[0] if s % 2 else ids[-1]
        terms = case.terms(model(inputs[ids]), targets[ids]) / BATCH
        step: dict[int, dict[str, Tensor]] = {}
        for k, term in zip(ids.tolist(), terms, strict=True):
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            for n, g, p in zip(names, found, parameters, strict=True):
                own = step.setdefault(k, {m: torch.zeros_like(q) for m, q in zip(names, parameters, strict=True)})
                own[n] = own[n] + (torch.zeros_like(p) if g is None else g)
        optimizer.zero_grad(set_to_none=False)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        terms.sum().backward()
        recorder.batch(inputs[ids], targets[ids], ids=ids)
        optimizer.step()
        kept.theta.append(position())
        kept.shares.append(step)
        state = optimizer.state
        kept.seconds.append({n: state[p]["exp_avg_sq"].clone() for n, p in zip(names, parameters, strict=True)}
                            if isinstance(optimizer, torch.optim.AdamW) else {})  # fmt: skip
    kept.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    return kept


# ---------------------------------------------------------------------- what step s makes of a gradient of step i
def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, eps=1e-3)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.8, nesterov=True, weight_decay=DECAY)


OPTIMIZERS = {"AdamW": adamw, "momentum": momentum, "Nesterov, coupled decay": nesterov}


def made_of(name: str, s: int, i: int, gradient: Tensor, second: Tensor | None) -> Tensor:
    """What is added to the parameters at step s because of a gradient of step i (both counted from 1)."""
    if name == "AdamW":
        assert second is not None
        corrected = (1 - 0.9) * 0.9 ** (s - i) * gradient / (1 - 0.9**s)
        return -LR * corrected / ((second / (1 - 0.999**s)).sqrt() + 1e-3)
    if name == "momentum":
        return -LR * 0.9 ** (s - i) * gradient
    ahead = 0.8 ** (s - i + 1) * gradient
    return -LR * (ahead + gradient if s == i else ahead)


# ---------------------------------------------------------------------- the kernel
def jacobian(
    model: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
) -> list[dict[str, Tensor]]:
    """Each output's gradient for one test sample."""
    at = {n: t.clone().requires_grad_() for n, t in theta.items()}
    output = torch.func.functional_call(model, {**at, **buffers}, (x[None],))
    output = output.flatten()
    found = []
    for j in range(len(output)):
        rows = torch.autograd.grad(output[j], list(at.values()), retain_graph=True, allow_unused=True)
        found.append({n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(at.items(), rows, strict=True)})
    return found


def kernel(model: nn.Module, name: str, kept: Training, tests: Tensor) -> np.ndarray:
    """``[parameter tensor, train, test, output]``, summed over steps and gradient steps."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    model.eval()
    result: np.ndarray | None = None
    for s in range(1, STEPS + 1):
        made: dict[int, dict[str, Tensor]] = {}
        for i in range(1, s + 1):
            for k, gradients in kept.shares[i - 1].items():
                own = made.setdefault(k, {n: torch.zeros_like(g) for n, g in gradients.items()})
                for n, g in gradients.items():
                    own[n] = own[n] + made_of(name, s, i, g, kept.seconds[s - 1].get(n))
        for t, x in enumerate(tests):
            for point, weight in zip(points, weights, strict=True):
                u = (point + 1) / 2
                theta = {n: (1 - u) * a + u * kept.theta[s][n] for n, a in kept.theta[s - 1].items()}
                for j, row in enumerate(rows := jacobian(model, theta, kept.buffers, x)):
                    if result is None:
                        result = np.zeros((len(kept.names), SAMPLES, len(tests), len(rows)))
                    for k, own in made.items():
                        for p, n in enumerate(kept.names):
                            result[p, k, t, j] += weight / 2 * float((row[n] * own[n]).sum())
    assert result is not None
    return result


# ---------------------------------------------------------------------- models
def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(count: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(count, (n,), generator=torch.Generator().manual_seed(1))


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: seeded(n, *shape, seed=2)


def tokens(length: int, count: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(count, (n, length), generator=torch.Generator().manual_seed(3))


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets, reduction="none")


def squared(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean(1)


def next_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), targets, reduction="none").mean(1)


class Lambda(nn.Module):
    """Modules, and a forward pass as a function of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def attention() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(m.mix(*[m.embed(x)] * 3, need_weights=False)[0].mean(1)),
        embed=nn.Embedding(7, 4), mix=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    return Lambda(lambda m, x: m.head(m.layer(m.embed(x))[:, 0]), embed=nn.Embedding(7, 4), layer=layer,
                  head=nn.Linear(4, 3))  # fmt: skip


def language_model() -> nn.Module:
    """Causal, tied embedding, learned positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x) + m.positions
        mask = torch.full((4, 4), -torch.inf, dtype=h.dtype).triu(1)
        scores = m.query(h) @ m.key(h).transpose(1, 2) / 2 + mask
        return F.linear(h + scores.softmax(-1) @ m.value(h), m.embed.weight)

    parts = {n: nn.Linear(4, 4, bias=False) for n in ("query", "key", "value")}
    return Lambda(forward, embed=nn.Embedding(5, 4), positions=nn.Parameter(seeded(4, 4, seed=5)), **parts)


def lora() -> nn.Module:
    return Lambda(
        lambda m, x: m.base(x) + m.A(m.drop(x)) @ m.B.T,
        base=nn.Linear(4, 3).requires_grad_(False), A=nn.Linear(4, 2, bias=False), drop=nn.Dropout(0.3),
        B=nn.Parameter(torch.zeros(3, 2)),
    )  # fmt: skip


def experts() -> nn.Module:
    return Lambda(
        lambda m, x: sum(g[:, None] * e(x) for g, e in zip(m.gate(x).softmax(1).T, m.experts, strict=True)),
        gate=nn.Linear(4, 2), experts=nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]),
    )  # fmt: skip


def recurrent(kind: Any) -> Callable[[], nn.Module]:
    return lambda: Lambda(lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=kind(3, 4, batch_first=True),
                          head=nn.Linear(4, 3))  # fmt: skip


def rezero() -> nn.Module:
    return Lambda(lambda m, x: m.head(x + m.gate * m.branch(x)), gate=nn.Parameter(torch.zeros(4)),
                  branch=nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4)), head=nn.Linear(4, 3))  # fmt: skip


def squeeze_excite() -> nn.Module:
    return Lambda(
        lambda m, x: m.head((h := m.conv(x).tanh()).mean((2, 3)) * m.scale(h.mean((2, 3))).sigmoid()),
        conv=nn.Conv2d(1, 3, 2), scale=nn.Linear(3, 3), head=nn.Linear(3, 3),
    )  # fmt: skip


def sequential(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*[module() for module in modules])


def L(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


VECTORS = (numbers(4), classes(3), cross_entropy)
IMAGES = (numbers(1, 4, 4), classes(3), cross_entropy)
SERIES = (numbers(5, 3), classes(3), cross_entropy)
WORDS = (tokens(4, 7), classes(3), cross_entropy)
CASES = {
    "linear": Case(sequential(L(4, 3)), *VECTORS),
    "tanh": Case(sequential(L(4, 5), nn.Tanh, L(5, 3)), *VECTORS),
    "GELU": Case(sequential(L(4, 5), nn.GELU, L(5, 5), nn.SiLU, L(5, 3)), *VECTORS),
    "regression": Case(sequential(L(4, 5), nn.Softplus, L(5, 2)), numbers(4), numbers(2), squared),
    "layer norm": Case(sequential(L(4, 5), lambda: nn.LayerNorm(5), nn.Tanh, L(5, 3)), *VECTORS),
    "RMS norm": Case(sequential(L(4, 5), lambda: nn.RMSNorm(5, eps=1e-3), L(5, 3)), *VECTORS),
    "batch norm": Case(sequential(L(4, 5), lambda: nn.BatchNorm1d(5), nn.Tanh, L(5, 3)), *VECTORS),
    "group norm": Case(
        sequential(lambda: nn.Conv2d(1, 4, 2), lambda: nn.GroupNorm(2, 4), nn.Tanh, nn.Flatten, L(36, 3)),
        *IMAGES,
    ),
    "dropout": Case(sequential(L(4, 6), nn.Tanh, lambda: nn.Dropout(0.4), L(6, 3)), *VECTORS),
    "convolutions": Case(
        sequential(lambda: nn.Conv2d(1, 3, 2), nn.Tanh, lambda: nn.AvgPool2d(2), nn.Flatten, L(3, 3)),
        *IMAGES,
    ),
    "batch norm of images": Case(
        sequential(lambda: nn.Conv2d(1, 2, 2), lambda: nn.BatchNorm2d(2), nn.Tanh, nn.Flatten, L(18, 3)),
        *IMAGES,
    ),
    "transposed convolution": Case(
        sequential(lambda: nn.ConvTranspose2d(1, 2, 2, stride=2), nn.Tanh, nn.Flatten, L(128, 2)),
        numbers(1, 4, 4), numbers(2), squared,
    ),
    "squeeze and excite": Case(squeeze_excite, *IMAGES),
    "LSTM": Case(recurrent(nn.LSTM), *SERIES),
    "GRU": Case(recurrent(nn.GRU), *SERIES),
    "Elman": Case(recurrent(nn.RNN), *SERIES),
    "attention": Case(attention, *WORDS),
    "Transformer": Case(encoder, *WORDS),
    "language model, tied": Case(language_model, tokens(4, 5), lambda n: tokens(4, 5)(n).roll(1, 0), next_tokens),
    "bag of words": Case(sequential(lambda: nn.EmbeddingBag(7, 4), L(4, 3)), *WORDS),
    "LoRA from zero": Case(lora, *VECTORS),
    "ReZero": Case(rezero, *VECTORS),
    "experts": Case(experts, *VECTORS),
    "PReLU": Case(sequential(L(4, 5), lambda: nn.PReLU(5, init=0.7), L(5, 3)), *VECTORS),
}  # fmt: skip
