"""Older methods are special questions (theory, section 10): TracIn, Loss Change Allocation and the empirical NTK.

Each is computed three ways: by another library where there is one, directly with autograd, and by ``attribute``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

import explaind_core as explaind
from explaind_core import Loss
from explaind_core.run.run import Run
from support.attribution_oracles import record

with warnings.catch_warnings():
    # dattri compiles a function when it is imported, with parts of torch that torch itself calls deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from captum.influence import TracInCP, TracInCPFast
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

LOSS = nn.CrossEntropyLoss()
RATES = (0.3, 0.1, 0.25, 0.2)
GENERATOR = torch.Generator().manual_seed(7)
TRAIN = torch.randn(10, 4, dtype=torch.float64, generator=GENERATOR), torch.randint(3, (10,), generator=GENERATOR)
TEST = torch.randn(5, 4, dtype=torch.float64, generator=GENERATOR), torch.randint(3, (5,), generator=GENERATOR)
Theta = Mapping[str, Tensor]


def architecture() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def a_run(folder, make_optimizer, *, batch=10, steps=4, rates=RATES) -> Run:
    model = architecture()
    torch.manual_seed(1)
    return record(folder / "run", model, make_optimizer, *TRAIN, loss=LOSS, steps=steps, batch=batch, rates=rates)


@pytest.fixture(scope="module", params=[10, 4], ids=["full batch", "mini-batch"])
def sgd_run(request, tmp_path_factory) -> Run:
    return a_run(tmp_path_factory.mktemp("sgd"), lambda ps: torch.optim.SGD(ps, lr=1.0), batch=request.param)


def close(left, right, tolerance=1e-12):
    """Equal to a fraction of the largest number; both are sums of some hundred products in float64."""
    left, right = np.asarray(left), np.asarray(right)
    assert left.shape == right.shape
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * np.abs(right).max())


# ---------------------------------------------------------------------- TracIn
def loaded(theta: Theta) -> nn.Sequential:
    model = architecture()
    model.load_state_dict(theta)
    return model


def is_in(name: str, layers: Sequence[str]) -> bool:
    return any(name == layer or name.startswith(layer + ".") for layer in layers)


def captum_tracin(points: Sequence[Theta], rates: Sequence[float], layers: Sequence[str] | None) -> Tensor:
    def load(model, point):
        model.load_state_dict(point[0])
        return point[1]

    method = TracInCP(
        architecture(), TensorDataset(*TRAIN), list(zip(points, rates, strict=True)), load, layers,
        nn.CrossEntropyLoss(reduction="sum"), batch_size=4, sample_wise_grads_per_batch=True,
    )  # fmt: skip
    with warnings.catch_warnings():  # it says that it switches gradients on
        warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients", UserWarning)
        return method.influence(TEST).T


def captum_tracin_fast(points: Sequence[Theta], rates: Sequence[float], layers: Sequence[str] | None) -> Tensor:
    """Of the last layer's weights alone, from what it saw and its outputs' gradients; its bias is left out."""
    assert layers == ["2.weight"]
    model = architecture()

    def load(model, point):
        model.load_state_dict(point[0])
        return point[1]

    method = TracInCPFast(
        model, model[2], TensorDataset(*TRAIN), list(zip(points, rates, strict=True)), load,
        nn.CrossEntropyLoss(reduction="sum"), batch_size=4,
    )  # fmt: skip
    return method.influence(TEST).T


def dattri_tracin(points: Sequence[Theta], rates: Sequence[float], layers: Sequence[str] | None) -> Tensor:
    model = architecture()

    def sample_loss(theta, sample):
        x, y = sample
        return LOSS(functional_call(model, theta, (x[None],)), y[None])

    names = [n for n, _ in model.named_parameters() if layers and is_in(n, layers)]
    attributor = TracInAttributor(
        AttributionTask(loss_func=sample_loss, model=model, checkpoints=[dict(p) for p in points]),
        weight_list=torch.tensor(rates),
        normalized_grad=False,
        projector_kwargs={"proj_type": "identity"},  # by default it projects to 512 random directions
        layer_name=names or None,
    )
    loaders = (DataLoader(TensorDataset(*data), batch_size=3) for data in (TRAIN, TEST))
    return attributor.attribute(*loaders)


def direct_tracin(points: Sequence[Theta], rates: Sequence[float], layers: Sequence[str] | None) -> Tensor:
    return sum(
        rate * sample_gradients(point, *TRAIN, layers) @ sample_gradients(point, *TEST, layers).T
        for point, rate in zip(points, rates, strict=True)
    )


def sample_gradients(theta: Theta, inputs: Tensor, targets: Tensor, layers: Sequence[str] | None = None) -> Tensor:
    """One backward pass per sample: ``[n, D]``."""
    model, rows = loaded(theta), []
    chosen = [p for n, p in model.named_parameters() if layers is None or is_in(n, layers)]
    for x, y in zip(inputs, targets, strict=True):
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(LOSS(model(x[None]), y[None]), chosen)]))
    return torch.stack(rows)


@pytest.fixture
def float64_by_default():
    """dattri adds its scores up in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tracin(method, run: Run, layers: Sequence[str] | None) -> Tensor:
    """``sum_s lr_s <grad loss(x), grad loss_k>`` at theta_{s-1}, k being in batch s: ``[train, test]``.

    The libraries take every sample at every checkpoint. So of a mini-batch run each checkpoint is asked about alone,
    and the rows of its batch are added up.
    """
    points, rates = [run.theta(s - 1) for s in run.steps], [run.hyper(s)[0]["lr"] for s in run.steps]
    batches = [run.batch(s).ids for s in run.steps]
    if all(len(ids) == len(TRAIN[0]) for ids in batches):
        return method(points, rates, layers).detach()
    total = torch.zeros(len(TRAIN[0]), len(TEST[0]), dtype=torch.float64)
    for point, rate, ids in zip(points, rates, batches, strict=True):
        total[ids] += method([point], [rate], layers).detach()[ids]
    return total


