"""What real loops do to gradients, against explicit sums: coupled samples, dropout, clipping, penalties, autocast."""

from __future__ import annotations

import copy
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.errors import QuestionError, RecordingError

SAMPLES, NODES = 8, 3
KEPT = ("step", "gradient_step", "layer", "train", "test", "output")
_GENERATOR = torch.Generator().manual_seed(2)
DATA = torch.randn(SAMPLES, 3, generator=_GENERATOR, dtype=torch.float64)
TARGETS = torch.randint(2, (SAMPLES,), generator=_GENERATOR)
INPUTS = torch.randn(2, 3, generator=_GENERATOR, dtype=torch.float64)

#: Temporary folders live as long as the tests.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def network(features: frozenset[str]) -> nn.Sequential:
    """No bias before a normalisation: its gradient would be rounding, and nothing else."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(3, 4, bias="norm" not in features)]
    layers += [nn.BatchNorm1d(4)] if "norm" in features else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(0.4)] if "dropout" in features else []
    layers += [nn.Linear(4, 3), nn.Tanh()]
    layers += [nn.Dropout(0.3)] if "dropout" in features else []
    return nn.Sequential(*layers, nn.Linear(3, 2)).double()


def penalty(parameters: Any) -> Tensor:
    """Not quadratic, and not of every parameter."""
    return 0.1 * parameters["0.weight"].pow(4).sum() + 0.05 * sum(
        p.abs().sum() for p in parameters.values() if p.ndim > 1
    )


@dataclass
class Trained:
    """A recorded run, and what its loop saw by itself, step by step."""

    run: explaind.Run
    lr: float
    mu: float
    decay: float
    theta: list[dict[str, Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    shares: list[tuple[list[int], list[dict[str, Tensor]]]] = field(default_factory=list)
    penalties: list[dict[str, Tensor]] = field(default_factory=list)
    fed: list[dict[str, Tensor]] = field(default_factory=list)


def shares_of(
    model: nn.Module, state: Tensor, inputs: Tensor, targets: Tensor, weight: float
) -> list[dict[str, Tensor]]:
    """Each sample's share: the gradient of the batch's loss through this row of the outputs alone."""
    model, now = copy.deepcopy(model), torch.get_rng_state()
    torch.set_rng_state(state)
    outputs = model(inputs)
    torch.set_rng_state(now)
    leaf = outputs.detach().requires_grad_()
    (pull,) = torch.autograd.grad(weight * nn.functional.cross_entropy(leaf, targets), leaf)
    found = []
    for row in range(len(inputs)):
        only = torch.zeros_like(pull)
        only[row] = pull[row]
        gradients = torch.autograd.grad(outputs, list(model.parameters()), only, retain_graph=True, allow_unused=True)
        found.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(model.named_parameters(), gradients, strict=True)
            }
        )
    return found


def train(
    features: frozenset[str],
    batches: list[list[list[int]]],
    *,
    lr: float = 0.3,
    mu: float = 0.7,
    decay: float = 0.1,
    **options: Any,
) -> Trained:
    """Train, record, and keep apart what every sample did."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="explaind-loops-"))
    path = Path(_FOLDERS[-1].name) / "run"
    model = network(features)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=mu, weight_decay=decay)
    loss = nn.CrossEntropyLoss()
    term = penalty if "penalty" in features else None
    kept = Trained(None, lr, mu, decay)  # type: ignore[arg-type]

    def keep() -> None:
        kept.theta.append({n: p.detach().clone() for n, p in model.named_parameters()})
        kept.buffers.append({n: b.clone() for n, b in model.named_buffers()})

    keep()
    torch.manual_seed(3)
    with explaind.Recorder(path, model, optimizer, loss, penalty=term, **options) as recorder:
        for step in batches:
            optimizer.zero_grad()
            ids, shares = [], []
            for k in step:
                state, weight, batch = torch.get_rng_state(), 1 / len(step), torch.tensor(k)
                shares += shares_of(model, state, DATA[batch], TARGETS[batch], weight)
                ids += k
                (weight * loss(model(DATA[batch]), TARGETS[batch])).backward()
                recorder.batch(DATA[batch], TARGETS[batch], ids=batch, weight=weight)
            factor = {n: torch.ones_like(p) for n, p in model.named_parameters()}
            penalties = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            if term is not None:
                parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
                term(parameters).backward()
                penalties = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
                term(dict(model.named_parameters())).backward()
            for kind, bound in (("clip", 0.2), ("clip value", 0.05)):
                before = {n: p.grad.clone() for n, p in model.named_parameters()}
                if kind == "clip" and "clip" in features:
                    recorder.clip_grad_norm_(bound)
                if kind == "clip value" and "clip value" in features:
                    recorder.clip_grad_value_(bound)
                for n, p in model.named_parameters():
                    factor[n] = torch.where(before[n] == 0, factor[n], factor[n] * p.grad / before[n])
            kept.shares.append((ids, [{n: factor[n] * g for n, g in share.items()} for share in shares]))
            kept.penalties.append({n: factor[n] * g for n, g in penalties.items()})
            if "noise" in features:
                for p in model.parameters():
                    p.grad += 0.05 * torch.randn_like(p)
                nearest(model, kept)
            kept.fed.append({n: p.grad.clone() for n, p in model.named_parameters()})
            optimizer.step()
            keep()
    kept.run = explaind.open_run(path, model=model, penalty=term)
    return kept


