"""The paper's experiment at the paper's size: the numbers that the documentation states. Run with make test-slow."""

from __future__ import annotations

import pytest
import torch

import explaind_core as explaind
from explaind_studies.demo import PAPER, QUICK, demo
from explaind_studies.modular_addition import LAYERS, modular_addition

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo"), PAPER, progress=False)


def test_the_demo_rebuilds_the_prediction_with_two_nodes_per_step(finished):
    assert finished.holds
    assert finished.check.agreement == 1.0
    assert finished.check.kl <= 2e-5
    assert finished.check.nodes_used <= 2


def test_the_result_closes_in_single_precision(finished):
    assert finished.closure <= 1e-4


def test_it_memorises_well_before_it_generalises(finished):
    metrics = finished.run.metrics
    memorised = int(metrics.step[(metrics.train_accuracy > 0.99).values][0])
    generalised = int(metrics.step[(metrics.test_accuracy > 0.99).values][0])
    assert float(metrics.test_accuracy.sel(step=memorised)) < 0.5
    assert generalised > memorised + 200


def test_importance_of_every_layer_is_within_one_percent_of_128_nodes(finished):
    task = modular_addition(PAPER.p, PAPER.train, PAPER.test, seed=PAPER.seed)
    inputs = task.test_inputs[: PAPER.explained]
    last = len(finished.run.steps)
    for step in (11, last // 4, last // 2, 3 * last // 4, last):
        reference = explaind.attribute(finished.run, inputs, steps=[step], layers=LAYERS, nodes=128, progress=False)
        truth = explaind.importance(reference.sel(step=step))
        ours = explaind.importance(finished.result[["kernel", "regularization"]].sel(step=step).load())
        error = abs(ours / truth - 1).max()
        assert float(error.kernel) < 0.01
        assert float(error.regularization) < 0.01


def test_the_quick_demo_in_double_precision_closes(tmp_path):
    task = modular_addition(QUICK.p, QUICK.train, QUICK.test, seed=QUICK.seed)
    torch.manual_seed(0)
    from explaind_studies.modular_addition import ModularTransformer

    model, loss = ModularTransformer(task.vocabulary).double(), torch.nn.NLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    ids = torch.arange(QUICK.train)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(100):
            optimizer.zero_grad()
            loss(model(task.train_inputs), task.train_targets).backward()
            recorder.batch(task.train_inputs, task.train_targets, ids=ids)
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    assert max(step.error for step in explaind.decompose(run)) <= 1e-12
    result = explaind.attribute(run, task.test_inputs[:100], layers=LAYERS, nodes=1, progress=False)
    assert explaind.closure_error(result) <= 1e-11 * float(abs(result.final).max())
