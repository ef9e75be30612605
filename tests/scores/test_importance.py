"""The paper's derived scores against loops, and the residual spread over components."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.testing import record_example
from support.attribution_oracles import record

INPUTS = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def result(*keep: str, nodes: int = 1) -> xr.Dataset:
    run = record_example(4, make_optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.3, weight_decay=0.3))
    return explaind.attribute(
        run, INPUTS, keep=keep or ("step", "layer", "test", "output"), nodes=nodes, progress=False
    )


def test_importance_sums_absolute_values_of_what_was_accumulated():
    """Definition 4.2 written as loops: accumulate (here: layers), then absolute value, then sum (test and output)."""
    scores = explaind.importance(result(), over=("test", "output"), accumulate=("layer",))
    for term in ("kernel", "regularization"):
        influence = result()[term].values
        for s in range(4):
            expected = 0.0
            for n in range(4):
                for j in range(3):
                    expected += abs(sum(influence[s, layer, n, j] for layer in range(2)))
            assert float(scores[term][s]) == pytest.approx(expected, rel=1e-13)


def test_the_order_of_summing_and_absolute_value_matters():
    values = xr.DataArray([[3.0, -1.0], [-2.0, 5.0]], dims=("layer", "test"))
    made = xr.Dataset({"kernel": values, "regularization": -values})
    assert explaind.importance(made, over=["test"]).kernel.values.tolist() == [4.0, 7.0]
    assert float(explaind.importance(made, over=["test"], accumulate=["layer"]).kernel) == 5.0  # |3 - 2| + |-1 + 5|
    assert explaind.importance(made, over=[]).kernel.values.tolist() == [[3.0, 1.0], [2.0, 5.0]]


def test_importance_of_axes_that_were_summed_before_is_the_same_accumulated_after():
    before = explaind.importance(result("step", "test", "output"))
    after = explaind.importance(result(), accumulate=("layer",))
    xr.testing.assert_allclose(before, after, rtol=1e-12)


def test_importance_holds_every_term_over_the_axes_that_remain(tmp_path):
    torch.manual_seed(0)
    run = record(
        tmp_path / "run", nn.Linear(4, 3).double(), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        torch.randn(12, 4).double(), torch.randint(3, (12,)), unrecorded=2,
    )  # fmt: skip
    scores = explaind.importance(explaind.attribute(run, INPUTS, nodes=1, progress=False), over=("test",))
    assert set(scores) == {"kernel", "regularization", "prehistory"}
    assert scores.prehistory.dims == ("step", "layer", "output")
    assert scores.attrs["over"] == ["test"]


def test_importance_is_summed_in_float64():
    many = np.full((1, 10_000), 0.1, dtype=np.float32)
    made = xr.Dataset({"kernel": (("step", "test"), many), "regularization": (("step", "test"), many)})
    exact = 10_000 * float(np.float32(0.1))
    assert float(explaind.importance(made, over=["test"]).kernel[0]) == pytest.approx(exact, rel=1e-12)


def test_relative_regularization_is_signed_as_the_definition_writes_it():
    relative = explaind.relative_regularization(result())
    assert relative.dims == ("step", "layer")
    for s in range(4):
        for layer in range(2):
            kernel, decay = (result()[term].values[s, layer] for term in ("kernel", "regularization"))
            expected = sum(kernel[n, j] - decay[n, j] for n in range(4) for j in range(3))
            assert float(relative[s, layer]) == pytest.approx(expected, rel=1e-12)


def test_relative_regularization_in_its_absolute_form_compares_importances():
    relative = explaind.relative_regularization(result(), form="absolute")
    kernel, decay = (abs(result()[term].values).sum((2, 3)) for term in ("kernel", "regularization"))
    np.testing.assert_allclose(relative, kernel - decay, rtol=1e-12)


@pytest.mark.parametrize("form", ["signed", "absolute"])
def test_relative_regularization_of_the_whole_model(form):
    relative = explaind.relative_regularization(result(), form=form, accumulate=("layer",))
    kernel, decay = (result()[term].values.sum(1) for term in ("kernel", "regularization"))
    expected = (kernel - decay if form == "signed" else abs(kernel) - abs(decay)).sum((1, 2))
    np.testing.assert_allclose(relative, expected, rtol=1e-11)


def test_another_form_is_refused():
    with pytest.raises(QuestionError, match="there is no such form") as error:
        explaind.relative_regularization(result(), form="squared")
    assert error.value.got == "squared"


@pytest.mark.parametrize("score", [explaind.importance, explaind.relative_regularization])
def test_an_axis_that_was_summed_away_cannot_be_summed_in_absolute_value(score):
    for options, where in (({}, "over"), ({"over": ("test",), "accumulate": ("layer",)}, "accumulate")):
        with pytest.raises(QuestionError, match="the result does not keep the axis") as error:
            score(result("step", "test"), **options)
        assert error.value.where == where
        assert error.value.expected == "axes among ['step', 'test']"
        assert "keep=" in error.value.remedy


@pytest.mark.parametrize("score", [explaind.importance, explaind.relative_regularization, explaind.spread_residual])
def test_what_is_no_result_is_refused(score):
    with pytest.raises(QuestionError, match="this is no attribution result"):
        score(xr.Dataset({"a": 1.0}))


# ---------------------------------------------------------------------------- spread_residual


@pytest.mark.parametrize("keep", [(), ("step", "test", "output"), ("layer",), ("step", "output")])
def test_a_spread_residual_is_gone_and_the_result_still_closes(keep):
    spread = explaind.spread_residual(result(*keep))
    assert not spread.residual.any()
    assert explaind.closure_error(spread) <= 1e-12
    xr.testing.assert_identical(spread.spread.drop_attrs(), result(*keep).residual.rename("spread"))


def test_each_component_gets_its_share_of_the_residual():
    made, spread = result(), explaind.spread_residual(result())
    for s, n, j in np.ndindex(4, 4, 3):
        weights = {(t, k): abs(made[t].values[s, k, n, j]) for t in ("kernel", "regularization") for k in range(2)}
        for (term, layer), weight in weights.items():
            share = float(made.residual[s, n, j]) * weight / sum(weights.values())
            # A share is a difference of two numbers below 10: absolute rounding.
            assert float((spread[term] - made[term])[s, layer, n, j]) == pytest.approx(share, abs=1e-14)


def test_a_spread_result_says_so():
    assert "residual_spread" not in result().attrs
    assert explaind.spread_residual(result()).attrs["residual_spread"] == 1


def test_a_spread_residual_lowers_the_error_of_what_was_spread_over():
    """One node spread against 32 nodes: the error of kernel and regularization, summed over steps."""
    truth, plain = result(nodes=32), result()
    spread = explaind.spread_residual(plain)

    def error(found: xr.Dataset) -> float:
        return sum(float(abs((found[t] - truth[t]).sum("step")).sum()) for t in ("kernel", "regularization"))

    assert error(spread) < error(plain)


def test_a_cell_without_contribution_keeps_its_residual():
    made = xr.Dataset({n: ("test", v) for n, v in (("kernel", [0.0, 3.0]), ("regularization", [0.0, -1.0]))})
    spread = explaind.spread_residual(made.assign(residual=("test", [0.5, 0.4])))
    assert spread.kernel.values.tolist() == pytest.approx([0.0, 3.3])
    assert spread.regularization.values.tolist() == pytest.approx([0.0, -0.9])
    assert spread.residual.values.tolist() == [0.5, 0.0]
    assert spread.spread.values.tolist() == [0.0, 0.4]


def test_a_result_in_float32_is_spread_in_float64():
    run = record_example(3, dtype=torch.float32)
    spread = explaind.spread_residual(explaind.attribute(run, INPUTS.float(), nodes=1, progress=False))
    assert spread.kernel.dtype == "float64"
    assert explaind.closure_error(spread) <= 1e-12
