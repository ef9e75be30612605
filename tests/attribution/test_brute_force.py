"""Kernels of two dozen models against a brute force that shares nothing with the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import explaind_core as explaind
from support import brute_force
from support.brute_force import CASES, OPTIMIZERS, TESTS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_every_share_is_the_brute_forces(tmp_path, name, optimizer):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double()
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(output, targets):
        return case.terms(output, targets).mean()

    with explaind.Recorder(tmp_path / "run", model, made := OPTIMIZERS[optimizer](trained), loss) as recorder:
        kept = brute_force.trained(case, model, made, recorder)
    tests = case.inputs(TESTS + 20)[20:]
    expected = brute_force.kernel(model, optimizer, kept, tests)
    run = explaind.open_run(tmp_path / "run", model=model, loss=loss)
    result = explaind.attribute(
        run, tests, keep=("layer", "train", "test", "output"), layers={n: n for n in kept.names},
        output=lambda call, x: call(x).flatten(1), nodes=brute_force.NODES, buffers="final", progress=False,
    )  # fmt: skip
    found = np.zeros_like(expected)
    found[:, result.train.values] = result.kernel.values
    assert abs(found - expected).max() <= TOLERANCE * abs(expected).max()


#: Of the largest entry.
TOLERANCE = 1e-14
