"""The oracle of all seven axes against facts that it was not made from: an oracle that is wrong proves nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import explaind_core as explaind
from support.attribution_oracles import SUBSETS as OLD_SUBSETS
from support.attribution_oracles import dense, modules
from support.axes_oracle import AXES, Influences, dims_of, influences
from support.axes_runs import BATCHES, CASES, DATA, INPUTS, MICRO, OPTIMIZERS, TARGETS, example, network, record_batches
from support.oracles import adam_alphas, adam_denominators, sgd_alphas
from support.updates_oracle import sample_gradients, updates


@lru_cache
def oracle(name: str, training: str = "plain", nodes: int | str = 2) -> Influences:
    return influences(example(name, training), INPUTS, nodes)


def flat(tree):
    return torch.cat([t.reshape(-1) for t in tree.values()])


# ------------------------------------------------------------------ updates
@pytest.mark.parametrize(("name", "training"), CASES)
def test_summed_over_samples_and_gradient_steps_it_is_the_decomposition(name, training):
    run, found = example(name, training), oracle(name, training).updates
    for step in explaind.decompose(run):
        for term, mine in (
            ("kernel", found.share[step.step - 1].sum((0, 2))),
            ("regularization", found.decay[step.step - 1]),
            ("prehistory", None if found.remembered is None else found.remembered[step.step - 1]),
        ):
            theirs = {n: getattr(u, term) for n, u in step.updates.items()}
            for parameter, where in found.where.items():
                if mine is None:
                    assert theirs.get(parameter) is None
                    continue
                update = theirs.get(parameter)
                update = torch.zeros(mine[where].shape) if update is None else update.reshape(-1)
                # Some ten products of numbers below 1.
                torch.testing.assert_close(-mine[where], update.double(), rtol=0, atol=1e-14)
    if training == "used":
        assert found.remembered.abs().max() > 1e-3


def test_a_secant_closes_the_oracle_too():
    """Muon's own iterations run in bfloat16: only with its secant do the explicit sums move the parameters."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    run = record_batches(network(bias=False), lambda ps: torch.optim.Muon(ps, lr=0.1), DATA, TARGETS, BATCHES)
    found = updates(run)
    for s in run.steps:
        moved = flat(run.theta(s)) - flat(run.theta(s - 1))
        torch.testing.assert_close(-found.share[s - 1].sum((0, 2)) - found.decay[s - 1], moved, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["descent", "nesterov", "adamw"])
def test_gradient_steps_are_weighted_by_the_closed_forms(name):
    """alpha_{s,i} by torch's documentation (tests/oracles.py), and nothing of the future."""
    run, found = example(name, "rates"), oracle(name, "rates").updates
    hypers, gradients = [run.hyper(s)[0] for s in run.steps], [flat(run.gradients(s)) for s in run.steps]
    if name == "adamw":
        alphas, denominators = adam_alphas(hypers), adam_denominators(hypers, gradients)
    else:
        alphas, denominators = sgd_alphas(hypers, present=False), [torch.ones_like(g) for g in gradients]
    for s in range(len(run.steps)):
        for i in range(len(run.steps)):
            weight = hypers[s]["lr"] * alphas[s, i] / denominators[s]
            torch.testing.assert_close(found.share[s, i], weight[:, None] * found.shares[i], rtol=1e-12, atol=1e-15)
    assert not found.share.permute(2, 3, 0, 1).triu(1).any()