CASES = [
    pytest.param(library, layers, id=f"{name} {layers}")
    for name, library, cases in (
        ("captum", captum_tracin, [None, ["0"], ["2"]]),
        ("captum fast", captum_tracin_fast, [["2.weight"]]),
        ("dattri", dattri_tracin, [None, ["0"], ["2"], ["2.weight"]]),
    )
    for layers in cases
]


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("library", "layers"), CASES)
def test_the_libraries_tracin_is_that_of_autograd(sgd_run, library, layers):
    close(tracin(library, sgd_run, layers), tracin(direct_tracin, sgd_run, layers))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("library", "layers"), CASES)
def test_tracin_is_the_kernel_of_plain_sgd_with_one_node_at_the_start(sgd_run, library, layers):
    """Our contribution is what is added to the loss, of the batch's mean: TracIn's with the sign changed, over |B|."""
    result = explaind.attribute(
        sgd_run, TEST[0], keep=("train", "test"), output=Loss(TEST[1]), layers=layers, nodes="left", progress=False
    )
    assert result.train.values.tolist() == sorted({int(k) for s in sgd_run.steps for k in sgd_run.batch(s).ids})
    size = len(sgd_run.batch(1).ids)
    expected = tracin(library, sgd_run, layers)[result.train.values.tolist()]
    close(-size * result.kernel, expected, 1e-10)
    assert not result.regularization.any()


def test_tracin_step_by_step_and_layer_by_layer(sgd_run):
    result = explaind.attribute(
        sgd_run, TEST[0], keep=("step", "layer", "train", "test"), output=Loss(TEST[1]), nodes="left",
        train=list(range(10)), progress=False,
    )  # fmt: skip
    expected = np.zeros((len(RATES), 2, 10, 5))
    for s, rate in zip(sgd_run.steps, RATES, strict=True):
        ids = sgd_run.batch(s).ids
        for index, layer in enumerate(["0", "2"]):
            expected[s - 1, index, ids] = direct_tracin([sgd_run.theta(s - 1)], [rate], [layer])[ids] / len(ids)
    close(-result.kernel, expected)


