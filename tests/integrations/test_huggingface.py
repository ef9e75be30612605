"""The Hugging Face Trainer, recorded by a callback: real training loops on a tiny BERT, in double precision."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from transformers import Trainer

import explaind_core as explaind
from explaind_core import errors
from explaind_core.data import IndexedDataset
from explaind_core.integrations.huggingface import RecorderCallback, returning_logits
from explaind_core.training_step.transformers_losses import loss_of
from support.huggingface_training import Sequences, arguments, pad, tiny


def train(tmp_path, model=None, callback=None, data=None, trainer=Trainer, more=None, **options):
    model = tiny() if model is None else model
    trainer = trainer(
        model, arguments(tmp_path, **options), train_dataset=data or Sequences(), data_collator=pad,
        callbacks=[callback] if callback else [], **(more or {}),
    )  # fmt: skip
    trainer.train()
    return model


def expected_gradients(run, s, loss):
    """Of the declared batches, by plain backward passes."""
    theta = run.theta(s - 1)
    model = tiny(theta["classifier.bias"].dtype)
    model.load_state_dict(theta, strict=False)
    for micro in run.batch(s).micro:
        (micro.weight * loss(model(**micro.inputs).logits, micro.targets)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def check_gradients(run, loss=nn.functional.cross_entropy, clip=None):
    for s in run.steps:
        expected, found = expected_gradients(run, s, loss), run.gradients(s)
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        close = {"rtol": 1e-10, "atol": 1e-14} if norm.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-7}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], factor * gradient, **close)
        assert run.clips(s) == (() if clip is None else (("norm", clip, 2.0),))


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "lr_scheduler_type": "cosine"},
    "workers": {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2},
    "sgd": {"remove_unused_columns": False, "optim": "sgd", "dataloader_drop_last": True, "max_grad_norm": 0.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_what_the_trainer_fed_is_the_gradient_of_the_recorded_batches(tmp_path, options):
    callback = RecorderCallback(tmp_path / "run")
    model = train(tmp_path, callback=callback, **options)
    run = explaind.open_run(tmp_path / "run", model=returning_logits(model))
    assert run.complete
    data, size = Sequences(), 4
    per_step = options.get("gradient_accumulation_steps", 1)
    batches = 3 if options.get("dataloader_drop_last") else 4
    assert len(run.steps) == 2 * -(-batches // per_step)
    for epoch in torch.cat([run.sample_ids(s) for s in run.steps]).split(min(13, batches * size)):
        assert len(set(epoch.tolist())) == len(epoch)  # every sample at most once an epoch
    for s in run.steps:
        for micro in run.batch(s).micro:
            batch = pad([data[i] for i in micro.ids.tolist()])
            assert torch.equal(micro.targets, batch["labels"])
            assert micro.inputs.keys() == {"input_ids", "attention_mask"}
            assert all(torch.equal(value, batch[name]) for name, value in micro.inputs.items())
    check_gradients(run, clip=options.get("max_grad_norm", 1.0) or None)
    # Recording changes nothing.
    alone = train(tmp_path, **options)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, run.theta(len(run.steps))[name])


class Halved(Trainer):
    """A loss of one's own."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = weighted(output.logits, labels) / 2
        return (loss, output) if return_outputs else loss


def weighted(logits, labels):
    return nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0]).to(logits))


def smoothed(logits, labels):
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


LOSSES = {
    "own": (weighted, {"trainer": Halved}, torch.float64),
    "function": (
        weighted,
        {"more": {"compute_loss_func": lambda output, labels, **_: 5 * weighted(output.logits, labels)}},
        torch.float64,
    ),
    "smoothed": (smoothed, {"label_smoothing_factor": 0.1}, torch.float32),
}


@pytest.mark.parametrize(("loss", "options", "dtype"), LOSSES.values(), ids=LOSSES)
def test_losses_that_the_model_does_not_compute(tmp_path, loss, options, dtype):
    callback = RecorderCallback(tmp_path / "run", loss)
    model = train(tmp_path, tiny(dtype), callback, gradient_accumulation_steps=2, num_train_epochs=1, **options)
    run = explaind.open_run(tmp_path / "run", model=returning_logits(model), loss=loss)
    check_gradients(run, loss, 1.0)
    if loss is weighted:
        # The Trainer does not divide by the accumulated batches: it trusts a compute_loss_func, and any model with
        # **kwargs, to have counted the items of all of them.
        scale = 5.0 if "more" in options else 0.5
        assert [m.weight for m in run.batch(1).micro] == pytest.approx([scale, scale], rel=1e-12)
    with pytest.raises(errors.RecordingError, match="not the one that the model was trained on"):
        train(tmp_path, tiny(dtype), RecorderCallback(tmp_path / "other"), num_train_epochs=1, **options)


