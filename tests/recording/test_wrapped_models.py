"""Models in wrappers and optimizers in shells: recorded by the names of the plain ones, or refused at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import explaind_core as explaind
from explaind_core import errors
from explaind_core.recording.wrapped import autocast_inside

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(1))
LOSS = nn.CrossEntropyLoss()
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside() -> nn.Module:
    return nn.DataParallel(torch.compile(network(), backend="eager"))


def partly() -> nn.Module:
    model = network()
    model[0] = nn.DataParallel(model[0])
    return model


def fabric() -> nn.Module:
    lightning = pytest.importorskip("lightning.fabric")
    return lightning.Fabric(accelerator="cpu", devices=1).setup(network())


WRAPPERS: dict[str, Any] = {
    "data parallel": lambda: nn.DataParallel(network()),
    "distributed": lambda: DistributedDataParallel(network()),
    "compiled inside": compiled_inside,
    "compiled outside": lambda: torch.compile(nn.DataParallel(network()), backend="eager"),
    "in part": partly,
    "fabric": fabric,
    "averaged, and trained": lambda: AveragedModel(network()),
}


def plain(model: nn.Module) -> nn.Module:
    for name in ("_orig_mod", "module", "_forward_module"):
        if name in model._modules:
            return plain(model._modules[name])
    return model


def train(path: Any, watched: nn.Module, called: nn.Module, mode: str = "steps", optimizer: Any = None) -> None:
    optimizer = torch.optim.AdamW(called.parameters(), lr=0.05) if optimizer is None else optimizer
    with explaind.Recorder(path, watched, optimizer, LOSS, mode=mode) as recorder:
        for ids in torch.arange(8).split(4):
            optimizer.zero_grad()
            LOSS(called(X[ids]), Y[ids]).backward()
            recorder.batch(X[ids], Y[ids], ids=ids)
            optimizer.step()


def test_a_process_group_over_the_network(tmp_path):
    """As torchrun makes it, of one process."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.compile(DistributedDataParallel(network()), backend="eager")
        train(tmp_path / "run", model, model)
        run = explaind.open_run(tmp_path / "run", model=model)
    finally:
        torch.distributed.destroy_process_group()
    assert list(run.parameters) == NAMES
    result = explaind.attribute(run, X[:2], keep=("train", "test"), progress=False)  # without the group
    assert explaind.closure_error(result) < 1e-4


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_wrapper_and_the_module_inside_are_one_model(tmp_path, name, mode, process_group):
    train(tmp_path / "plain", model := network(), model, mode)
    expected = explaind.open_run(tmp_path / "plain", model=network())
    influences = explaind.attribute(expected, X[:2], keep=("train", "test"), nodes=2, progress=False)
    wrapper = WRAPPERS[name]()
    for k, (outside, called_outside) in enumerate(itertools.product([True, False], repeat=2)):
        if "compiled" in name and outside and not called_outside:
            continue  # nothing can be seen inside what is compiled
        if name in ("compiled outside", "compiled inside") and not outside and called_outside:
            continue
        wrapper = WRAPPERS[name]()
        path, inner = tmp_path / str(k), plain(wrapper)
        train(path, wrapper if outside else inner, wrapper if called_outside else inner, mode)
        for given in (wrapper, plain(wrapper), network()):
            run = explaind.open_run(path, model=given)
            assert list(run.parameters) == NAMES
            assert run.manifest["buffers"] == []
            assert run.manifest["model"] == expected.manifest["model"]
            assert run.batch(1).micro[0].forward is not None
            assert all(torch.equal(run.theta(2)[n], expected.theta(2)[n]) for n in NAMES)
            assert explaind.verify(run, X[:2], progress=False).agreement > 0.9999
            found = explaind.attribute(run, X[:2], keep=("train", "test"), nodes=2, progress=False)
            torch.testing.assert_close(torch.tensor(found.kernel.values), torch.tensor(influences.kernel.values))
            run.close()
    other = WRAPPERS[name]()
    run = explaind.open_run(path, model=other)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    assert run.restore(other, optimizer, 1) == 1
    assert all(
        torch.equal(dict(plain(other).named_parameters())[n], run.theta(1)[n]) for n in NAMES if name != "in part"
    )
    run.close()


def test_a_run_goes_on_in_another_wrapper(tmp_path):
    train(tmp_path / "run", model := nn.DataParallel(network()), model)
    other = torch.compile(network(), backend="eager")
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    explaind.open_run(tmp_path / "run", model=other).restore(other, optimizer)
    with explaind.Recorder(tmp_path / "run", other, optimizer, LOSS, resume=True) as recorder:
        optimizer.zero_grad()
        LOSS(other(X), Y).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
    assert len(explaind.open_run(tmp_path / "run", model=network()).steps) == 3


