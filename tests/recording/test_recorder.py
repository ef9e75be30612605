"""Corners of recording: shared memory, tensors as hyper-parameters, closures, scalers, restoring and resuming."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from support.stepped_loop import Loop, N


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def closes(path, **options):
    run = explaind.open_run(path, **options)
    for step in explaind.decompose(run):
        assert step.drift == 0
        # theta is rounded twice at most, by its decay and by its update: 2 eps |theta| in all.
        assert step.error <= 1e-12 + 2 * step.rounding
    return run


# ------------------------------------------------------------------ batches
@pytest.mark.parametrize("pair", [lambda x: (x, x), lambda x: (x[:-1], x[1:]), lambda x: (x[:1].expand(4, 3), x[:4])])
def test_inputs_and_targets_may_share_memory(path, pair):
    loop = Loop()
    inputs, targets = pair(loop.x)
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.backward()
        recorder.batch(inputs, targets, ids=range(len(inputs)))
        loop.optimizer.step()
    batch = explaind.open_run(path).batch(1)
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(batch.targets, targets)


def test_a_batch_that_is_overwritten_later_is_kept_as_it_was_declared(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        buffer = loop.x.clone()
        loop.backward()
        recorder.batch(buffer, None, ids=range(N))
        buffer.zero_()  # a loader that reuses its memory
        loop.optimizer.step()
    assert torch.equal(explaind.open_run(path).batch(1).inputs, loop.x)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_inputs_may_have_any_dtype(path, dtype):
    loop = Loop()
    inputs = torch.arange(N).to(dtype)
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.backward()
        recorder.batch(inputs, None, ids=range(N))
        loop.optimizer.step()
    assert torch.equal(explaind.open_run(path).batch(1).inputs, inputs)


def test_containers_keep_their_kind(path):
    loop = Loop()
    inputs = ({"tokens": loop.x, "length": 3}, [loop.y, None])
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.backward()
        recorder.batch(inputs, (loop.y,), ids=range(N))
        loop.optimizer.step()
    batch = explaind.open_run(path).batch(1)
    assert isinstance(batch.inputs, tuple)
    assert isinstance(batch.inputs[1], list)
    assert batch.inputs[0]["length"] == 3
    assert batch.inputs[1][1] is None
    assert isinstance(batch.targets, tuple)


def test_several_micro_batches_have_no_single_input(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.backward()
        recorder.batch(loop.x[:2], None, ids=[0, 1], weight=0.5)
        recorder.batch(loop.x[2:4], None, ids=[2, 3], weight=0.5)
        loop.optimizer.step()
    batch = explaind.open_run(path).batch(1)
    assert batch.ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(errors.QuestionError, match=r"2 micro-batches[\s\S]*\.micro"):
        _ = batch.inputs


def test_gradient_factors_multiply_and_last_one_step(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        recorder.gradient_factor(0.5)
        recorder.gradient_factor(0.5)
        loop.steps(recorder, 1, 2)
    run = explaind.open_run(path)
    assert [run.gradient_factor(s) for s in run.steps] == [0.25, 1.0]


# ------------------------------------------------------------------ optimizers
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_a_tensor_as_learning_rate_is_replayed_as_a_tensor(path, kind, options):
    loop = Loop(lambda p: kind(p, lr=torch.tensor(0.1), **options))  # float32: rounded otherwise than a number
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        for s in range(3):
            loop.optimizer.param_groups[0]["lr"].mul_(0.5)  # in place, as schedulers do
            loop.steps(recorder, s, s)
    run = explaind.open_run(path)
    assert [run.hyper(s)[0]["lr"] for s in run.steps] == pytest.approx([0.05, 0.025, 0.0125])
    for step in explaind.decompose(run):
        assert step.drift == 0
        assert step.error < 1e-6  # torch computes parts of the step size in the learning rate's float32


def test_named_parameters_are_known_by_the_models_names(path):
    loop = Loop(lambda p: torch.optim.SGD([(f"other {i}", q) for i, q in enumerate(p)], lr=0.1))
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 2)
    assert closes(path).hyper(1)[0]["params"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_what_a_scheduler_leaves_in_a_group_is_no_obstacle(path):
    loop = Loop()
    loop.optimizer.param_groups[0]["callback"] = print
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 2)
    assert closes(path).hyper(1)[0]["callback"].startswith("<builtin")


def test_a_step_scheduler_is_seen_before_each_step(path):
    loop = Loop()
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, step_size=2, gamma=0.5)
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        for s in range(4):
            loop.steps(recorder, s, s)
            scheduler.step()
    run = closes(path)
    assert [run.hyper(s)[0]["lr"] for s in run.steps] == [0.05, 0.05, 0.025, 0.025]


def test_momentum_of_sparse_gradients_survives_snapshots(path):
    torch.manual_seed(0)
    model = nn.Embedding(6, 2, sparse=True).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tokens = torch.tensor([0, 1, 1, 4])
    for name in ("first", "second"):  # the second one starts with a used, sparse buffer
        with explaind.Recorder(path / name, model, optimizer, snapshot_every=1) as recorder:
            for _ in range(3):
                optimizer.zero_grad()
                model(tokens).square().sum().backward()
                recorder.batch(tokens, None, ids=range(4))
                optimizer.step()
        assert closes(path / name).gradients(1)["weight"].is_sparse


def test_a_scaler_that_skips_a_step_behind_the_recorders_back(path):
    loop = Loop(lambda p: torch.optim.SGD(p, lr=0.1), dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        for s, factor in enumerate([1.0, float("inf"), 1.0]):
            loop.optimizer.zero_grad()
            scaler.scale(factor * loop.model(loop.x).square().mean()).backward()
            recorder.batch(loop.x + s, None, ids=range(N))
            made = recorder.steps
            scaler.step(loop.optimizer)
            if recorder.steps == made:
                recorder.discard_batch()
            scaler.update()
    run = explaind.open_run(path)
    assert len(run.steps) == 2
    assert torch.equal(run.batch(2).inputs, loop.x + 2)


def test_a_closure_may_declare_its_batch_itself(path):
    loop = Loop(lambda p: torch.optim.SGD(p, lr=0.1))
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:

        def closure():
            ids, value = loop.backward()
            recorder.batch(loop.x[ids], loop.y[ids], ids=ids)
            return value

        assert loop.optimizer.step(closure=closure) > 0
    closes(path)


def test_a_live_loss_can_be_logged(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder, warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.steps(recorder, 1, 1)
        _, value = loop.backward()
        recorder.log(loss=value, accuracy=torch.tensor(0.5), epoch=1)
    metrics = explaind.open_run(path).metrics
    assert float(metrics.loss[0]) == pytest.approx(value.item(), rel=1e-12)


# ------------------------------------------------------------------ restoring and resuming
@pytest.mark.parametrize("stop", [0, 2, 3, 4])
def test_a_restored_run_trains_on_bitwise_as_if_it_had_not_stopped(path, stop):
    through, again = Loop(), Loop()
    with explaind.Recorder(path, through.model, through.optimizer, snapshot_every=3) as recorder:
        through.steps(recorder, 1, 6)
    again.steps(type("Nobody", (), {"batch": lambda *_, **__: None}), 1, 5)  # used, and standing elsewhere
    assert explaind.open_run(path).restore(again.model, again.optimizer, stop) == stop
    again.steps(type("Nobody", (), {"batch": lambda *_, **__: None}), stop + 1, 6)
    assert again.same_weights(through)


def test_metrics_go_on_behind_a_torn_line(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 2)
        recorder.log(loss=2.0)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with explaind.Recorder(path, loop.model, loop.optimizer, resume=True) as recorder:
        loop.steps(recorder, 3, 3)
        recorder.log(loss=1.0)
    assert explaind.open_run(path).metrics.loss.values.tolist() == [2.0, 1.0]


def test_resuming_reopens_a_closed_run(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 2)
    assert closes(path).complete
    recorder = explaind.Recorder(path, loop.model, loop.optimizer, resume=True)
    assert recorder.steps == 2
    assert not explaind.open_run(path).complete
    loop.steps(recorder, 3, 4)
    recorder.close()
    assert (len(closes(path).steps), explaind.open_run(path).complete) == (4, True)


def test_overwriting_starts_anew(path):
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 3)
        recorder.log(loss=1.0)
    with explaind.Recorder(path, loop.model, loop.optimizer, overwrite=True) as recorder:
        loop.steps(recorder, 1, 1)
    run = closes(path)
    assert len(run.steps) == 1
    assert not run.metrics.sizes.get("step")


def test_an_empty_folder_is_free(path):
    path.mkdir()
    loop = Loop()
    with explaind.Recorder(path, loop.model, loop.optimizer) as recorder:
        loop.steps(recorder, 1, 1)
    closes(path)


def test_a_run_is_resumed_behind_an_earlier_step(tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Linear(2, 1).double()

    inputs, targets, loss = torch.randn(4, 2).double(), torch.randn(4, 1).double(), torch.nn.MSELoss()

    def record(model, optimizer, steps, **options):
        with explaind.Recorder(tmp_path / "run", model, optimizer, loss, snapshot_every=2, **options) as recorder:
            for _ in range(steps):
                optimizer.zero_grad()
                loss(model(inputs), targets).backward()
                recorder.batch(inputs, targets, ids=range(4))
                optimizer.step()
                recorder.log(number=recorder.steps)

    def fresh():
        model = network()
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    record(*fresh(), 7)
    run = explaind.open_run(tmp_path / "run", model=network())
    expected = [run.theta(s)["weight"] for s in range(8)]
    model, optimizer = fresh()
    run.restore(model, optimizer, 4)
    with pytest.raises(errors.RecordingError, match="does not stand where step 5"):
        record(model, optimizer, 1, resume=5)
    assert len(explaind.open_run(tmp_path / "run").steps) == 7  # nothing was deleted
    record(model, optimizer, 2, resume=4)
    run = explaind.open_run(tmp_path / "run", model=network())
    assert (len(run.steps), run.snapshots(), run.complete) == (6, [0, 2, 4, 6], True)
    assert all(torch.equal(run.theta(s)["weight"], expected[s]) for s in range(7))
    assert run.metrics.step.values.tolist() == list(range(1, 7))
