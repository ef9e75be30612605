"""Trainings with loop features, and what every influence on them is: explicit sums."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import explaind_core as explaind

SAMPLES, NODES = 8, 3


KEPT = ("step", "gradient_step", "layer", "train", "test", "output")


_GENERATOR = torch.Generator().manual_seed(2)


DATA = torch.randn(SAMPLES, 3, generator=_GENERATOR, dtype=torch.float64)


TARGETS = torch.randint(2, (SAMPLES,), generator=_GENERATOR)


INPUTS = torch.randn(2, 3, generator=_GENERATOR, dtype=torch.float64)


#: Temporary folders live as long as the tests.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def network(features: frozenset[str]) -> nn.Sequential:
    """No bias before a normalisation: its gradient would be rounding, and nothing else."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(3, 4, bias="norm" not in features)]
    layers += [nn.BatchNorm1d(4)] if "norm" in features else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(0.4)] if "dropout" in features else []
    layers += [nn.Linear(4, 3), nn.Tanh()]
    layers += [nn.Dropout(0.3)] if "dropout" in features else []
    return nn.Sequential(*layers, nn.Linear(3, 2)).double()


def penalty(parameters: Any) -> Tensor:
    """Not quadratic, and not of every parameter."""
    return 0.1 * parameters["0.weight"].pow(4).sum() + 0.05 * sum(
        p.abs().sum() for p in parameters.values() if p.ndim > 1
    )


@dataclass
class Trained:
    """A recorded run, and what its loop saw by itself, step by step."""

    run: explaind.Run
    lr: float
    mu: float
    decay: float
    theta: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    shares: list[tuple[list[int], list[dict[str, Tensor]]]] = field(default_factory=list)
    penalties: list[dict[str, Tensor]] = field(default_factory=list)
    fed: list[dict[str, Tensor]] = field(default_factory=list)


def shares_of(
    model: nn.Module, state: Tensor, inputs: Tensor, targets: Tensor, weight: float
) -> list[dict[str, Tensor]]:
    """Each sample's share: the gradient of the batch's loss through this row of the outputs alone."""
    model, now = copy.deepcopy(model), torch.get_rng_state()
    torch.set_rng_state(state)
    outputs = model(inputs)
    torch.set_rng_state(now)
    leaf = outputs.detach().requires_grad_()
    (pull,) = torch.autograd.grad(weight * nn.functional.cross_entropy(leaf, targets), leaf)
    found = []
    for row in range(len(inputs)):
        only = torch.zeros_like(pull)
        only[row] = pull[row]
        gradients = torch.autograd.grad(outputs, list(model.parameters()), only, retain_graph=True, allow_unused=True)
        found.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(model.named_parameters(), gradients, strict=True)
            }
        )
    return found


def train(
    features: frozenset[str],
    batches: list[list[list[int]]],
    *,
    lr: float = 0.3,
    mu: float = 0.7,
    decay: float = 0.1,
    **options: Any,
) -> Trained:
    """Train, record, and keep apart what every sample did."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="explaind-loops-"))
    path = Path(_FOLDERS[-1].name) / "run"
    model = network(features)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=mu, weight_decay=decay)
    loss = nn.CrossEntropyLoss()
    term = penalty if "penalty" in features else None
    kept = Trained(None, lr, mu, decay)  # type: ignore[arg-type]

    def keep() -> None:
        kept.theta.append({n: p.detach().clone() for n, p in model.named_parameters()})
        kept.buffers.append({n: b.clone() for n, b in model.named_buffers()})

    keep()
    torch.manual_seed(3)
    with explaind.Recorder(path, model, optimizer, loss, penalty=term, **options) as recorder:
        for step in batches:
            optimizer.zero_grad()
            ids, shares = [], []
            for k in step:
                state, weight, batch = torch.get_rng_state(), 1 / len(step), torch.tensor(k)
                shares += shares_of(model, state, DATA[batch], TARGETS[batch], weight)
                ids += k
                (weight * loss(model(DATA[batch]), TARGETS[batch])).backward()
                recorder.batch(DATA[batch], TARGETS[batch], ids=batch, weight=weight)
            factor = {n: torch.ones_like(p) for n, p in model.named_parameters()}
            penalties = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            if term is not None:
                parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
                term(parameters).backward()
                penalties = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
                term(dict(model.named_parameters())).backward()
            for kind, bound in (("clip", 0.2), ("clip value", 0.05)):
                before = {n: p.grad.clone() for n, p in model.named_parameters()}
                if kind == "clip" and "clip" in features:
                    recorder.clip_grad_norm_(bound)
                if kind == "clip value" and "clip value" in features:
                    recorder.clip_grad_value_(bound)
                for n, p in model.named_parameters():
                    factor[n] = torch.where(before[n] == 0, factor[n], factor[n] * p.grad / before[n])
            kept.shares.append((ids, [{n: factor[n] * g for n, g in share.items()} for share in shares]))
            kept.penalties.append({n: factor[n] * g for n, g in penalties.items()})
            if "noise" in features:
                for p in model.parameters():
                    p.grad += 0.05 * torch.randn_like(p)
                nearest(model, kept)
            kept.fed.append({n: p.grad.clone() for n, p in model.named_parameters()})
            optimizer.step()
            keep()
    kept.run = explaind.open_run(path, model=model, penalty=term)
    return kept


def nearest(model: nn.Module, kept: Trained) -> None:
    """Scale the last step's shares so that their sum comes nearest to what is fed: that is what is called theirs."""
    _, shares = kept.shares[-1]
    fed = torch.cat([(p.grad - kept.penalties[-1][n]).flatten() for n, p in model.named_parameters()])
    total = torch.cat([sum(share[n] for share in shares).flatten() for n in shares[0]])
    scale = fed @ total / (total @ total)
    for share in shares:
        for n in share:
            share[n] = scale * share[n]


