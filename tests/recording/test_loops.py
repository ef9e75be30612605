"""Ordinary training loops of all kinds: each is recorded, closes, and reads back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import explaind_core as explaind

N = 12


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator, dtype=dtype), torch.randint(3, (N,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def loop(recorder, model, optimizer, steps, *, before=lambda: None, after=lambda: None, start=0):
    inputs, targets = data()
    for s in range(start, start + steps):
        ids = torch.arange(s, s + 5) % N
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
        before()
        recorder.batch(inputs[ids], targets[ids], ids=ids)
        optimizer.step()
        after()


def closes(run, inputs=None):
    """Every update is explained, and so is a prediction."""
    for split in explaind.decompose(run):
        # A displacement is only known to the rounding of theta: at the end of a cycle steps are 1e-8 small.
        assert split.error < 1e-12 + split.rounding
        assert split.drift == 0
    inputs = data()[0] if inputs is None else inputs
    result = explaind.attribute(run, inputs, nodes=2, progress=False)
    assert explaind.closure_error(result) < 1e-12
    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def test_one_cycle_changes_learning_rate_and_betas(path):
    model = network()
    optimizer = adamw(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 8, after=scheduler.step)
    run = closes(explaind.open_run(path, model=model))
    assert len({run.hyper(s)[0]["lr"] for s in run.steps}) > 4
    assert len({run.hyper(s)[0]["betas"] for s in run.steps}) > 4


def test_groups_with_their_own_hyperparameters_and_a_group_that_joins_later(path):
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 3)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01, "weight_decay": 0.5})
        loop(recorder, model, optimizer, 3, start=3)
    run = closes(explaind.open_run(path, model=model))
    assert [len(run.hyper(s)) for s in run.steps] == [1, 1, 1, 2, 2, 2]
    assert torch.equal(run.theta(3)["2.weight"], run.theta(0)["2.weight"])
    assert not torch.equal(run.theta(4)["2.weight"], run.theta(0)["2.weight"])


def test_clipping_keeps_the_fed_gradient_and_its_factor(path):
    model = network()
    optimizer = adamw(model.parameters())
    norms = []

    with explaind.Recorder(path, model, optimizer) as recorder:

        def clip():
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            recorder.gradient_factor(min(1.0, 0.1 / (norms[-1] + 1e-6)))

        loop(recorder, model, optimizer, 4, before=clip)
    run = closes(explaind.open_run(path, model=model))
    fed = torch.cat([g.flatten() for g in run.gradients(2).values()]).norm()
    assert float(fed) == pytest.approx(0.1, rel=1e-4)
    assert run.gradient_factor(2) == pytest.approx(0.1 / norms[1], rel=1e-4)


def test_accumulation_over_micro_batches(path):
    model = network()
    optimizer = adamw(model.parameters())
    inputs, targets = data()
    with explaind.Recorder(path, model, optimizer) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            for ids in torch.arange(N).split(5):  # ragged: 5, 5, 2
                weight = len(ids) / N
                (weight * nn.functional.cross_entropy(model(inputs[ids]), targets[ids])).backward()
                recorder.batch(inputs[ids], targets[ids], ids=ids, weight=weight)
            optimizer.step()
    batch = closes(explaind.open_run(path, model=model)).batch(2)
    assert [m.weight for m in batch.micro] == [5 / N, 5 / N, 2 / N]
    assert batch.ids.tolist() == list(range(N))
    assert torch.equal(torch.cat([m.inputs for m in batch.micro]), inputs)


def test_a_closure(path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = data()

    def closure():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(inputs), targets)
        value.backward()
        return value

    with explaind.Recorder(path, model, optimizer) as recorder:
        for _ in range(3):
            recorder.batch(inputs, targets, ids=range(N))
            assert optimizer.step(closure) > 0
    closes(explaind.open_run(path, model=model))


def test_a_gradient_scaler_with_a_fused_optimizer(path):
    model = network().float()
    optimizer = adamw(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, targets = data(torch.float32)
    with explaind.Recorder(path, model, optimizer) as recorder:
        for s in range(4):
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(inputs), targets)
            scaler.scale(value * (float("inf") if s == 1 else 1.0)).backward()
            recorder.batch(inputs, targets, ids=range(N))
            scaler.step(optimizer)
            scaler.update()
    assert (recorder.steps, recorder.skipped) == (3, 1)
    run = explaind.open_run(path, model=model)
    with torch.no_grad():
        start = run.theta(0)
    named = {n: t.clone().requires_grad_() for n, t in start.items()}
    value = nn.functional.cross_entropy(torch.func.functional_call(model, named, (inputs,)), targets)
    for (name, _), gradient in zip(named.items(), torch.autograd.grad(value, list(named.values())), strict=True):
        torch.testing.assert_close(run.gradients(1)[name], gradient)  # unscaled
    assert max(split.error for split in explaind.decompose(run)) < 1e-4


def test_batch_norm_buffers_are_held_at_their_last_values(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    optimizer = adamw(model.parameters())
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 5)
    run = closes(explaind.open_run(path, model=model))
    torch.testing.assert_close(run.buffers()["1.running_mean"], model[1].running_mean)
    assert not torch.equal(run.buffers(2)["1.running_mean"], run.buffers(3)["1.running_mean"])
    assert float(run.buffers(0)["1.num_batches_tracked"]) == 0
    result = explaind.attribute(run, data()[0], nodes=1, progress=False)
    np.testing.assert_allclose(result.final.values, model.eval()(data()[0]).detach().numpy(), rtol=1e-12)


class Tied(nn.Module):
    """A model with a tied weight, a frozen parameter, one that gets no gradient, and keyword inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4, sparse=True)
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, tokens, mask):
        mean = (self.embedding(tokens) * mask.unsqueeze(-1)).sum(1)
        return self.decoder(torch.tanh(self.encoder(mean))) * self.frozen


