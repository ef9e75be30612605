"""The digits that the CNN learns, and its training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import explaind_core as explaind
from explaind_studies import digits
from explaind_studies.digits import Schedule
from explaind_studies.resnet import ResNet9


def test_digits_are_enlarged_split_and_drawn_by_the_seed_alone():
    from sklearn.datasets import load_digits

    state = torch.get_rng_state()
    task = digits.digits(3)
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.cat([task.test_images, task.train_images])
    targets = torch.cat([task.test_targets, task.train_targets])
    assert (images.shape, images.dtype, targets.dtype) == ((1797, 1, 16, 16), torch.float32, torch.int64)
    known = {(image.tobytes(), int(t)) for image, t in zip(load_digits().images, load_digits().target, strict=True)}
    small = {((16 * i[0, ::2, ::2].double()).numpy().tobytes(), int(t)) for i, t in zip(images, targets, strict=True)}
    assert small == known
    for row, col in ((1, 0), (0, 1), (1, 1)):
        assert torch.equal(images[:, :, row::2, col::2], images[:, :, ::2, ::2])
    assert torch.equal(digits.digits(3).test_targets, task.test_targets)
    assert not torch.equal(digits.digits(4).test_targets, task.test_targets)


def test_the_learning_rate_is_the_papers_triangle():
    rates = Schedule(epochs=12, peak_epoch=5).rates(120)
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert int(np.argmax(rates)) in (49, 50)
    assert np.diff(rates[:50]) == pytest.approx(0.1 / 50)
    assert np.diff(rates[51:]) == pytest.approx(-0.1 / 70)
    assert min(rates) > 0
    assert Schedule(rate=0.01, peak_epoch=None).rates(3) == [0.01] * 3
    assert [len(ids) for ids in Schedule(epochs=1, batch=4, whole=True).batches(11, 0)] == [4, 4]


def test_the_cnn_is_trained_by_sgd_with_its_schedule(tmp_path):
    """Against a loop of its own."""
    task, schedule = digits.digits(0), Schedule(epochs=1, batch=600, rate=0.05)
    torch.manual_seed(0)
    model = ResNet9(1, 10, channels=1)
    torch.manual_seed(0)
    plain = ResNet9(1, 10, channels=1)
    digits.train_cnn(task, tmp_path / "run", model, schedule, progress=False)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, weight_decay=0.005)
    # One epoch, so that the peak is at its end: three steps rise to it.
    for ids, rate in zip(schedule.batches(1437, 0), np.array([1, 3, 5]) / 6 * 0.05, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(plain(task.train_images[ids]), task.train_targets[ids]).backward()
        optimizer.step()
    opened = explaind.open_run(tmp_path / "run")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(opened.theta(3)[name], parameter.detach(), rtol=1e-5, atol=1e-7)
    last = opened.metrics.isel(step=-1)
    right = (plain(task.test_images).argmax(1) == task.test_targets).double().mean()
    assert float(last.test_accuracy) == pytest.approx(float(right), abs=0.01)
