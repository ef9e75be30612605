"""Muon: matrices only; Newton-Schulz runs in bfloat16, so a rank-one secant closes every step."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_optimizers.muon import MuonRule, polynomial

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from([(3, 5), (5, 3), (4, 4), (1, 6)]),
    options=st.fixed_dictionaries(
        {
            "lr": st.floats(1e-4, 0.5),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "nesterov": st.booleans(),
            "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
        }
    ),
    seed=st.integers(0, 99),
)
def test_the_declaration_is_exact_in_double_precision(shape, options, seed):
    torch.manual_seed(seed)
    model = nn.Linear(shape[1], shape[0], bias=False).double()
    optimizer = torch.optim.Muon(model.parameters(), **options)
    with tempfile.TemporaryDirectory() as folder:
        with explaind.Recorder(f"{folder}/run", model, optimizer) as recorder:
            for _ in range(4):
                x = torch.randn(4, shape[1], dtype=torch.float64)
                optimizer.zero_grad()
                torch.sin(model(x)).sum().backward()
                recorder.batch(x, None, ids=range(4))
                optimizer.step()
        for split in explaind.decompose(explaind.open_run(f"{folder}/run", model=model)):
            assert split.error <= 1e-12 + split.rounding


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_the_polynomial_is_newton_schulz_without_its_rounding(shape):
    group = torch.optim.Muon([torch.zeros(shape)], lr=1.0).param_groups[0]
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = group["ns_coefficients"]
    x = (matrix.mT if shape[0] > shape[1] else matrix) / matrix.norm()
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x.mT if shape[0] > shape[1] else x
    torch.testing.assert_close(polynomial(matrix, group).apply(matrix), expected, rtol=1e-11, atol=1e-11)
    assert MuonRule.filter_states == ("momentum_buffer",)