# ------------------------------------------------------------------ running averages
def test_an_average_is_not_what_is_trained(tmp_path):
    model = network()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(errors.RecordingError, match=r"running average[\s\S]*give the Recorder the model"):
        explaind.Recorder(tmp_path / "run", averaged, optimizer, LOSS)
    with pytest.raises(errors.RecordingError, match="running average"):
        explaind.Recorder(tmp_path / "run", AveragedModel(nn.DataParallel(model)), optimizer, LOSS)
    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS) as recorder:  # as the remedy says
        LOSS(model(X), Y).backward()
        recorder.batch(X, Y, ids=range(8))
        optimizer.step()
        averaged.update_parameters(model)
    run = explaind.open_run(tmp_path / "run", model=averaged)
    assert explaind.verify(run, X[:2], progress=False).agreement > 0.9999
    assert int(averaged.n_averaged) == 1


def test_an_average_beside_the_model_does_not_hinder(tmp_path):
    model = nn.DataParallel(network())
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            LOSS(model(X), Y).backward()
            recorder.batch(X, Y, ids=range(8))
            optimizer.step()
            averaged.update_parameters(model)
    assert explaind.verify(explaind.open_run(tmp_path / "run", model=model), X[:2], progress=False).agreement > 0.9999


# ------------------------------------------------------------------ what is refused
class FullyShardedDataParallel(nn.Module):
    """By its name, as it would have to be set up to be made."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


class DeepSpeedEngine(FullyShardedDataParallel):
    pass


@pytest.mark.parametrize("kind", [FullyShardedDataParallel, DeepSpeedEngine])
def test_sharded_models_are_refused_by_name(tmp_path, kind):
    for model in (kind(network()), nn.Sequential(kind(network()))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(errors.RecordingError, match="no process holds the parameters whole"):
            explaind.Recorder(tmp_path / "run", model, optimizer, LOSS)


def test_several_processes_are_refused(tmp_path, process_group, monkeypatch):
    model = DistributedDataParallel(network())
    monkeypatch.setattr(type(model.process_group), "size", lambda _: 2)
    with pytest.raises(errors.RecordingError, match="several processes"):
        explaind.Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1), LOSS)


# ------------------------------------------------------------------ accelerate and Fabric
@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
def test_a_prepared_model_and_optimizer(tmp_path, accelerator, mode):
    prepared = accelerator(gradient_accumulation_steps=2)
    model = network()
    model, optimizer = prepared.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS, mode=mode) as recorder:
        for ids in torch.arange(8).split(2):
            with prepared.accumulate(model):
                prepared.backward(LOSS(model(X[ids]), Y[ids]))
                recorder.batch(X[ids], Y[ids], ids=ids, weight=0.5)
                optimizer.step()
                optimizer.zero_grad()
        assert recorder.steps == 2
    run = explaind.open_run(tmp_path / "run", model=model)
    assert run.manifest["optimizer"] == "torch.optim.adamw.AdamW"
    assert run.sample_ids(1).tolist() == [0, 1, 2, 3]
    assert explaind.verify(run, X[:2], progress=False).agreement > 0.9999
    result = explaind.attribute(run, X[:2], keep=("train", "test"), progress=False)
    assert explaind.closure_error(result) < 1e-4
    other, again = prepared.prepare(network(), torch.optim.AdamW(network().parameters(), lr=0.05))
    again = prepared.prepare(torch.optim.AdamW(other.parameters(), lr=0.05))
    assert run.restore(other, again) == 2
    run.close()


def test_steps_that_a_prepared_optimizer_skips(tmp_path, accelerator):
    prepared = accelerator()
    model = network()
    model, optimizer = prepared.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    optimizer.__init__(optimizer.optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))  # as with fp16
    with explaind.Recorder(tmp_path / "run", model, optimizer, LOSS) as recorder:
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scale = optimizer.scaler.get_scale()
            optimizer.scaler.scale(LOSS(model(X), Y) * factor).backward()
            recorder.batch(X, Y, ids=range(8), scale=scale)
            optimizer.step()
        assert (recorder.steps, recorder.skipped) == (2, 1)
    assert explaind.verify(explaind.open_run(tmp_path / "run", model=model), X[:2], progress=False).agreement > 0.999


def test_mixed_precision_inside_a_prepared_model(tmp_path, accelerator):
    prepared = accelerator(mixed_precision="bf16")
    model = network()
    model, optimizer = prepared.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    inside = autocast_inside(model)
    assert inside is not None
    assert inside.fast_dtype is torch.bfloat16
    assert autocast_inside(network()) is None
    train(tmp_path / "run", model, model, optimizer=optimizer)
    for given in (model, network()):
        run = explaind.open_run(tmp_path / "run", model=given)
        assert run.batch(1).micro[0].forward.autocast == "torch.bfloat16"
        assert run.model(X).dtype is torch.float32
        assert "forward" not in vars(run.model)  # what is explained is the plain model
        result = explaind.attribute(run, X[:2], keep=("train", "test"), progress=False)
        assert explaind.closure_error(result) < 1e-3
    assert "forward" in vars(model)


def test_fabrics_shells(tmp_path):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    train(tmp_path / "run", model, model, optimizer=optimizer)
    run = explaind.open_run(tmp_path / "run", model=model)
    assert run.manifest["optimizer"] == "torch.optim.sgd.SGD"
    assert explaind.verify(run, X[:2], progress=False).agreement > 0.9999