def nearest(model: nn.Module, kept: Trained) -> None:
    """Scale the last step's shares so that their sum comes nearest to what is fed: that is what is called theirs."""
    _, shares = kept.shares[-1]
    fed = torch.cat([(p.grad - kept.penalties[-1][n]).flatten() for n, p in model.named_parameters()])
    total = torch.cat([sum(share[n] for share in shares).flatten() for n in shares[0]])
    scale = fed @ total / (total @ total)
    for share in shares:
        for n in share:
            share[n] = scale * share[n]


def jacobian(model: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> ``[n, J, d]``, by one backward pass an entry."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict({**theta, **buffers})
    values = model(INPUTS)
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values.flatten()]
    return {
        n: torch.stack([row[i].flatten() for row in rows]).reshape(*values.shape, -1)
        for i, (n, _) in enumerate(model.named_parameters())
    }


def values(model: nn.Module, theta: dict[str, Tensor], buffers: dict[str, Tensor]) -> np.ndarray:
    model = copy.deepcopy(model).eval()
    model.load_state_dict({**theta, **buffers})
    return model(INPUTS).detach().numpy()


def expected(kept: Trained, features: frozenset[str], *, moving: bool = True) -> dict[str, np.ndarray]:
    """Everything as explicit sums over pairs of steps: ``[N, N, L, K, n, J]``, and what has fewer axes."""
    model = network(features)
    layers = list(dict.fromkeys(n.rpartition(".")[0] for n in kept.theta[0]))
    ids, N = sorted({k for step, _ in kept.shares for k in step}), len(kept.shares)
    points, weights = np.polynomial.legendre.leggauss(NODES)
    kernel = np.zeros((N, N, len(layers), len(ids), len(INPUTS), 2))
    found = {n: np.zeros((N, len(layers), len(INPUTS), 2)) for n in ("regularization", "penalty", "unattributed")}
    statistics = np.zeros((N, len(INPUTS), 2))
    for s in range(N):
        before, after = kept.theta[s], kept.theta[s + 1]
        buffers = kept.buffers[s] if moving else kept.buffers[-1]
        phi: dict[str, Tensor] = {}
        for t, w in zip(points, weights, strict=True):
            here = {n: before[n] + (t + 1) / 2 * (after[n] - before[n]) for n in before}
            for n, j in jacobian(model, here, buffers).items():
                phi[n] = phi.get(n, 0) + w / 2 * j
        if moving:
            statistics[s] = values(model, after, kept.buffers[s + 1]) - values(model, after, buffers)
        for i in range(s + 1):
            alpha = kept.lr * kept.mu ** (s - i)
            rest = {n: g.clone() for n, g in kept.fed[i].items()}
            for n, p in phi.items():
                layer = layers.index(n.rpartition(".")[0])
                for k, share in zip(*kept.shares[i], strict=True):
                    kernel[s, i, layer, ids.index(k)] -= (p @ (alpha * share[n].flatten())).numpy()
                    rest[n] -= share[n]
                rest[n] -= kept.penalties[i][n]
                for name, part in (
                    ("penalty", kept.penalties[i][n]), ("unattributed", rest[n]),
                    ("regularization", kept.decay * kept.theta[i][n]),
                ):  # fmt: skip
                    found[name][s, layer] -= (p @ (alpha * part.flatten())).numpy()
    return {"kernel": kernel, "statistics": statistics, **found}


