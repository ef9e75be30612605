"""Dense, slow, obviously right: updates as explicit double sums, and filters as explicit N x N step learning rates.

Nothing here runs a filter or advances a state. What a rule declared is taken down by :func:`declarations`;
:func:`explicit_split` forms every product ``C_s A_{s-1} ... A_{i+1} B_i`` and sums over all pairs (s, i).
:func:`closed_split` does not even ask the rule: it follows torch's documentation of SGD, Adam and AdamW.
"""

from __future__ import annotations

import math
from unittest import mock

import torch

from explaind_core.decomposition.decompose import decompose
from explaind_core.operators import LinearOperator
from explaind_core.run.replay import Replay


def declarations(run):
    """The decomposition of a run, and by parameter the (RecordedStep, StepCoefficients) of each of its steps."""
    seen = {name: [] for name in run.parameters}
    kind = type(Replay(run).rule().rule)
    original = kind.coefficients

    def coefficients(self, step):
        declared = original(self, step)
        seen[step.name].append((step, declared))
        return declared

    with mock.patch.object(kind, "coefficients", coefficients):
        return list(decompose(run)), seen


def matrix(coefficient, shape):
    """A coefficient (a number or an operator) as the matrix that acts on flattened tensors of ``shape``."""
    if isinstance(coefficient, LinearOperator):
        return coefficient.dense(shape)
    return coefficient * torch.eye(math.prod(shape), dtype=torch.float64)


def block(rows, shape):
    """A matrix of coefficients as one matrix ``[k D, n D]``; an empty one has size 0 where it must."""
    D = math.prod(shape)
    k, n = len(rows), len(rows[0]) if rows else 0
    return torch.stack([matrix(c, shape) for row in rows for c in row]).view(k, n, D, D).transpose(1, 2).reshape(
        k * D, n * D
    )  # fmt: skip


def alpha(filters, s, i, shape):
    """``alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i`` (``D_s`` for i = s) as a matrix; s and i count from 0."""
    if i == s:
        return matrix(filters[s].D, shape)
    if filters[s].order == 0:  # nothing is remembered
        return matrix(0.0, shape)
    product = block([[b] for b in filters[i].B], shape)
    for between in range(i + 1, s):
        product = block(filters[between].A, shape) @ product
    return block([filters[s].C], shape) @ product


def explicit_split(steps):
    """Kernel and regularization of one parameter's every step, by the double sum, from what its rule declared."""
    shape = steps[0][0].theta.shape
    filters = [declared.filter for _, declared in steps]
    fed = [declared.gradient_operator.dense(shape) @ step.gradient.flatten() for step, declared in steps]
    pulled = [declared.coupled_decay.dense(shape) @ step.theta.flatten() for step, declared in steps]
    kernels, regularizations = [], []
    for s, (step, declared) in enumerate(steps):
        P = declared.preconditioner.dense(shape)
        alphas = [alpha(filters, s, i, shape) for i in range(s + 1)]
        decoupled = declared.decoupled_decay.dense(shape) @ step.theta.flatten()
        kernels.append(-sum(P @ a @ g for a, g in zip(alphas, fed, strict=False)).view(shape))
        regularizations.append((-decoupled - sum(P @ a @ w for a, w in zip(alphas, pulled, strict=False))).view(shape))
    return kernels, regularizations


def sgd_alphas(hypers, present):
    """The weight of gradient i in step s of torch.optim.SGD, by pushing the unit impulse i through its pseudocode.

    ``hypers``: the steps' options. ``present``: whether the buffer was there before the first step.
    """
    weights = []
    for i in range(len(hypers)):
        buffer, exists, row = 0.0, present, []
        for s, hyper in enumerate(hypers):
            g = float(s == i)
            if hyper["momentum"]:
                buffer = hyper["momentum"] * buffer + (1 - hyper["dampening"]) * g if exists else g
                exists = True
                g = g + hyper["momentum"] * buffer if hyper["nesterov"] else buffer
            row.append(g)
        weights.append(row)
    return torch.tensor(weights, dtype=torch.float64).T  # [s, i]


def adam_alphas(hypers):
    """The weight of gradient i in step s of Adam: ``(1 - b1_i) b1_{i+1} ... b1_s / (1 - b1_s^s)``, s from 1."""
    betas = [hyper["betas"][0] for hyper in hypers]
    rows = [
        [(1 - betas[i]) * math.prod(betas[i + 1 : s + 1]) / (1 - betas[s] ** (s + 1)) if i <= s else 0.0
         for i in range(len(betas))]
        for s in range(len(betas))
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def adam_denominators(hypers, gradients):
    """``sqrt(v^) + eps`` of every step, with v as an explicit sum over squared gradients (amsgrad: the largest v)."""
    largest, found = torch.zeros_like(gradients[0]), []
    for s, hyper in enumerate(hypers):
        beta2 = [h["betas"][1] for h in hypers]
        v = sum((1 - beta2[i]) * math.prod(beta2[i + 1 : s + 1]) * gradients[i] ** 2 for i in range(s + 1))
        largest = torch.maximum(largest, v)
        corrected = (largest if hyper["amsgrad"] else v) / (1 - beta2[s] ** (s + 1))
        found.append(corrected.sqrt() + hyper["eps"])
    return found


def closed_split(kind, steps):
    """Kernel and regularization of one parameter's every step from torch's documentation alone (no rule is asked)."""
    recorded = [step for step, _ in steps]
    hypers, thetas = [step.hyper for step in recorded], [step.theta for step in recorded]
    gradients = [-step.gradient if step.hyper["maximize"] else step.gradient for step in recorded]
    decays = [hyper["weight_decay"] * theta for hyper, theta in zip(hypers, thetas, strict=True)]
    decoupled = kind is torch.optim.AdamW
    if kind is torch.optim.SGD:
        alphas, denominators = sgd_alphas(hypers, present=False), [1.0] * len(steps)
    else:
        fed = gradients if decoupled else [g + w for g, w in zip(gradients, decays, strict=True)]
        alphas, denominators = adam_alphas(hypers), adam_denominators(hypers, fed)
    kernels, regularizations = [], []
    for s, (hyper, denominator) in enumerate(zip(hypers, denominators, strict=True)):
        rates = [hyper["lr"] * a / denominator for a in alphas[s, : s + 1]]
        kernels.append(-sum(rate * g for rate, g in zip(rates, gradients, strict=False)))
        coupled = -sum(rate * w for rate, w in zip(rates, decays, strict=False))
        regularizations.append(-hyper["lr"] * decays[s] if decoupled else coupled)
    return kernels, regularizations
