"""What rounding may make of a gradient's shares: accepted just inside of each bound, refused just outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explaind_core.derivatives.gradient_factor import fit_factor
from explaind_core.derivatives.sample_derivatives import Derivatives
from explaind_core.derivatives.sample_gradients import SampleGradients
from explaind_core.errors import RecordingError
from explaind_core.run.run import Batch, MicroBatch

EPS = 2.0**-52


# ------------------------------------------------------------------ the rounding of a sum of gradients
class Plane(nn.Module):
    """``a x_0 + b x_1`` with two parameters of one number each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1024.0, 0.0))

    def forward(self, x):
        return self.a * x[:, 0] + self.b * x[:, 1]


def cancelling(n=4):
    """Samples whose gradients of a cancel, +-2 / n each, while those of b do not.

    Weights that are off by eps move the gradient of a by ``2 a eps``, and the rounding of each sample's gradient moves
    it by at most ``2 eps``: so much is known of the bound of 64 times that.
    """
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
    inputs = torch.stack([torch.ones_like(sign), sign], 1)
    batch = Batch((MicroBatch(torch.arange(n), inputs, 1024.0 - sign, 1.0),))
    model = Plane().requires_grad_(False)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    return SampleGradients(model, nn.MSELoss(), batch, theta, {}, ["a", "b"])


@pytest.mark.parametrize(("missed", "accepted"), [(0.99 * 64 * 2048 * EPS, True), (1.01 * 64 * 2050 * EPS, False)])
def test_a_gradient_that_cancels_is_told_to_its_rounding(missed, accepted):
    gradients = cancelling()
    total = gradients.total()
    assert (total["a"].item(), total["b"].item()) == (0.0, 2.0)
    fed = {"a": torch.tensor(missed, dtype=torch.float64), "b": total["b"]}
    if accepted:
        assert gradients.fit(fed, step=1) == 1.0
        return
    with pytest.raises(RecordingError, match="not that of its declared samples") as refused:
        gradients.fit(fed, step=1)
    assert "parameter 'a'" in refused.value.where


# ------------------------------------------------------------------ which factor is meant
def fitted(fed, noise, declared=1.0):
    """The factor of a gradient of 1 and a small one, of which ``noise`` is rounding."""
    total = {"w": torch.tensor([1.0]).double(), "v": torch.tensor([1e-6]).double()}
    fed = {n: torch.tensor([value]).double() for n, value in zip(total, fed, strict=True)}
    return fit_factor(fed, total, lambda: {"w": noise, "v": noise}, step=1, declared=declared)


def test_of_two_factors_that_both_fit_the_declared_one_is_meant():
    """By least squares it is another one, which rounding alone makes."""
    assert fitted((1.0005, 1.4e-6), noise=1e-3) == 1.0


@pytest.mark.parametrize(("noise", "accepted"), [(0.99, True), (1.01, False)])
def test_another_factor_must_stand_out_of_the_rounding(noise, accepted):
    """So clear as that all rounding together is at most 0.01 of the gradient."""
    noise *= 0.01 / 2**0.5
    if accepted:
        assert fitted((0.5, 0.9e-6), noise) == pytest.approx(0.5)
        return
    with pytest.raises(RecordingError, match="not that of its declared samples"):
        fitted((0.5, 0.9e-6), noise)


# ------------------------------------------------------------------ whether the shares add up
@pytest.mark.parametrize(
    ("coarse", "size", "scale", "bound"),
    [(False, 3.0, 0.0, 6000 * EPS), (False, 0.0, 7.0, 7e4 * EPS), (True, 3.0, 0.0, 0.3)],
)
def test_shares_add_up_to_rounding(coarse, size, scale, bound):
    layer = nn.Linear(2, 1).double()
    derivatives = Derivatives(layer, {n: p.detach() for n, p in layer.named_parameters()}, ["weight"], 1000)
    derivatives.coarse = coarse
    told = [torch.tensor(value, dtype=torch.float64) for value in (size, scale)]
    derivatives.check_sum("here", torch.tensor(0.99 * bound, dtype=torch.float64), *told)
    with pytest.raises(RecordingError, match="not the sum of the gradients of its samples") as refused:
        derivatives.check_sum("here", torch.tensor(1.01 * bound, dtype=torch.float64), *told)
    assert refused.value.where == "here"
    with pytest.raises(RecordingError, match="not the sum"):
        derivatives.check_sum("here", torch.tensor(torch.nan, dtype=torch.float64), *told)


# ------------------------------------------------------------------ gradients that know the other samples
def embedded(count):
    """One token a sample, of which two in the middle are the same; the gradient of a token is divided by how often."""
    tokens = torch.arange(count)
    tokens[count // 2] = tokens[count // 2 - 1]
    model = nn.Sequential(nn.Embedding(count, 2, scale_grad_by_freq=True), nn.Linear(2, 1)).double()
    targets = torch.linspace(1, 2, count, dtype=torch.float64)[:, None]
    batch = Batch((MicroBatch(torch.arange(count), tokens, targets, 1.0),))
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    return SampleGradients(model.requires_grad_(False), nn.MSELoss(), batch, theta, {}, list(theta))


def test_a_gradient_that_is_scaled_by_the_batch_is_no_sum_of_gradients_taken_alone():
    """In the middle of 40 samples none is compared beforehand: it shows when all of them are there."""
    torch.manual_seed(0)
    gradients = embedded(40)
    with pytest.raises(RecordingError, match="not the sum of the gradients of its samples") as refused:
        list(gradients.chunks())
    assert "scale_grad_by_freq" in refused.value.remedy


def test_where_that_shows_beforehand_the_samples_go_together():
    torch.manual_seed(0)
    gradients = embedded(8)
    sums = {n: sum(g[n].sum(0) for _, g in gradients.chunks()) for n in gradients.names}
    assert gradients.together
    for name, total in gradients.total().items():
        torch.testing.assert_close(sums[name], total, rtol=1e-12, atol=1e-14)