def check(kept: Trained, features: frozenset[str], keep: tuple[str, ...], strategy: str | None, **ask: Any) -> Any:
    moving = ask.get("buffers", "recorded") == "recorded"
    truth = expected(kept, features, moving=moving)
    result = explaind.attribute(
        kept.run, INPUTS, keep=keep, nodes=NODES, strategy=strategy, progress=False,
        unattributed="carry" if "noise" in features else "refuse", **ask,
    )  # fmt: skip
    terms = {"kernel", "regularization"}
    terms |= {"penalty"} & features | ({"unattributed"} if "noise" in features else set())
    terms |= {"statistics"} if "norm" in features and moving else set()
    known = {"kernel", "regularization", "penalty", "unattributed", "statistics", "prehistory"}
    assert known & set(result) == terms
    for name in terms:
        axes = {"kernel": KEPT, "statistics": ("step", "test", "output")}.get(name, ("step", "layer", "test", "output"))
        gone = tuple(i for i, axis in enumerate(axes) if axis not in keep)
        assert result[name].dims == tuple(axis for axis in axes if axis in keep)
        np.testing.assert_allclose(result[name].values, truth[name].sum(gone), rtol=0, atol=1e-11, err_msg=name)
    assert explaind.closure_error(result) < 1e-12
    return result


FEATURES = ("norm", "dropout", "clip", "clip value", "penalty", "noise")
BATCHES = [[[0, 1, 2, 3]], [[4, 5, 4], [6, 7]], [[1, 0]], [[2, 3, 7]]]


def combined(*names: str) -> frozenset[str]:
    return frozenset(names)


@pytest.mark.parametrize("strategy", ["features", "adjoint"])
@pytest.mark.parametrize(
    "features",
    [
        combined(), *(combined(name) for name in FEATURES), combined("norm", "dropout", "clip", "penalty"),
        combined("dropout", "clip", "clip value"), combined("norm", "penalty", "noise"),
    ],
    ids=lambda f: " + ".join(sorted(f)) or "plain",
)  # fmt: skip
def test_every_influence_is_the_explicit_sum(features, strategy):
    kept = train(features, BATCHES)
    check(kept, features, KEPT, strategy)


def test_a_walk_backwards_begins_again_in_the_middle_of_a_run():
    """Seven steps are kept in four segments: every filter state must be put back at their borders."""
    features = combined("penalty", "norm")
    check(train(features, [*BATCHES, *BATCHES[:3]]), features, KEPT, "adjoint")


@settings(max_examples=12, deadline=None)
@given(
    st.sets(st.sampled_from(FEATURES[:5])).filter(lambda f: not {"clip value", "penalty"} <= f),
    st.lists(
        st.lists(st.lists(st.integers(0, SAMPLES - 1), min_size=2, max_size=4), min_size=1, max_size=2),
        min_size=1, max_size=4,
    ),
    st.floats(0, 0.9), st.floats(0, 0.3), st.sets(st.sampled_from(KEPT)),
    st.sampled_from(["features", "adjoint", None]), st.sampled_from(["recorded", "final"]),
)  # fmt: skip
def test_any_combination_of_features_axes_and_batches(features, batches, mu, decay, keep, strategy, buffers):
    kept = train(frozenset(features), batches, mu=mu, decay=decay)
    keep = tuple(axis for axis in KEPT if axis in keep or axis == "train")
    check(kept, frozenset(features), keep, strategy, buffers=buffers)


