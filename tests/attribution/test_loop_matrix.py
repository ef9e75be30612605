"""Every cell of the matrix of models, loop features and optimizers closes, and its update error is rounding."""

from __future__ import annotations

import pytest
import torch

from support.loop_cells import CELLS, FEATURES, measure, recorded

#: Every feature once, over models and optimizers in turn; the whole matrix is slow.
FIRST = [
    next(cell for cell in CELLS[index % 2 * 27 :] + CELLS if cell[1] == name) for index, name in enumerate(FEATURES)
]
SKIPPED = {"GradScaler, a skipped step", "Muon beside, GradScaler"}


def check(cell: tuple[str, str, str]) -> None:
    with recorded(*cell) as (run, loop):
        found = measure(run, loop)
        single = next(iter(run.theta(0).values())).dtype == torch.float32
        assert len(run.steps) == loop.steps - (cell[1] in SKIPPED)
        assert loop.skipped == (cell[1] in SKIPPED)
    assert found.error <= 8 * found.rounding
    assert found.closure <= 1e-14
    # Of float32, what training rounded; otherwise what 8 nodes leave.
    assert found.residual <= (1e-4 if single else 1e-5)
    assert ("penalty" in found.terms) == (cell[1] == "penalty")
    assert ("unattributed" in found.terms) == cell[1].startswith("autocast")
    assert ("statistics" in found.terms) == (cell[0] == "CNN with batch norm")
    assert ("prehistory" in found.terms) == (cell[1].startswith("resumed") or cell[2] == "Adagrad")


def test_the_matrix_has_every_feature_and_forty_cells():
    assert len(CELLS) >= 40
    assert {cell[1] for cell in CELLS} == {*FEATURES}
    assert len({cell[0] for cell in FIRST}) == 4


@pytest.mark.parametrize("cell", FIRST, ids=" / ".join)
def test_a_cell_of_every_feature(cell):
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in FIRST], ids=" / ".join)
def test_every_cell(cell):
    check(cell)