def test_tied_frozen_unused_and_sparse_parameters_with_keyword_inputs(path):
    model = Tied().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"tokens": torch.randint(7, (6, 3)), "mask": torch.ones(6, 3, dtype=torch.float64)}
    with explaind.Recorder(path, model, optimizer) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).square().mean().backward()
            recorder.batch(batch, None, ids=[3, 3, 1, 0, 2, 2])
            optimizer.step()
    run = closes(explaind.open_run(path, model=Tied().double()), batch)
    assert "decoder.weight" not in run.parameters
    assert run.gradients(1)["embedding.weight"].is_sparse
    assert "unused" not in run.gradients(1)
    assert torch.equal(run.batch(1).inputs["tokens"], batch["tokens"])
    assert len(list((path / "batches").iterdir())) == 1  # three equal batches, stored once


def test_a_learning_rate_kept_as_a_tensor(path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01, dtype=torch.float64))
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 3)
    run = closes(explaind.open_run(path, model=model))
    assert run.hyper(1)[0]["lr"] == 0.01


def test_an_interrupted_training_continues_as_if_nothing_had_happened(tmp_path):
    def train(path, pieces):
        done = 0
        for steps in pieces:
            model = network()  # a new process would start from scratch
            optimizer = adamw(model.parameters(), weight_decay=0.1)
            if done:
                explaind.open_run(path, model=model).restore(model, optimizer)
            recorder = explaind.Recorder(path, model, optimizer, resume=done > 0, snapshot_every=3)
            loop(recorder, model, optimizer, steps, start=done)
            done += steps
            recorder.stop() if done < sum(pieces) else recorder.close()
        return closes(explaind.open_run(path, model=model))

    whole, pieces = train(tmp_path / "whole", [9]), train(tmp_path / "pieces", [4, 1, 4])
    for name, value in whole.theta(9).items():
        assert torch.equal(value, pieces.theta(9)[name])


def test_resuming_from_somewhere_else_is_refused(path):
    model = network()
    optimizer = adamw(model.parameters())
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 2)
    fresh = network()
    with pytest.raises(explaind.errors.RecordingError, match=r"does not stand where step 2[\s\S]*restore"):
        explaind.Recorder(path, fresh, adamw(fresh.parameters()), resume=True)


def test_metrics_are_kept_with_their_steps_and_a_torn_line_is_passed_over(path):
    model = network()
    optimizer = adamw(model.parameters())
    with explaind.Recorder(path, model, optimizer) as recorder:
        loop(recorder, model, optimizer, 3, after=lambda: recorder.log(twice=2 * recorder.steps))
        recorder.log(last=1.0)
    (path / "closed.json").unlink()  # a run that was ended in order has no torn line
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "torn')
    metrics = explaind.open_run(path).metrics
    assert metrics.twice.values.tolist() == [2, 4, 6]
    assert np.isnan(metrics["last"].values[:2]).all()


def test_an_exception_in_the_loop_ends_the_recording_but_not_the_run(path):
    model = network()
    optimizer = adamw(model.parameters())

    def interrupted():
        with explaind.Recorder(path, model, optimizer) as recorder:
            loop(recorder, model, optimizer, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    run = explaind.open_run(path, model=model)
    assert (len(run.steps), run.complete) == (2, False)
    optimizer.step()  # the recorder has let go of it
    assert len(explaind.open_run(path).steps) == 2