def test_samples_summed_need_no_shares_and_tell_the_penalty_apart():
    features = combined("norm", "dropout", "clip", "penalty")
    kept = train(features, BATCHES)
    for keep in itertools.chain([("step", "layer", "test", "output")], [("layer",), ("step", "test")]):
        truth = expected(kept, features)
        result = explaind.attribute(kept.run, INPUTS, keep=keep, nodes=NODES, progress=False)
        for name in ("regularization", "penalty", "statistics"):
            axes = ("step", "test", "output") if name == "statistics" else ("step", "layer", "test", "output")
            gone = tuple(i for i, axis in enumerate(axes) if axis not in keep)
            np.testing.assert_allclose(result[name].values, truth[name].sum(gone), rtol=0, atol=1e-11, err_msg=name)
        assert explaind.closure_error(result) < 1e-12


def test_running_statistics_are_a_contribution_of_their_own():
    features = combined("norm")
    kept = train(features, BATCHES)
    result = explaind.attribute(kept.run, INPUTS, keep=("step", "test", "output"), nodes=NODES, progress=False)
    model = network(features)
    np.testing.assert_allclose(result.initial, values(model, kept.theta[0], kept.buffers[0]), rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.final, values(model, kept.theta[-1], kept.buffers[-1]), rtol=0, atol=1e-14)
    assert float(abs(result.statistics).max()) > 0.01
    held = explaind.attribute(kept.run, INPUTS, nodes=NODES, buffers="final", progress=False)
    np.testing.assert_allclose(held.initial, values(model, kept.theta[0], kept.buffers[-1]), rtol=0, atol=1e-14)
    assert "statistics" not in held


def test_windows_chords_and_restrictions_close_with_moving_buffers():
    kept = train(combined("norm", "dropout"), BATCHES)
    for ask in (
        {"steps": {"a": [1], "b": [3, 4]}, "keep": ("step", "test")},
        {"steps": [2, 4], "keep": ("train", "test")},
        {"chords": 2, "keep": ("step", "layer")},
        {"chords": 3, "keep": ("step", "train"), "layers": ["4"]},
        {"train": [0, 4], "keep": ("step", "test", "output")},
    ):
        for buffers in ("recorded", "final"):
            result = explaind.attribute(kept.run, INPUTS, nodes=NODES, progress=False, buffers=buffers, **ask)
            assert explaind.closure_error(result) < 1e-12, ask
            assert float(abs(result.residual).max()) < 1e-3, ask


def test_what_no_sample_explains_is_refused_or_carried_with_its_size():
    kept = train(combined("noise"), BATCHES)
    with pytest.raises(RecordingError, match="not that of its declared samples") as error:
        explaind.attribute(kept.run, INPUTS, keep=("train",), nodes=1, progress=False)
    assert 'unattributed="carry"' in error.value.remedy
    results = [
        explaind.attribute(
            kept.run, INPUTS, keep=keep, nodes=NODES, strategy=strategy, unattributed="carry", progress=False
        )
        for keep in (("layer", "train", "test"), ("parameter", "train", "test"))
        for strategy in ("features", "adjoint")
    ]
    summed = explaind.attribute(kept.run, INPUTS, keep=("test",), nodes=NODES, progress=False)
    for result in results:
        assert explaind.closure_error(result) < 1e-12
        assert 0.01 < result.attrs["unattributed_gradient"] < 1
        whole = result.kernel.sum([d for d in result.kernel.dims if d != "test"])
        whole = whole + result.unattributed.sum([d for d in result.unattributed.dims if d != "test"])
        np.testing.assert_allclose(whole, summed.kernel, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            result.kernel.sum(result.kernel.dims[0]), results[0].kernel.sum("layer"), rtol=0, atol=1e-12
        )


