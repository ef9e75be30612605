"""Pruned networks against slow oracles: counts, filters, retraining, curves, and what is found in them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from explaind_core.errors import QuestionError
from explaind_studies.pruning import filters
from explaind_studies.pruning.curves import FILTERS, IMPORTANCE, METHODS, RANDOM, curves, divergence, kept, pruned
from explaind_studies.pruning.filters import (
    GROUPS,
    channel_counts,
    filter_masks,
    pruned_filters,
    retrain,
    smallest_left_out,
)
from explaind_studies.pruning.findings import checks, claims, tables
from explaind_studies.pruning.setting import LEVELS
from explaind_studies.pruning.training import outputs
from explaind_studies.resnet import ResNet9
from support.pruning_cases import TINY, small_model, small_task, without_head

# ---------------------------------------------------------------------- single parameters


@pytest.mark.parametrize("size", [10, 997, 35_696])
def test_exactly_as_many_are_pruned_as_the_level_says_and_the_smallest(size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    before = torch.ones(size, dtype=torch.bool)
    for level in LEVELS:
        mask = kept(scores, level)
        assert int((~mask).sum()) == round(level * size)
        assert not (mask & ~before).any()  # a part of what was kept at the level before
        assert not mask.any() or mask.all() or scores[mask].min() >= scores[~mask].max()
        before = mask


def test_equal_scores_are_kept_in_their_order():
    assert kept(torch.zeros(10), 0.7).tolist() == [True] * 3 + [False] * 7


def test_what_is_pruned_is_zero_and_nothing_else_changes():
    model = small_model()
    size = sum(p.numel() for n, p in model.named_parameters() if n != "head.weight")
    mask = torch.rand(size) < 0.3
    found = pruned(model, mask)
    flat = torch.cat([found[n].reshape(-1) for n, _ in model.named_parameters()])
    expected = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    expected[:size][~mask] = 0
    assert torch.equal(flat, expected)
    assert torch.equal(found["head.weight"], model.head.weight)
    with pytest.raises(QuestionError, match="does not fit"):
        pruned(model, mask[:-1])


def test_divergence_is_torchs():
    full, other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1).double()
    expected = nn.functional.kl_div(other, full, reduction="batchmean", log_target=True)
    assert divergence(full, other) == pytest.approx(float(expected), rel=1e-12)


# ---------------------------------------------------------------------- filters


def smaller(model: ResNet9, channels: list[torch.Tensor]) -> ResNet9:
    """A network that has only those channels: layer1, layer2, inside residual1, layer3, inside residual2, layer4."""
    one, two, inside1, three, inside2, four = (c.nonzero().squeeze(1) for c in channels)
    image = torch.arange(model.layer1[0].in_channels)
    plan = {
        "layer1": (image, one), "layer2": (one, two), "residual1.block1": (two, inside1),
        "residual1.block2": (inside1, two), "layer3": (two, three), "residual2.block1": (three, inside2),
        "residual2.block2": (inside2, three), "layer4": (three, four),
    }  # fmt: skip
    made = copy.deepcopy(model)
    for name, (read, written) in plan.items():
        old = model.get_submodule(name)[0]
        new = nn.Conv2d(len(read), len(written), old.kernel_size, old.stride, old.padding, dtype=torch.float64)
        new.weight.data = old.weight.detach()[written][:, read].clone()
        new.bias.data = old.bias.detach()[written].clone()
        made.get_submodule(name)[0] = new
    made.head = nn.Linear(len(four), model.head.out_features, bias=False, dtype=torch.float64)
    made.head.weight.data = model.head.weight.detach()[:, four].clone()
    return made


def some_channels(model: ResNet9, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = [model.get_submodule(group.makers[0]).out_channels for group in GROUPS]
    kept = [torch.rand(n, generator=generator) < 0.6 for n in widths]
    for channels in kept:
        channels[0] = True
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_a_network_with_pruned_filters_is_the_smaller_network(seed):
    model, task = small_model(), small_task()
    channels = some_channels(model, seed)
    small, masks = smaller(model, channels), filter_masks(model, channels)
    filters.apply(model, masks)
    torch.testing.assert_close(outputs(model, task.test_images), outputs(small, task.test_images), rtol=0, atol=1e-12)
    assert sum(int(mask.sum()) for mask in masks.values()) == without_head(small)
    assert filters._size(model, [int(c.sum()) for c in channels]) == without_head(small)
    assert set(masks) == {n for n, _ in model.named_parameters()} - {"head.weight"}


def test_retraining_with_masks_is_training_the_smaller_network():
    """Momentum and weight decay move nothing that is pruned, and nothing else otherwise."""
    model, task = small_model(), small_task()
    setting = replace(TINY, retrain_epochs=4, retrain_rate=0.02)
    channels = some_channels(model, 1)
    small, masks, start = smaller(model, channels), filter_masks(model, channels), copy.deepcopy(model)
    filters.apply(model, masks)
    retrain(model, masks, task, setting, seed=4)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.02, momentum=0.9, weight_decay=0.005)
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        for ids in torch.randperm(20, generator=generator).split(8):
            optimizer.zero_grad()
            nn.functional.nll_loss(small(task.train_images[ids]), task.train_targets[ids]).backward()
            optimizer.step()
    torch.testing.assert_close(outputs(model, task.test_images), outputs(small, task.test_images), rtol=0, atol=1e-10)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert (model.get_parameter(name)[mask] != start.get_parameter(name)[mask]).any()


def test_masks_of_any_entries_hold_while_retraining():
    """Whole filters would stay at zero by themselves: nothing reaches them."""
    model, task = small_model(), small_task()
    generator = torch.Generator().manual_seed(0)
    names = [n for n, _ in model.named_parameters() if n != "head.weight"]
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.5 for n in names}
    filters.apply(model, masks)
    retrain(model, masks, task, TINY, seed=0)
    assert not any(model.get_parameter(n)[~mask].any() for n, mask in masks.items())


@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_share_of_filters_comes_as_near_to_the_level_as_any(width):
    model = ResNet9(width)
    whole, last = without_head(model), None
    widths = np.array([model.get_submodule(group.makers[0]).out_channels for group in GROUPS])
    shares = np.linspace(0, 1, 3000)[:, None]
    options = np.unique(np.maximum(1, np.floor(shares * widths + 0.5)).astype(int), axis=0)
    fractions = np.array([1 - filters._size(model, counts) / whole for counts in options])
    for level in LEVELS[::2]:
        counts = channel_counts(model, level)
        best = abs(fractions - level).min()
        assert abs(1 - filters._size(model, counts) / whole - level) <= best + 1e-12
        assert min(counts) >= 1
        assert last is None or all(a <= b for a, b in zip(counts, last, strict=True))
        last = counts


def test_the_filters_of_the_smallest_norm_go_and_the_shortcut_chooses():
    model = small_model()
    before = [torch.ones(model.get_submodule(g.makers[0]).out_channels, dtype=torch.bool) for g in GROUPS]
    with torch.no_grad():
        for scale, name in ((1.0, "layer2.0"), (-1.0, "residual1.block2.0")):
            norms = torch.arange(1, 7) if scale > 0 else torch.arange(7, 1, -1)
            weight = model.get_submodule(name).weight
            weight.mul_(100 * norms[:, None, None, None] / weight.abs().sum((1, 2, 3), keepdim=True))
        model.layer2[0].weight[1] *= 0.9 / 2  # the smallest two are now 1 and 0
    chosen = smallest_left_out(model, [3, 4, 6, 12, 12, 6], before)
    assert chosen[1].tolist() == [False, False, True, True, True, True]
    assert all(c.all() for i, c in enumerate(chosen) if i != 1)
    masks = filter_masks(model, chosen)
    for name in ("layer2.0", "residual1.block2.0"):
        assert masks[f"{name}.bias"].tolist() == chosen[1].tolist()
    again = smallest_left_out(model, [3, 2, 6, 12, 12, 6], chosen)
    assert again[1].tolist() == [False, False, False, False, True, True]


def test_what_was_pruned_does_not_come_back_even_if_it_were_larger():
    model = small_model()
    before = [torch.ones(model.get_submodule(g.makers[0]).out_channels, dtype=torch.bool) for g in GROUPS]
    before[0][2] = False
    model.layer1[0].weight.data[2] = 100.0
    assert not smallest_left_out(model, [2, 6, 6, 12, 12, 6], before)[0][2]


def test_level_after_level_from_the_network_retrained_before():
    model, task = small_model(), small_task()
    start = copy.deepcopy(model)
    dead, fractions = None, []
    for fraction, network in pruned_filters(model, task, TINY, seed=2):
        zero = {n: p.detach() == 0 for n, p in network.named_parameters() if n != "head.weight"}
        fractions.append(fraction)
        assert fraction == pytest.approx(sum(int(z.sum()) for z in zero.values()) / without_head(model), rel=1e-12)
        assert dead is None or all(bool((zero[n] | ~dead[n]).all()) for n in zero)
        dead = zero
    np.testing.assert_allclose(fractions, TINY.levels, atol=0.08)  # 3, 6 and 12 channels cannot do better
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), model.parameters(), strict=True))


# ---------------------------------------------------------------------- curves


def test_the_curves_are_those_of_the_networks_one_by_one():
    model, task = small_model(), small_task()
    importance = torch.rand(without_head(model), dtype=torch.float64)
    found = curves(model, importance, task, TINY, seed=3)
    assert dict(found.sizes) == {"way": 4, "level": 3}
    full = outputs(model, task.test_images)
    for level in TINY.levels:
        order = importance.argsort()[: round(level * len(importance))]
        other = copy.deepcopy(model)
        theta = torch.nn.utils.parameters_to_vector(other.parameters()).detach()
        theta[order] = 0
        torch.nn.utils.vector_to_parameters(theta, other.parameters())
        values = outputs(other, task.test_images)
        one = found.sel(way=IMPORTANCE, level=level)
        assert float(one.pruned) == pytest.approx(len(order) / len(importance), rel=1e-12)
        assert float(one.kl) == pytest.approx(divergence(full, values), rel=1e-12)
        assert float(one.accuracy) == float((values.argmax(1) == task.test_targets).double().mean())
    np.testing.assert_allclose(found.sel(way=RANDOM).pruned, found.sel(way=IMPORTANCE).pruned)
    other = curves(model, importance, task, TINY, seed=4)
    assert not np.allclose(found.kl.sel(way=RANDOM), other.kl.sel(way=RANDOM))
    xr.testing.assert_identical(found, curves(model, importance, task, TINY, seed=3))


# ---------------------------------------------------------------------- findings


def made_curves(ours, theirs, chance, *, kl=(0.1, 0.2), seeds: int = 2) -> xr.Dataset:
    accuracy = np.array([ours, theirs, [0.9, 0.9], chance])
    divergences = np.array([[kl[0]] * 2, [kl[1]] * 2, [0, 0], [2, 2]])
    dims, coords = ("seed", "way", "level"), {"way": list(METHODS), "level": [0.7, 0.9]}
    both = [np.stack([values + 0.01 * s for s in range(seeds)]) for values in (accuracy, divergences)]
    found = {"accuracy": (dims, both[0]), "kl": (dims, both[1]), "pruned": (dims, 0 * both[0] + [0.7, 0.9])}
    return xr.Dataset(found, coords=coords)


def verdicts(*args, **options) -> list[bool | None]:
    return [claim.supported for claim in claims(made_curves(*args, **options))]


def test_claims_follow_their_thresholds():
    assert verdicts((0.9, 0.8), (0.9, 0.82), (0.1, 0.1)) == [True, True, True]
    assert verdicts((0.9, 0.8), (0.9, 0.86), (0.1, 0.1)) == [False, True, True]
    assert verdicts((0.9, 0.8), (0.9, 0.8), (0.1, 0.8)) == [True, True, False]
    assert verdicts((0.9, 0.8), (0.9, 0.8), (0.1, 0.1), kl=(0.2, 0.2)) == [True, False, True]
    first, second, _ = claims(made_curves((0.9, 0.8), (0.9, 0.86), (0.1, 0.1), kl=(0.3, 0.2)))
    assert first.value == pytest.approx(-0.03)
    assert "lowest -0.060, at 90%" in first.note
    assert second.value == "0 of 2"


def test_tables_hold_means_and_deviations():
    row = {"seed": 0, "accuracy": 0.9}
    table, _ = tables(made_curves((0.9, 0.8), (0.7, 0.6), (0.1, 0.1)), [row])
    rows = {(r[0], r[1]): r[2:] for r in table.rows}
    assert len(rows) == 8
    np.testing.assert_allclose(rows[FILTERS, 0.9], [0.9, 0.605, 0.01 / 2**0.5, 0.205, 0.01 / 2**0.5], rtol=1e-9)
    single, _ = tables(made_curves((0.9, 0.8), (0.7, 0.6), (0.1, 0.1), seeds=1), [row])
    assert np.isnan(single.rows[0][4])


def test_checks_fail_where_a_decomposition_does_not_close():
    def scores(closure: float, update: float) -> dict[int, xr.Dataset]:
        good = xr.Dataset({"final": 2.0}, attrs={"closure": 1e-12, "update_error": 0.0})
        return {0: good, 1: good.assign_attrs(closure=closure, update_error=update)}

    assert [holds for holds, _ in checks(scores(1e-5, 1e-3)).values()] == [True, True]
    assert [holds for holds, _ in checks(scores(1e-3, 1e-3)).values()] == [False, True]
    assert [holds for holds, _ in checks(scores(1e-5, 0.1)).values()] == [True, False]
