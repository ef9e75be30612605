"""Parameters of shape (): a temperature, a gate, a model of nothing else; and outputs that lose the samples' axis."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from support.attribution_oracles import modules
from support.axes_oracle import AXES, SUBSETS, assert_answers, influences
from support.axes_runs import BATCHES, MICRO, OPTIMIZERS, record_batches

_GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(9, 3, generator=_GENERATOR, dtype=torch.float64)
Y = torch.randint(2, (9,), generator=_GENERATOR)
TEST = torch.randn(2, 3, generator=_GENERATOR, dtype=torch.float64)


class Scaled(nn.Module):
    """Contrastive models scale their logits by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.logit_scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.logit_scale.exp()


class Gated(nn.Module):
    """A gate in the middle, one that is frozen, and one that training never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.fixed = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.first, self.second, self.spare = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.second(x + self.gate * torch.tanh(self.first(x))) / self.fixed
        return found if self.training else found + self.spare


class Scalars(nn.Module):
    """Nothing else: a line."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.slope * x[:, :2] + self.offset)


class ReZero(nn.Module):
    """Residual branches that are multiplied by numbers which begin at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.alphas = nn.ParameterList(nn.Parameter(torch.tensor(0.0)) for _ in range(2))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, alpha in zip(self.blocks, self.alphas, strict=True):
            x = x + alpha * torch.tanh(block(x))
        return self.head(x)


class Tempered(nn.Module):
    """Logits over a temperature, and a threshold that all classes share."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))
        self.threshold = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.head(x) - self.threshold) / self.temperature


class Weighed(nn.Module):
    """What a learned weight of a loss makes of its outputs, and a number inside a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.log_variance, self.norm = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.0)), nn.PReLU()
        self.power = nn.Parameter(torch.tensor(1.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.head(x))
        size = (found.square().sum(-1, keepdim=True) + 1).pow(self.power / 2)
        return found / size * (-self.log_variance).exp() + self.log_variance


MODELS = {"scaled": Scaled, "gated": Gated, "scalars": Scalars}
MORE = {"rezero": ReZero, "tempered": Tempered, "weighed": Weighed}
#: Elementwise, several states, a flat rule, an operator over a tensor, another point, several optimizers.
TRAINED = ["descent", "nesterov", "adamw", "lbfgs", "lion", "ademamix", "schedule-free", "sgd+adam", "inferred"]


@lru_cache
def trained(name: str, optimizer: str = "adamw", micro: bool = False) -> explaind.Run:
    torch.manual_seed(1)
    options = {}
    if optimizer == "inferred":
        options["rule"] = explaind.InferredRule(momentum=0.8, decay="coupled", force=True)
    batches = MICRO if micro else BATCHES
    return record_batches((MODELS | MORE)[name]().double(), OPTIMIZERS[optimizer], X, Y, batches, **options)


@lru_cache
def oracle(name: str, optimizer: str = "adamw", micro: bool = False):
    return influences(trained(name, optimizer, micro), TEST, 2)


def compare(name: str, optimizer: str, keep: tuple[str, ...], *, micro: bool = False, **question) -> None:
    run, truth = trained(name, optimizer, micro), oracle(name, optimizer, micro)
    result = explaind.attribute(run, TEST, keep=keep, nodes=2, progress=False, **question)
    question.pop("strategy", None)
    assert_answers(result, truth, keep, layers=modules(truth), **question)


@pytest.mark.parametrize("optimizer", TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_all_axes_of_every_optimizer(name, optimizer):
    if (name, optimizer) == ("scalars", "sgd+adam"):
        pytest.skip("there are no matrices to train with the first of them")
    for keep in (AXES, ("train", "test", "output"), ("step", "gradient_step"), ("layer", "train", "test")):
        compare(name, optimizer, keep)


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "lbfgs"])
@pytest.mark.parametrize("name", MORE)
def test_numbers_in_other_places_of_a_model(name, optimizer):
    for keep in (AXES, ("layer", "train", "test")):
        compare(name, optimizer, keep)


@pytest.mark.parametrize("keep", SUBSETS, ids=lambda keep: "-".join(keep) or "nothing")
def test_every_set_of_axes(keep):
    compare("scaled", "adamw", keep, micro=True)


@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_or_it_says_so(name, strategy):
    answered = 0
    for keep in [*SUBSETS[::3], ("train", "test"), ("step", "test")]:
        try:
            compare(name, "nesterov", keep, strategy=strategy)
        except QuestionError as error:
            if "strategy" not in str(error):
                raise
        else:
            answered += 1
    assert answered >= 4


def test_a_scalar_is_a_layer_and_a_part_of_one():
    run, truth = trained("scaled"), oracle("scaled")
    keep = ("step", "layer", "train", "test")
    asked = {"scale": "logit_scale", "rest": ["head"]}
    masks = {"scale": truth.mask("logit_scale"), "rest": truth.mask("head.weight", "head.bias")}
    result = explaind.attribute(run, TEST, keep=keep, nodes=2, layers=asked, progress=False)
    assert_answers(result, truth, keep, layers=masks)
    result = explaind.attribute(run, TEST, keep=keep, nodes=2, layers={"scale": {"logit_scale": ...}}, progress=False)
    assert_answers(result, truth, keep, layers={"scale": masks["scale"]})


@pytest.mark.parametrize("name", MODELS)
def test_similarity_importance_and_verify(name):
    run, truth = trained(name), oracle(name)
    assert explaind.verify(run, TEST, progress=False).agreement > 1 - 1e-9
    kernel = truth.expected(AXES)["kernel"]
    for over in (("train",), ("parameter",), ("step", "layer", "parameter", "train", "output"), ("step", "train")):
        tensors = np.moveaxis(kernel, AXES.index("test"), 0)
        gone = tuple(1 + n for n, axis in enumerate(a for a in AXES if a != "test") if axis not in over)
        flat = tensors.sum(gone).reshape(len(TEST), -1)
        expected = flat @ flat.T / np.outer(np.linalg.norm(flat, axis=1), np.linalg.norm(flat, axis=1))
        found = explaind.similarity(run, TEST, over=over, nodes=2, progress=False)
        np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=0, atol=1e-9)
    scores = explaind.parameter_importance(run, TEST, nodes=2, progress=False)
    summed = truth.expected(("parameter", "test", "output"))["kernel"]
    np.testing.assert_allclose(scores.kernel, np.abs(summed).sum((1, 2)), rtol=0, atol=1e-11)


# ------------------------------------------------------------------ outputs without an axis of samples
class Numbers(nn.Module):
    """One number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)[:, 0]


