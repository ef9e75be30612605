"""Outputs of one small run, explained and compared with the oracle."""

from __future__ import annotations

from functools import lru_cache

import torch

import explaind_core as explaind
from explaind_core.run.run import Run
from explaind_core.testing import record_example
from support.attribution_oracles import assert_equal, dense, modules

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([2, 0, 1])
EVERYTHING = ("step", "layer", "test", "output")


@lru_cache
def run() -> Run:
    return record_example(3)


def ask(output, *, of: Run | None = None, inputs=INPUTS, **question):
    return explaind.attribute(of or run(), inputs, output=output, **({"nodes": 2, "progress": False} | question))


def check(output, reference, *, of: Run | None = None, inputs=INPUTS):
    """``output`` against the oracle of ``reference(call, inputs)``."""
    truth = dense(of or run(), inputs, 2, reference)
    result = ask(output, of=of, inputs=inputs)
    assert_equal(result, truth.expected(EVERYTHING, modules(truth), (of or run()).steps))
    return result


def log_loss(call, inputs):
    return -call(inputs).log_softmax(1)[range(3), TARGETS]


def margin(call, inputs):
    values = call(inputs)
    return values[:, 0] - values[:, 1:].logsumexp(1)