# ---------------------------------------------------------------------- Loss Change Allocation
def total_gradient(theta: Theta, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of the sum of the samples' losses, ``[D]``."""
    return sample_gradients(theta, inputs, targets).sum(0)


def flat(theta: Theta) -> Tensor:
    return torch.cat([t.flatten() for t in theta.values()])


def loss_change_allocation(run: Run, inputs: Tensor, targets: Tensor, rule: Mapping[float, float]) -> Tensor:
    """Lan et al. (2019): each step's gradient, integrated along the step by ``rule``, times what each entry moved."""
    rows = []
    for s in run.steps:
        before, after = run.theta(s - 1), run.theta(s)
        gradient = sum(
            weight * total_gradient({n: torch.lerp(before[n], after[n], t) for n in before}, inputs, targets)
            for t, weight in rule.items()
        )
        rows.append(gradient * (flat(after) - flat(before)))
    return torch.stack(rows)


FIRST_ORDER, MIDPOINT, SIMPSON = {0.0: 1.0}, {0.5: 1.0}, {0.0: 1 / 6, 0.5: 4 / 6, 1.0: 1 / 6}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.5),
}


@pytest.fixture(scope="module", params=[*OPTIMIZERS])
def any_run(request, tmp_path_factory) -> Run:
    return a_run(tmp_path_factory.mktemp("lca"), OPTIMIZERS[request.param], batch=4, rates=())


def allocation(run: Run, nodes):
    result = explaind.attribute(
        run, TRAIN[0], keep=("step", "parameter"), output=Loss(TRAIN[1]), nodes=nodes, progress=False
    )
    assert explaind.closure_error(result) <= 1e-12
    return result, result.kernel + result.regularization


@pytest.mark.parametrize(("nodes", "rule"), [("left", FIRST_ORDER), (1, MIDPOINT)], ids=["first order", "midpoint"])
def test_loss_change_allocation_is_the_loss_with_parameters_kept(any_run, nodes, rule):
    """The loss of the train set, summed; all terms together are the gradient times the displacement."""
    _, terms = allocation(any_run, nodes)
    close(terms, loss_change_allocation(any_run, *TRAIN, rule))


def test_loss_change_allocation_by_simpsons_rule(any_run):
    """Another rule of the same integral: what is left is both rules' error, and the rounding of neither."""
    result, terms = allocation(any_run, 4)
    lan = loss_change_allocation(any_run, *TRAIN, SIMPSON)
    finer = loss_change_allocation(any_run, *TRAIN, {k / 16: w / 48 for k, w in enumerate([1, *[4, 2] * 7, 4, 1])})
    scale = float(lan.abs().max())
    # Simpson's rule in 8 pieces is 8^4 times as accurate as in one, so it stands for the integral here.
    assert float(abs(terms.values - finer.numpy()).max()) <= 1e-3 * float(abs(lan - finer).max()) + 1e-12 * scale
    assert float(abs(lan - finer).max()) <= 1e-4 * scale
    losses = [LOSS(loaded(any_run.theta(s))(TRAIN[0]), TRAIN[1]).item() * 10 for s in (0, *any_run.steps)]
    close(terms.sum("parameter") + result.residual, np.diff(losses))


# ---------------------------------------------------------------------- the empirical NTK
def outputs_jacobian(theta: Theta, inputs: Tensor) -> Tensor:
    """``[n, J, D]`` by torch's own reverse-mode transform."""
    model = architecture()
    jacobian = jacrev(lambda p: functional_call(model, p, (inputs,)))(dict(theta))
    return torch.cat([jacobian[n].flatten(2) for n in theta], 2)


def test_one_sgd_step_is_the_empirical_neural_tangent_kernel(tmp_path):
    """``kernel_k(x) = - lr NTK(x, x_k) dL/df_k`` at theta_0, for all outputs."""
    run = a_run(tmp_path, lambda ps: torch.optim.SGD(ps, lr=0.4), batch=6, steps=1, rates=())
    result = explaind.attribute(run, TEST[0], keep=("train", "test", "output"), nodes="left", progress=False)
    theta, batch = run.theta(0), run.batch(1)
    ntk = torch.einsum("xjd,kcd->kxjc", outputs_jacobian(theta, TEST[0]), outputs_jacobian(theta, batch.inputs))
    logits = functional_call(architecture(), dict(theta), (batch.inputs,))
    towards = vmap(grad(lambda f, y: LOSS(f[None], y[None]) / 6))(logits, batch.targets)
    expected = -0.4 * torch.einsum("kxjc,kc->kxj", ntk, towards)
    assert sorted(batch.ids.tolist()) == result.train.values.tolist()
    close(result.kernel, expected[batch.ids.argsort()].detach())