def test_questions_to_a_run_of_the_trainer(tmp_path):
    train(tmp_path, callback=RecorderCallback(tmp_path / "run"), gradient_accumulation_steps=2, learning_rate=1e-3)
    run = explaind.open_run(tmp_path / "run", model=returning_logits(tiny()))
    batch = pad([Sequences()[i] for i in range(6)])
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    check = explaind.verify(run, inputs, nodes=4, progress=False)
    assert check.update_error < 1e-12
    assert check.max_error < 1e-6
    assert check.agreement == 1.0
    result = explaind.attribute(
        run, inputs, keep=("train", "layer", "test"), output=explaind.Chosen(batch["labels"]), nodes=4, progress=False
    )
    assert explaind.closure_error(result) < 1e-12
    assert result.sizes["train"] == 13
    summed = explaind.attribute(
        run, inputs, keep=("layer", "test"), output=explaind.Chosen(batch["labels"]), nodes=4, progress=False
    )
    error = abs(result.kernel.sum("train") - summed.kernel).max() / abs(summed.kernel).max()
    assert float(error) < 1e-10
    by_loss = explaind.attribute(
        run, inputs, keep=("step", "test"), output=explaind.Loss(batch["labels"]), nodes=4, progress=False
    )
    assert explaind.closure_error(by_loss) < 1e-12


def test_autocast_is_seen_and_weights_are_exact(tmp_path):
    model = train(
        tmp_path, tiny(torch.float32), RecorderCallback(tmp_path / "run"), bf16=True, gradient_accumulation_steps=2,
        max_grad_norm=0.0,
    )  # fmt: skip
    run = explaind.open_run(tmp_path / "run", model=returning_logits(model))
    other = returning_logits(tiny(torch.float32))
    for s in run.steps:
        other.load_state_dict(run.theta(s - 1), strict=False)
        other.zero_grad()
        for micro in run.batch(s).micro:
            assert micro.weight == 1.0  # BERT takes loss keywords, and pays them no attention
            assert micro.forward.autocast == "torch.bfloat16"
            with micro.forward.applied(other):
                run.loss(other(**micro.inputs), micro.targets).backward()
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter.grad, run.gradients(s)[name])


def test_dropout_is_kept_as_a_random_state(tmp_path):
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    train(tmp_path, model, RecorderCallback(tmp_path / "run"), max_grad_norm=0.0, num_train_epochs=1)
    run = explaind.open_run(tmp_path / "run", model=model)
    model.load_state_dict(run.theta(0), strict=False)
    [micro] = run.batch(1).micro
    model.zero_grad()
    with micro.forward.applied(model):
        run.loss(model(**micro.inputs), micro.targets).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, run.gradients(1)[name])
    run = explaind.open_run(tmp_path / "run", model=returning_logits(model))
    batch = pad([Sequences()[i] for i in range(2)])
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    result = explaind.attribute(
        run, inputs, keep=("train", "test"), output=explaind.Chosen(batch["labels"]), nodes=2, progress=False
    )
    assert result.sizes["train"] == 13
    assert explaind.closure_error(result) < 1e-12


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=["plain", "bf16"])
def test_runs_that_are_computed_again(tmp_path, options):
    runs = {}
    for mode in ("steps", "snapshots"):
        train(tmp_path, tiny(torch.float32), RecorderCallback(tmp_path / mode, mode=mode), **options)
        runs[mode] = explaind.open_run(tmp_path / mode, model=returning_logits(tiny(torch.float32)))
    for s in runs["steps"].steps:
        for name, gradient in runs["steps"].gradients(s).items():
            assert torch.equal(gradient, runs["snapshots"].gradients(s)[name])


@pytest.mark.parametrize("mode", ["steps", "snapshots"])
def test_inputs_that_are_read_again(tmp_path, mode):
    train(tmp_path, callback=RecorderCallback(tmp_path / "stored"))
    train(tmp_path, callback=RecorderCallback(tmp_path / "again", inputs="reread", mode=mode))
    assert not (tmp_path / "again" / "batches").exists()
    dataset = IndexedDataset(Sequences(), collate=pad, targets="labels")
    stored = explaind.open_run(tmp_path / "stored", model=tiny())
    again = explaind.open_run(tmp_path / "again", model=tiny(), dataset=dataset)
    for s in stored.steps:
        one, other = stored.batch(s), again.batch(s)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.targets, other.targets)
        assert all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
        assert all(torch.equal(value, again.theta(s)[name]) for name, value in stored.theta(s).items())


