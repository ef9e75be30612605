"""The Lightning Trainer, recorded by a callback: an MLP on scikit-learn's digits, with workers."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explaind_core as explaind
from explaind_core import errors
from explaind_core.data import IndexedDataset
from explaind_core.integrations.lightning import RecorderCallback, named

# Advice on the number of workers and on loggers, which are turned off.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


def digits(dtype=torch.float64, n=200):
    found = load_digits(n_class=4)
    inputs, targets = torch.tensor(found.data[:n] / 16, dtype=dtype), torch.tensor(found.target[:n])
    return TensorDataset(inputs, targets)


class Digits(pl.LightningModule):
    def __init__(self, optimizer=torch.optim.AdamW, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        self.optimizer, self.options = optimizer, {"lr": 1e-2, **options}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).double().mean())

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), **self.options)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


def fit(tmp_path, module, callback=None, loader=None, validate=False, ckpt=None, **options):
    torch.manual_seed(4)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
            "callbacks": [callback] if callback else [], **options,
        }
    )  # fmt: skip
    loader = DataLoader(digits(), batch_size=60, shuffle=True) if loader is None else loader
    trainer.fit(module, loader, DataLoader(digits(), batch_size=100) if validate else None, ckpt_path=ckpt)
    return trainer


def check_gradients(run, module, clip=None, value=None, loss=nn.functional.cross_entropy, **close):
    other = type(module)() if not isinstance(module, nn.Sequential) else module
    for s in run.steps:
        other.load_state_dict(run.theta(s - 1))
        other.zero_grad()
        for micro in run.batch(s).micro:
            (micro.weight * loss(other(micro.inputs), micro.targets)).backward()
        if clip:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        if value:
            nn.utils.clip_grad_value_(other.parameters(), value)
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(
                run.gradients(s)[name], parameter.grad, **{"rtol": 1e-10, "atol": 1e-14, **close}
            )


CASES = {
    "workers": ({}, {"num_workers": 2}, {}),
    "accumulation": ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}, {}, {"clip": 0.05}),
    "by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"drop_last": True}, {"value": 0.01}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "loading", "clipping"), CASES.values(), ids=CASES)
def test_what_lightning_fed_is_the_gradient_of_the_recorded_batches(tmp_path, options, loading, clipping):
    def loader():
        return DataLoader(digits(), batch_size=60, shuffle=True, **loading)

    loss = nn.CrossEntropyLoss()
    module = Digits()
    fit(tmp_path, module, RecorderCallback(tmp_path / "run", loss), named(loader()), validate=True, **options)
    run = explaind.open_run(tmp_path / "run", model=Digits())
    assert run.complete
    per_epoch = 3 if loading.get("drop_last") else 4
    per_step = options.get("accumulate_grad_batches", 1)
    assert len(run.steps) == 2 * -(-per_epoch // per_step)
    data = digits()
    for s in run.steps:
        for micro in run.batch(s).micro:
            inputs, targets = data[micro.ids]
            assert torch.equal(micro.inputs, inputs)
            assert torch.equal(micro.targets, targets)
            assert micro.weight == 1 / per_step
    sizes = [len(run.sample_ids(s)) for s in run.steps]
    assert sum(sizes) == 2 * (180 if loading.get("drop_last") else 200)
    check_gradients(run, module, **clipping)
    assert [run.hyper(s)[0]["lr"] for s in (1, len(run.steps))] == [1e-2, 5e-3]
    kinds = {"clip": [("norm", 0.05, 2.0)], "value": [("value", 0.01)]}
    assert list(run.clips(1)) == [c for kind in clipping for c in kinds[kind]]
    if "clip" in clipping:
        assert run.gradient_factor(1) < 1
    # Recording changes nothing, and leaves nothing behind.
    alone = Digits()
    fit(tmp_path, alone, None, loader(), validate=True, **options)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, run.theta(len(run.steps))[name])
    assert "training_step" not in vars(module)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_questions_to_a_run_of_lightning(tmp_path):
    fit(tmp_path, Digits(), RecorderCallback(tmp_path / "run", nn.CrossEntropyLoss()), named(DataLoader(digits(), 60)))
    run = explaind.open_run(tmp_path / "run", model=Digits())
    inputs, targets = digits()[:5]
    check = explaind.verify(run, inputs, nodes=4, progress=False)
    assert check.update_error < 1e-12
    assert check.max_error < 1e-5
    result = explaind.attribute(
        run, inputs, keep=("train", "layer", "test"), output=explaind.Chosen(targets), nodes=4, progress=False
    )
    assert result.layer.values.tolist() == ["net.0", "net.2"]
    assert result.sizes["train"] == 200
    assert explaind.closure_error(result) < 1e-12


class Net(Digits):
    """Calls a part of itself, on batches that are mappings, with a loss of its own scale."""

    def training_step(self, batch, batch_idx):
        return {"loss": 3 * nn.functional.cross_entropy(self.net(2 * batch["x"]), batch["y"])}


def test_a_submodule_and_batches_that_are_mappings(tmp_path):
    inputs, targets = digits().tensors
    data = [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]
    callback = RecorderCallback(tmp_path / "run", nn.CrossEntropyLoss(), module="net", targets="y")
    fit(tmp_path, Net(), callback, named(DataLoader(data, batch_size=100)), max_epochs=1)
    run = explaind.open_run(tmp_path / "run", model=Net().net)
    assert list(run.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(run.batch(1).inputs, 2 * inputs[:100])  # as the model saw them
    assert [run.batch(s).micro[0].weight for s in run.steps] == pytest.approx([3.0, 3.0], rel=1e-14)
    check_gradients(run, Net().net)
    callback = RecorderCallback(tmp_path / "other", nn.CrossEntropyLoss(), targets="y")
    with pytest.raises(errors.RecordingError, match="not exactly one call") as refused:
        fit(tmp_path, Net(), callback, named(DataLoader(data, batch_size=100)), max_epochs=1)
    assert "module='net'" in str(refused.value)


class Manual(Digits):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        x, y = batch
        self.manual_backward(nn.functional.cross_entropy(self(x), y))
        optimizer.step()


def test_manual_optimization_and_closures_that_run_again(tmp_path):
    fit(tmp_path, Manual(), RecorderCallback(tmp_path / "run", nn.CrossEntropyLoss()), named(DataLoader(digits(), 60)))
    run = explaind.open_run(tmp_path / "run", model=Manual())
    assert len(run.steps) == 8
    check_gradients(run, Manual())
    module = Digits(torch.optim.LBFGS, max_iter=3, max_eval=9)
    callback = RecorderCallback(tmp_path / "lbfgs", nn.CrossEntropyLoss())
    fit(tmp_path, module, callback, named(DataLoader(digits(), 100)), max_epochs=1)
    run = explaind.open_run(tmp_path / "lbfgs", model=Digits())
    assert len(run.steps) == 6
    assert run.sample_ids(1).tolist() == run.sample_ids(3).tolist() == list(range(100))
    check_gradients(run, Digits())


def test_mixed_precision(tmp_path):
    data = digits(torch.float32)
    callback = RecorderCallback(tmp_path / "run", nn.CrossEntropyLoss())
    fit(
        tmp_path, Digits().float(), callback, named(DataLoader(data, 60)), precision="bf16-mixed",
        accumulate_grad_batches=3,
    )  # fmt: skip
    run = explaind.open_run(tmp_path / "run", model=Digits().float())
    other = Digits().float()
    for s in run.steps:
        other.load_state_dict(run.theta(s - 1))
        other.zero_grad()
        for micro in run.batch(s).micro:
            assert micro.forward.autocast == "torch.bfloat16"
            assert micro.weight == 1 / 3
            with micro.forward.applied(other):
                value = run.loss(other(micro.inputs), micro.targets)
            (value / 3).backward()
        for name, parameter in other.named_parameters():
            assert torch.equal(run.gradients(s)[name], parameter.grad)


def test_runs_that_are_computed_again(tmp_path):
    loss = nn.CrossEntropyLoss()
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}
    runs = {}
    for mode in ("steps", "parameters", "snapshots"):
        callback = RecorderCallback(tmp_path / mode, loss, mode=mode)
        fit(tmp_path, Digits(), callback, named(DataLoader(digits(), 60)), **options)
        runs[mode] = explaind.open_run(tmp_path / mode, model=Digits())
    for s in runs["steps"].steps:
        for name, gradient in runs["steps"].gradients(s).items():
            assert torch.equal(gradient, runs["parameters"].gradients(s)[name])
            assert torch.equal(gradient, runs["snapshots"].gradients(s)[name])


def test_training_resumes_from_a_checkpoint(tmp_path):
    loss, whole, part = nn.CrossEntropyLoss(), tmp_path / "whole", tmp_path / "part"
    loader = named(DataLoader(digits(), 60))
    fit(tmp_path, Digits(), RecorderCallback(whole, loss), loader)
    trainer = fit(tmp_path, Digits(), RecorderCallback(part, loss), loader, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # Steps that were recorded after the checkpoint are made again.
    fit(
        tmp_path, Digits(), RecorderCallback(part, loss, resume=True), loader, ckpt=tmp_path / "last.ckpt",
        max_epochs=-1, max_steps=6,
    )  # fmt: skip
    assert len(explaind.open_run(part).steps) == 6
    fit(tmp_path, Digits(), RecorderCallback(part, loss, resume=True), loader, ckpt=tmp_path / "last.ckpt")
    expected, found = (explaind.open_run(path, model=Digits()) for path in (whole, part))
    assert len(found.steps) == 8
    for s in expected.steps:
        assert torch.equal(expected.sample_ids(s), found.sample_ids(s))
        assert all(torch.equal(t, found.theta(s)[n]) for n, t in expected.theta(s).items())


class Noisy(torch.utils.data.Dataset):
    """Augmentation: every reading is another one."""

    def __init__(self):
        self.data = digits(n=50)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + 0.1 * torch.randn(64, dtype=torch.float64), y


def test_augmented_inputs_that_are_read_again(tmp_path):
    def record(path, **options):
        loader = DataLoader(IndexedDataset(Noisy(), seed=2), batch_size=20, shuffle=True, num_workers=2)
        fit(tmp_path, Digits(), RecorderCallback(path, nn.CrossEntropyLoss(), **options), named(loader))
        return path

    stored = explaind.open_run(record(tmp_path / "stored"), model=Digits())
    path = record(tmp_path / "again", inputs="reread")
    again = explaind.open_run(path, model=Digits(), dataset=IndexedDataset(Noisy(), seed=2))
    assert not (path / "batches").exists()
    drawn = []
    for s in stored.steps:
        assert torch.equal(stored.batch(s).inputs, again.batch(s).inputs)
        drawn += [x for i, x in zip(stored.sample_ids(s).tolist(), stored.batch(s).inputs, strict=True) if i == 0]
    assert not torch.equal(*drawn)  # another draw in the second epoch


class Two(Digits):
    """Two optimizers, which step from one gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(x), y))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        first, _, second = self.net
        return [torch.optim.SGD(first.parameters(), 0.1), torch.optim.AdamW(second.parameters(), 0.01)]