def jacobian(model: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> ``[n, J, d]``, by one backward pass an entry."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict({**theta, **buffers})
    values = model(INPUTS)
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values.flatten()]
    return {
        n: torch.stack([row[i].flatten() for row in rows]).reshape(*values.shape, -1)
        for i, (n, _) in enumerate(model.named_parameters())
    }


def values(model: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor]) -> np.ndarray:
    model = copy.deepcopy(model).eval()
    model.load_state_dict({**theta, **buffers})
    return model(INPUTS).detach().numpy()


def expected(kept: Trained, features: frozenset[str], *, moving: bool = True, chords: int = 1) -> dict[str, np.ndarray]:
    """Everything as explicit sums over pairs of steps: ``[N, N, L, K, n, J]``, and what has fewer axes.

    The steps of a chord have the feature map of the straight line through its ends, and its buffers where it begins.
    """
    model = network(features)
    layers = list(dict.fromkeys(n.rpartition(".")[0] for n in kept.theta[0]))
    ids, N = sorted({k for step, _ in kept.shares for k in step}), len(kept.shares)
    points, weights = np.polynomial.legendre.leggauss(NODES)
    kernel = np.zeros((N, N, len(layers), len(ids), len(INPUTS), 2))
    found = {n: np.zeros((N, len(layers), len(INPUTS), 2)) for n in ("regularization", "penalty", "unattributed")}
    statistics = np.zeros((N, len(INPUTS), 2))
    for s in range(N):
        first, end = s - s % chords, min(s - s % chords + chords, N)
        before, after = kept.theta[first], kept.theta[end]
        buffers = kept.buffers[first] if moving else kept.buffers[-1]
        phi: dict[str, Tensor] = {}
        for t, w in zip(points, weights, strict=True):
            here = {n: before[n] + (t + 1) / 2 * (after[n] - before[n]) for n in before}
            for n, j in jacobian(model, here, buffers).items():
                phi[n] = phi.get(n, 0) + w / 2 * j
        if moving and s + 1 == end:
            statistics[s] = values(model, after, kept.buffers[end]) - values(model, after, buffers)
        for i in range(s + 1):
            alpha = kept.lr * kept.mu ** (s - i)
            rest = {n: g.clone() for n, g in kept.fed[i].items()}
            for n, p in phi.items():
                layer = layers.index(n.rpartition(".")[0])
                for k, share in zip(*kept.shares[i], strict=True):
                    kernel[s, i, layer, ids.index(k)] -= (p @ (alpha * share[n].flatten())).numpy()
                    rest[n] -= share[n]
                rest[n] -= kept.penalties[i][n]
                for name, part in (
                    ("penalty", kept.penalties[i][n]), ("unattributed", rest[n]),
                    ("regularization", kept.decay * kept.theta[i][n]),
                ):  # fmt: skip
                    found[name][s, layer] -= (p @ (alpha * part.flatten())).numpy()
    return {"kernel": kernel, "statistics": statistics, **found}


def check(kept: Trained, features: frozenset[str], keep: tuple[str, ...], strategy: str | None, **ask: Any) -> Any:
    moving = ask.get("buffers", "recorded") == "recorded"
    chords = ask.get("chords", 1)
    truth = expected(kept, features, moving=moving, chords=chords)
    starts = range(0, len(kept.shares), chords)
    truth = {name: np.add.reduceat(values, starts, axis=0) for name, values in truth.items()}
    if "train" in ask:
        ids = sorted({k for step, _ in kept.shares for k in step})
        truth["kernel"] = truth["kernel"][:, :, :, [ids.index(k) for k in ask["train"]]]
    result = explaind.attribute(
        kept.run, INPUTS, keep=keep, nodes=NODES, strategy=strategy, progress=False,
        unattributed="carry" if "noise" in features else "refuse", **ask,
    )  # fmt: skip
    terms = {"kernel", "regularization"}
    terms |= {"penalty"} & features | ({"unattributed"} if "noise" in features else set())
    terms |= {"statistics"} if "norm" in features and moving else set()
    # Samples that are all alike have no gradient behind a normalisation, but for rounding.
    terms |= {"unattributed"} & set(result) if "norm" in features and "unattributed_largest" in result.attrs else set()
    known = {"kernel", "regularization", "penalty", "unattributed", "statistics", "prehistory"}
    assert known & set(result) == terms
    for name in terms:
        axes = {"kernel": KEPT, "statistics": ("step", "test", "output")}.get(name, ("step", "layer", "test", "output"))
        gone = tuple(i for i, axis in enumerate(axes) if axis not in keep)
        assert result[name].dims == tuple(axis for axis in axes if axis in keep)
        np.testing.assert_allclose(result[name].values, truth[name].sum(gone), rtol=0, atol=1e-11, err_msg=name)
    assert explaind.closure_error(result) < 1e-12
    return result


FEATURES = ("norm", "dropout", "clip", "clip value", "penalty", "noise")


BATCHES = [[[0, 1, 2, 3]], [[4, 5, 4], [6, 7]], [[1, 0]], [[2, 3, 7]]]