class Squeezed(Numbers):
    """The same with the axes of length one left away: of a single sample, all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).squeeze()


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


@pytest.mark.parametrize("optimizer", ["descent", "adamw"])
@pytest.mark.parametrize("keep", [("step", "train", "test", "output"), ("train",), ("step", "test"), ("test",)])
def test_a_single_row_that_was_squeezed_is_a_row(keep, optimizer):
    runs = []
    for make in (Numbers, Squeezed):
        torch.manual_seed(1)
        batches = [*BATCHES, [8]]
        runs.append(record_batches(make().double(), OPTIMIZERS[optimizer], X, Y.double(), batches, loss=squared_error))
    plain, run = runs
    for test in (TEST, TEST[:1]):
        truth = influences(plain, test, 2, loss=squared_error)
        for strategy in (None, "reverse", "features", "adjoint"):
            try:
                result = explaind.attribute(run, test, keep=keep, nodes=2, strategy=strategy, progress=False)
            except QuestionError as error:
                if "strategy" not in str(error):
                    raise
            else:
                assert_answers(result, truth, keep)
    assert explaind.verify(run, TEST[:1], progress=False).agreement > 1 - 1e-9


@pytest.mark.parametrize(
    "output",
    [
        lambda call, x: call(x)[:, 0].squeeze(),
        lambda call, x: call(x).squeeze(),
        lambda call, x: call(x).squeeze(0)[..., 1],
    ],
)
def test_an_output_function_that_squeezes(output):
    run = trained("scaled")
    expected = explaind.attribute(
        run, TEST, nodes=2, keep=("step", "train", "test"), progress=False,
        output=lambda call, x: output(call, x).reshape(len(x), -1),
    )  # fmt: skip
    for n in (1, 2):
        found = explaind.attribute(
            run, TEST[:n], nodes=2, keep=("step", "train", "test"), output=output, progress=False
        )
        np.testing.assert_allclose(found.kernel, expected.kernel[..., :n], rtol=0, atol=1e-13)


def test_an_output_that_sums_over_samples_is_refused():
    with pytest.raises(QuestionError, match="one row per sample"):
        explaind.attribute(
            trained("scaled"), TEST, output=lambda call, x: call(x).sum(), keep=("step",), progress=False
        )