@pytest.mark.parametrize("training", ["plain", "micro"])
def test_a_samples_share_of_a_mean_is_its_own_gradient_over_the_number_of_samples(training):
    run, found = example("descent", training), oracle("descent", training).updates
    model, batches = network(), MICRO if training == "micro" else [[(ids, 1.0)] for ids in BATCHES]
    for i, batch in enumerate(batches):
        theta = {n: t.requires_grad_() for n, t in run.theta(i).items()}
        for position, k in enumerate(found.ids):
            value = torch.zeros((), dtype=torch.float64)
            for ids, weight in batch:
                for _ in range(ids.count(k)):  # twice in the batch counts twice
                    one = nn.functional.cross_entropy(functional_call(model, theta, DATA[k]), TARGETS[k])
                    value = value + weight / len(ids) * one
            own = torch.zeros(found.shares.shape[1], dtype=torch.float64)
            if value.requires_grad:
                own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(theta.values()))])
            torch.testing.assert_close(found.shares[i, :, position], own, rtol=1e-12, atol=1e-15)


def test_a_normaliser_belongs_to_the_whole_batch():
    """Class weights: a mean over the batch's weights, which no sample knows on its own."""
    weights = torch.tensor([0.2, 1.7], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    run = record_batches(network(), OPTIMIZERS["descent"], DATA, TARGETS, BATCHES, loss=loss)
    ids, found = sample_gradients(run, 1, loss)
    theta = {n: t.requires_grad_() for n, t in run.theta(0).items()}
    values = nn.functional.cross_entropy(functional_call(network(), theta, DATA[ids]), TARGETS[ids], reduction="none")
    scaled = weights[TARGETS[ids]] * values / weights[TARGETS[ids]].sum()
    for share, row in zip(found, scaled, strict=True):
        own = torch.autograd.grad(row, list(theta.values()), retain_graph=True)
        torch.testing.assert_close(flat(share), torch.cat([g.reshape(-1) for g in own]), rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------ the whole tensor
def test_descent_with_the_node_on_the_left_is_tracin():
    """kernel_{s,k} = - lr <df/dtheta(theta_{s-1}), g_{s,k}>, of the step's own gradient only."""
    run, truth = example("descent", "rates"), oracle("descent", "rates", "left")
    kernel = truth.expected(("step", "gradient_step", "train", "test", "output"))["kernel"]
    model = network()
    for s in run.steps:
        theta = run.theta(s - 1)
        found = torch.func.jacrev(lambda p: functional_call(model, p, INPUTS))(theta)
        jacobian = torch.cat([found[n].flatten(2) for n in theta], -1)  # [n, J, D]
        products = torch.einsum("njd,dk->knj", jacobian, truth.updates.shares[s - 1])
        np.testing.assert_allclose(kernel[s - 1, s - 1], -run.hyper(s)[0]["lr"] * products, rtol=0, atol=1e-15)
        assert not np.delete(kernel[s - 1], s - 1, axis=0).any()


def layer_masks(truth, layers):
    """None, or some entries only."""
    if layers is None:
        return modules(truth)
    rows = [truth.mask(n, entries=1) for n in ("0.weight", "0.bias") if n in truth.where]  # some have no biases
    return {"neuron": sum(rows), "rest of it": truth.mask("0.weight", entries=slice(2, 3))}


@pytest.mark.parametrize(("name", "training"), [("nesterov", "used"), ("adamw", "missing"), ("lbfgs", "plain")])
@pytest.mark.parametrize("layers", [None, "parts"])
@pytest.mark.parametrize("steps", [None, [1, 4], [2, 3], [3]], ids=str)
def test_over_the_four_old_axes_it_is_the_old_oracle(name, training, layers, steps):
    truth, old = oracle(name, training), dense(example(name, training), INPUTS, 2)
    for keep in OLD_SUBSETS:
        mine = truth.expected(keep, steps=steps, layers=layer_masks(truth, layers))
        theirs = old.expected(keep, layer_masks(old, layers), steps or list(example(name, training).steps))
        assert set(theirs) == set(mine)
        for variable, value in theirs.items():
            np.testing.assert_allclose(mine[variable], value, rtol=0, atol=1e-13, err_msg=variable)


some_steps = st.sampled_from([None, [1], [2, 4], slice(2, 4), {"a": [1, 2], "b": [4]}, {"late": slice(3, 5)}])
some_train = st.sampled_from([None, [4, 0], [5], slice(0, 4), {"x": [0, 1], "y": [4, 7, 8]}, {"none": []}])
questions = st.fixed_dictionaries(
    {
        "steps": some_steps,
        "gradient_steps": st.sampled_from([None, [1], slice(1, 3)]),
        "train": some_train,
        "test": st.sampled_from([None, [1], slice(0, 1)]),
    }
)
subsets = st.sets(st.sampled_from(AXES)).map(lambda chosen: tuple(a for a in AXES if a in chosen))


@settings(deadline=None, max_examples=60)
@given(keep=subsets, case=st.sampled_from(CASES), question=questions, layers=st.sampled_from([None, "parts"]))
def test_every_answer_closes_and_is_a_sum_of_larger_ones(keep, case, question, layers):
    truth = oracle(*case)
    if question["gradient_steps"] is not None and question["steps"] in ([1],):
        question["gradient_steps"] = [1]
    question = {**question, "layers": layer_masks(truth, layers)}
    found, labels = truth.expected(keep, **question), truth.labels(keep, **question)
    total = found["initial"]
    for name, value in found.items():
        assert value.shape == tuple(len(labels[axis]) for axis in dims_of(name, keep))
        if name not in ("initial", "final"):
            dims = dims_of(name, keep)
            total = total + value.sum(tuple(i for i, axis in enumerate(dims) if axis not in ("test", "output")))
    np.testing.assert_allclose(total, found["final"], rtol=0, atol=1e-12)
    everything = truth.expected(AXES, **question)
    for name, value in found.items():
        gone = tuple(i for i, axis in enumerate(dims_of(name, AXES)) if axis not in keep)
        np.testing.assert_allclose(everything[name].sum(gone), value, rtol=0, atol=1e-13, err_msg=name)


def test_labels_are_in_the_order_that_was_asked_for():
    truth = oracle("adamw")
    question = {"train": [8, 0], "test": [1, 0], "steps": {"b": [2], "a": [4]}, "gradient_steps": [3, 4]}
    labels = truth.labels(AXES, **question)
    assert labels["train"] == [8, 0]
    assert labels["test"] == [1, 0]
    assert labels["step"] == ["b", "a"]
    assert labels["gradient_step"] == [3, 4]
    assert labels["parameter"] == list(range(20))
    assert truth.labels(("train",), gradient_steps=[2])["train"] == [0, 4, 6]
    full, some = truth.expected(AXES)["kernel"], truth.expected(AXES, **question)["kernel"]
    kept = [truth.updates.ids.index(8), truth.updates.ids.index(0)]
    chosen = full[np.ix_([1, 3], [2, 3], range(2), range(20), kept, [1, 0], range(2))]
    np.testing.assert_array_equal(chosen, some)


def test_what_is_left_out_is_the_omitted():
    truth = oracle("nesterov")
    complete, kernel = truth.expected(("step", "test", "output")), truth.expected(AXES)["kernel"]
    assert np.abs(complete["omitted"]).max() < 1e-14
    some = truth.expected(("step", "test", "output"), train=[0, 7], gradient_steps=[1, 3])
    position = [truth.updates.ids.index(k) for k in (0, 7)]
    told = kernel[:, [0, 2]][:, :, :, :, position].sum((1, 2, 3, 4))
    np.testing.assert_allclose(some["omitted"], kernel.sum((1, 2, 3, 4)) - told, rtol=0, atol=1e-14)
    np.testing.assert_allclose(some["residual"], complete["residual"], rtol=0, atol=1e-14)
    gap = truth.expected(("step", "test", "output"), steps=[1, 4])
    np.testing.assert_allclose(gap["omitted"][1], truth.values[3] - truth.values[1], rtol=0, atol=1e-14)
    windows = truth.expected(("step", "test", "output"), steps={"early": [1], "late": [4]})
    np.testing.assert_array_equal(windows["omitted"], gap["omitted"])