def test_a_question_about_gradients_that_cannot_be_asked_is_refused():
    kept = train(combined(), BATCHES[:1])
    for name, value in (("unattributed", "ignore"), ("buffers", "first")):
        with pytest.raises(QuestionError, match=r"there (is|are) no such") as error:
            explaind.attribute(kept.run, INPUTS, progress=False, **{name: value})
        assert error.value.where == name
    kept = train(combined("penalty"), BATCHES[:2])
    without = explaind.open_run(kept.run.path, model=kept.run.model)
    with pytest.raises(QuestionError, match="opened without it"):
        explaind.attribute(without, INPUTS, progress=False)
    rows = explaind.open_run(kept.run.path, model=kept.run.model, penalty=lambda p: p["0.weight"].sum(0))
    with pytest.raises(QuestionError, match="penalty is not one number"):
        explaind.attribute(rows, INPUTS, progress=False)
    kept = train(combined("penalty", "clip value"), BATCHES[:2])
    with pytest.raises(RecordingError, match="clipped entry by entry"):
        explaind.attribute(kept.run, INPUTS, progress=False)


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
def test_all_features_are_computed_again_bit_by_bit_where_they_are_not_stored(mode):
    features = combined("norm", "dropout", "clip", "penalty")
    whole, less = train(features, BATCHES), train(features, BATCHES, mode=mode, snapshot_every=3)
    for s in whole.run.steps:
        for what in ("theta", "gradients", "buffers"):
            one, other = getattr(whole.run, what)(s), getattr(less.run, what)(s)
            assert all(torch.equal(one[n], other[n]) for n in {*one, *other})
    results = [explaind.attribute(kept.run, INPUTS, keep=KEPT, nodes=NODES, progress=False) for kept in (whole, less)]
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])
    with pytest.raises(QuestionError, match="takes the penalty"):
        explaind.open_run(less.run.path, model=less.run.model).gradients(2)


def test_a_wrong_penalty_is_found_where_samples_are_told_apart():
    kept = train(combined("penalty"), BATCHES[:2])
    wrong = explaind.open_run(kept.run.path, model=kept.run.model, penalty=lambda p: 0.2 * p["0.weight"].pow(2).sum())
    with pytest.raises(RecordingError, match="not that of its declared samples"):
        explaind.attribute(wrong, INPUTS, keep=("train",), progress=False)


# ---------------------------------------------------------------------- autocast
def under_autocast(tmp_path: Path, *, inside: bool = True, norm: bool = False) -> explaind.Run:
    features = combined("norm", "dropout") if norm else combined()
    model = network(features).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.7)
    loss = nn.CrossEntropyLoss()
    torch.manual_seed(3)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for step in BATCHES:
            optimizer.zero_grad()
            for k in step:
                batch, weight = torch.tensor(k), 1 / len(step)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    outputs = model(DATA[batch].float())
                    value = loss(outputs, TARGETS[batch]) if inside else None
                value = loss(outputs, TARGETS[batch]) if value is None else value
                (weight * value).backward()
                recorder.batch(DATA[batch].float(), TARGETS[batch], ids=batch, weight=weight)
            optimizer.step()
    return explaind.open_run(tmp_path / "run", model=model)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_met_to_the_last_bit_and_its_rounding_is_a_term(tmp_path, inside, norm):
    run = under_autocast(tmp_path, inside=inside, norm=norm)
    assert run.coarse
    results = [
        explaind.attribute(run, INPUTS.float(), keep=("layer", "train", "test"), nodes=4, strategy=s, progress=False)
        for s in ("adjoint", "features")
    ]
    for result in results:
        assert explaind.closure_error(result) < 1e-12
        assert result.attrs["gradient_factor"] == [1.0, 1.0]
        assert result.attrs["unattributed_gradient"] == 0  # the whole batch's gradient is the one that was fed
        # A sample's own gradient is rounded to 8 bits; of a loss in that precision, its cotangents are, too.
        bound = 0.02 if inside else 0.2
        assert 0 < float(abs(result.unattributed).max()) < bound * float(abs(result.kernel).max())
    np.testing.assert_allclose(results[0].kernel, results[1].kernel, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- chance that nobody recorded
class Chance(nn.Module):
    """Draws from numpy, whose state is nobody's business here."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + float(np.random.default_rng().normal())


def test_random_numbers_that_were_not_recorded_are_an_error(tmp_path):
    model, loss = Chance(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    targets = torch.zeros(SAMPLES, 2, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(DATA), targets).backward()
        recorder.batch(DATA, targets, ids=range(SAMPLES))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    with pytest.raises(RecordingError, match="depend on chance") as error:
        explaind.attribute(run, INPUTS, keep=("train",), nodes=1, progress=False)
    assert "torch's own generators" in error.value.remedy