class Stop(transformers.TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.at


@pytest.mark.parametrize("lost", [0, 2])
def test_training_resumes_from_a_checkpoint(tmp_path, lost):
    data, whole, part = Sequences(), tmp_path / "whole", tmp_path / "part"
    train(tmp_path, callback=RecorderCallback(whole), lr_scheduler_type="linear")
    # Steps after the last checkpoint: the training goes on before them.
    settings = arguments(tmp_path, save_strategy="steps", save_steps=5 - lost, lr_scheduler_type="linear")
    for at, resume in ((5, False), (None, True)):
        callback = RecorderCallback(part, resume=resume)
        trainer = Trainer(
            tiny(), settings, train_dataset=data, data_collator=pad, callbacks=[callback] + ([Stop(at)] if at else [])
        )
        trainer.train(resume_from_checkpoint=resume)
        assert callback.recorder.steps == (at or 8)
    expected, found = (explaind.open_run(path, model=tiny()) for path in (whole, part))
    assert found.complete
    for s in expected.steps:
        assert torch.equal(expected.sample_ids(s), found.sample_ids(s))
        assert found.hyper(s)[0]["lr"] == expected.hyper(s)[0]["lr"]
        assert all(torch.equal(t, found.theta(s)[n]) for n, t in expected.theta(s).items())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ({**row, "number": 100 + i} for i, row in enumerate(Sequences().rows))


def keep_number(rows):
    return {**pad(rows), "number": torch.tensor([row["number"] for row in rows])}


def test_ids_from_a_column_of_the_data(tmp_path):
    def run_with(callback, **options):
        settings = arguments(tmp_path, max_steps=3, **options)
        Trainer(tiny(), settings, train_dataset=Stream(), data_collator=keep_number, callbacks=[callback]).train()

    run_with(RecorderCallback(tmp_path / "run", id_column="number"), remove_unused_columns=False)
    run = explaind.open_run(tmp_path / "run", model=tiny())
    assert torch.cat([run.sample_ids(s) for s in run.steps]).tolist() == list(range(100, 112))
    check_gradients(run, clip=1.0)
    with pytest.raises(errors.RecordingError, match="iterable dataset"):
        run_with(RecorderCallback(tmp_path / "other"), remove_unused_columns=False)
    with pytest.raises(errors.RecordingError, match="samples are not named") as refused:
        run_with(RecorderCallback(tmp_path / "other", id_column="nothing"), remove_unused_columns=False)
    assert "remove_unused_columns=False" in str(refused.value)


class Twice(Trainer):
    """Calls the model twice on a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        return model(**inputs)["loss"] + model(**inputs)["loss"]


def test_what_cannot_be_recorded_is_refused(tmp_path):
    with pytest.raises(errors.RecordingError, match="not exactly one call") as refused:
        train(tmp_path, callback=RecorderCallback(tmp_path / "a"), trainer=Twice)
    assert "step 1" in str(refused.value)
    with pytest.raises(errors.RecordingError, match="not the one that the model was trained on"):
        train(tmp_path, callback=RecorderCallback(tmp_path / "b", lambda logits, _: logits.square().mean()))
    with pytest.raises(errors.RecordingError, match="has no targets"):
        train(tmp_path, callback=RecorderCallback(tmp_path / "c", targets="answers"))
    for option in ({"fp16": True}, {"torch_compile": True}, {"deepspeed": "x"}, {"n_gpu": 2}, {"world_size": 2}):
        plain = {"world_size": 1, "n_gpu": 1, "deepspeed": None, "fsdp": None, "torch_compile": False, "fp16": False}
        with pytest.raises(errors.RecordingError, match="cannot be recorded by the callback"):
            RecorderCallback(tmp_path / "d").on_train_begin(
                SimpleNamespace(**{**plain, **option}), None, None, model=tiny(), train_dataloader=None
            )
    with pytest.raises(errors.RecordingError, match="which loss"):
        loss_of(transformers.BertModel(tiny().config))
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(errors.RecordingError, match="which loss"):  # its own, not shifted
        loss_of(transformers.T5ForConditionalGeneration(config))


def test_a_callback_records_again_after_an_interruption(tmp_path):
    class Broken(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    callback, model = RecorderCallback(tmp_path / "run", overwrite=True), tiny()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model, callback, trainer=Broken)
    run = explaind.open_run(tmp_path / "run", model=model)
    assert not run.complete
    assert len(run.steps) == 2
    train(tmp_path, model, callback, num_train_epochs=1)
    run = explaind.open_run(tmp_path / "run", model=model)
    assert run.complete
    check_gradients(run, clip=1.0)
