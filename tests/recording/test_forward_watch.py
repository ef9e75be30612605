"""How the model stood when a batch was passed through it, as the Recorder sees it; and clipping that it keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.recording.forward_watch import ForwardWatch
from explaind_core.training_step.forward_state import ForwardState


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))


X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.randn(8, 2)
loss = nn.MSELoss()


def record(path, model, body, make=lambda p: torch.optim.SGD(p, lr=0.1)):
    optimizer = make(model.parameters())
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        body(recorder, optimizer)
    return explaind.open_run(path, model=model)


def again(run, s, model):
    """The gradients of step s, computed again on a copy that stands as the model stood."""
    model.load_state_dict({**run.theta(s - 1), **run.buffers(s - 1)})
    model.zero_grad()
    for micro in run.batch(s).micro:
        with micro.forward.applied(model):
            (loss(model(micro.inputs), micro.targets) * micro.weight).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("first", ["pass", "batch"])
def test_gradients_with_dropout_and_batch_normalisation_are_computed_again(tmp_path, first):
    model = network()
    model[2].eval()

    def body(recorder, optimizer):
        for s in range(2):
            optimizer.zero_grad()
            for ids in torch.arange(8).split(3 if s else 8):
                torch.rand(5)  # augmentation
                if first == "batch":
                    recorder.batch(X[ids], Y[ids], ids=ids, weight=0.5)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=s == 1):
                    value = loss(model(X[ids]), Y[ids]) * 0.5
                value.backward()
                if first == "pass":
                    recorder.batch(X[ids], Y[ids], ids=ids, weight=0.5)
                with torch.no_grad():
                    model.eval()(X)
                model.train()[2].eval()
            optimizer.step()

    run = record(tmp_path / "run", model, body)
    assert [len(run.batch(s).micro) for s in run.steps] == [1, 3]
    for s in run.steps:
        for micro in run.batch(s).micro:
            assert micro.forward.training
            assert micro.forward.exceptions == ("2",)
            assert micro.forward.autocast == (None if s == 1 else "torch.bfloat16")
            assert list(micro.forward.rng) == ["cpu"]
    other = network()
    before = torch.get_rng_state()
    for s in run.steps:
        assert same(again(run, s, other), run.gradients(s))
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_randomness_keeps_no_random_state(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        loss(model(X), Y).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()

    run = record(tmp_path / "run", model, body)
    assert not run.batch(1).micro[0].forward.rng
    assert run.batch(1).micro[0].forward.training


def test_a_loss_that_draws_random_numbers_is_seen(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        (loss(model(X), Y) * torch.rand(())).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()

    state = record(tmp_path / "run", model, body).batch(1).micro[0].forward
    assert list(state.rng) == ["cpu"]
    assert state.rng["cpu"].dtype == torch.uint8


def test_without_a_pass_nothing_is_known(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        loss(nn.functional.linear(X, model.weight, model.bias), Y).backward()
        with torch.no_grad():
            model(X)
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
        model(X)  # of no batch
        optimizer.step() if recorder.batch(X, Y, ids=range(8)) else None
        optimizer.step()

    run = record(tmp_path / "run", model, body)
    assert run.batch(1).micro[0].forward is None
    assert run.batch(2).micro[0].forward is not None


def test_passes_that_belong_to_no_batch_are_not_guessed(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        recorder.batch(X, Y, ids=range(8))
        loss(model(X), Y).backward()
        recorder.batch(X, Y, ids=range(8))  # its pass is missing
        optimizer.step()

    assert [m.forward for m in record(tmp_path / "run", model, body).batch(1).micro] == [None, None]


@pytest.mark.parametrize("inside", [False, True])
def test_closures(tmp_path, inside):
    model = network()

    def body(recorder, optimizer):
        def closure():
            optimizer.zero_grad()
            value = loss(model(X), Y)
            value.backward()
            if inside:
                recorder.batch(X, Y, ids=range(8))
            return value

        for _ in range(2):
            if not inside:
                recorder.batch(X, Y, ids=range(8))
            optimizer.step(closure)

    run = record(tmp_path / "run", model, body)
    for s in run.steps:
        assert same(again(run, s, network()), run.gradients(s))


def test_containers_are_watched_through_their_children(tmp_path):
    parts = nn.ModuleList([nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))])

    def body(recorder, optimizer):
        loss(parts[1](parts[0](X)), Y).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()

    assert list(record(tmp_path / "run", parts, body).batch(1).micro[0].forward.rng) == ["cpu"]


def test_a_compiled_model_is_watched_from_outside():
    compiled = torch.compile(network(), backend="eager")
    watch = ForwardWatch(compiled)
    compiled(X)
    seen = watch.take()
    assert seen is not None
    assert list(seen.rng) == ["cpu"]
    inner = torch.compile(compiled._orig_mod, backend="eager", fullgraph=True)
    inner(X)  # hooks inside a graph do no harm


def test_copies_of_the_model_are_not_watched():
    model = network()
    watch = ForwardWatch(model)
    copy.deepcopy(model)(X)
    pickle.loads(pickle.dumps(model))(X)
    assert watch.take() is None
    model(X)
    assert watch.take() is not None


def test_the_hook_is_gone_when_recording_ends(tmp_path):
    model = nn.Linear(3, 2)
    record(tmp_path / "run", model, lambda *_: None)
    assert not model._forward_pre_hooks


def test_states_need_their_device_and_their_modules():
    state = ForwardState(training=True, rng={"cuda:99": torch.zeros(16, dtype=torch.uint8)})
    with pytest.raises(errors.StoreError, match="device that is not here"), state.applied(network()):
        pass
    with (
        pytest.raises(errors.StoreError, match="lacks a module"),
        ForwardState(training=True, exceptions=("head",)).applied(network()),
    ):
        pass


# ------------------------------------------------------------------ clipping, loss scales
def backward(model, factor=100.0):
    model.zero_grad()
    (loss(model(X), Y) * factor).backward()


@pytest.mark.parametrize(("norm_type", "max_norm"), [(2.0, 0.1), (float("inf"), 0.1), (2.0, 1e9)])
def test_clipping_by_norm_is_torchs_and_is_kept(tmp_path, norm_type, max_norm):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)

    def body(recorder, optimizer):
        backward(model)
        expected = [p.grad.clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        grads = [nn.Parameter(torch.zeros_like(g)) for g in expected]
        for p, g in zip(grads, expected, strict=True):
            p.grad = g
        wanted = nn.utils.clip_grad_norm_(grads, max_norm, norm_type)
        assert torch.equal(recorder.clip_grad_norm_(max_norm, norm_type), wanted)
        assert torch.equal(model.weight.grad, grads[0].grad)
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
        backward(model)
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()

    run = record(tmp_path / "run", model, body)
    assert run.clips(1) == (("norm", max_norm, norm_type),)
    assert run.clips(2) == ()
    assert (run.gradient_factor(1) < 1) == (max_norm < 1)
    assert run.gradient_factor(2) == 1
    model.load_state_dict(run.theta(0))
    backward(model)
    torch.testing.assert_close(run.gradients(1)["weight"], model.weight.grad * run.gradient_factor(1))


def test_clipping_by_value_and_clips_of_others_are_kept_in_order(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        backward(model)
        recorder.clip_grad_value_(0.5)
        assert float(model.weight.grad.abs().max()) == 0.5
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
        backward(model)
        found = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        recorder.clipped(norm=0.25, found=found, value=1)
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
        with pytest.raises(errors.RecordingError, match="a norm or a value"):
            recorder.clipped()

    run = record(tmp_path / "run", model, body)
    assert run.clips(1) == (("value", 0.5),)
    assert run.gradient_factor(1) == 1
    assert run.clips(2) == (("norm", 0.25, 2.0), ("value", 1.0))
    assert run.gradient_factor(2) < 1


def test_a_discarded_batch_takes_its_clips_and_passes_along(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        backward(model)
        recorder.clip_grad_norm_(0.1)
        recorder.discard_batch()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()

    run = record(tmp_path / "run", model, body)
    assert run.clips(1) == ()
    assert run.gradient_factor(1) == 1
    assert run.batch(1).micro[0].forward is None


def test_a_norm_that_is_not_finite_is_left_to_the_gradient_scaler_or_refused_at_the_step(tmp_path):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        backward(model, float("nan"))
        recorder.clip_grad_norm_(1.0)
        recorder.discard_batch()  # the scaler skips it
        backward(model, float("inf"))
        recorder.clip_grad_norm_(1.0)
        recorder.batch(X, Y, ids=range(8))
        with pytest.raises(errors.NonFiniteError, match="gradient is not finite"):
            optimizer.step()

    record(tmp_path / "run", model, body)


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_loss_is_kept(tmp_path, fused):
    model = nn.Linear(3, 2)

    def body(recorder, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(loss(model(X), Y)).backward()
        recorder.batch(X, Y, ids=range(8), **({} if fused else {"scale": scaler.get_scale()}))
        scaler.step(optimizer)

    run = record(tmp_path / "run", model, body, lambda p: torch.optim.SGD(p, lr=0.1, fused=fused))
    assert run.batch(1).micro[0].forward.scale == 4.0