def test_several_optimizers(tmp_path):
    fit(tmp_path, Two(), RecorderCallback(tmp_path / "run", nn.CrossEntropyLoss()), named(DataLoader(digits(), 60)))
    run = explaind.open_run(tmp_path / "run", model=Two())
    assert len(run.steps) == 8
    check_gradients(run, Two())
    assert max(step.error for step in explaind.decompose(run)) < 1e-12


def test_what_cannot_be_recorded_is_refused(tmp_path):
    loss, loader = nn.CrossEntropyLoss(), named(DataLoader(digits(), 60))
    module = Digits()
    with pytest.raises(errors.RecordingError, match="does not name its samples") as refused:
        fit(tmp_path, module, RecorderCallback(tmp_path / "a", loss))
    assert "named(loader)" in str(refused.value)
    assert not module._forward_hooks  # let go of
    assert "training_step" not in vars(module)
    with pytest.raises(errors.RecordingError, match="not the one that the model was trained on"):
        fit(tmp_path, Digits(), RecorderCallback(tmp_path / "b", nn.CrossEntropyLoss(label_smoothing=0.01)), loader)
    callback = RecorderCallback(tmp_path / "c", loss, inputs="reread")
    with pytest.raises(errors.StoreError, match="not as they were"):  # noise without a seed
        fit(tmp_path, Digits(), callback, named(DataLoader(Noisy(), 60)))
    trainer = SimpleNamespace(
        world_size=1, precision="16-mixed", precision_plugin=SimpleNamespace(scaler=object()), optimizers=[None]
    )
    with pytest.raises(errors.RecordingError, match="a scaled loss"):
        RecorderCallback(tmp_path / "d", loss).on_train_start(trainer, Digits())
    trainer.world_size = 2
    with pytest.raises(errors.RecordingError, match="several processes"):
        RecorderCallback(tmp_path / "d", loss).on_train_start(trainer, Digits())
