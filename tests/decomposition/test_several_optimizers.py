"""Several optimizers on one model: rounds are steps, replayed and explained by each parameter's own rule."""

from __future__ import annotations

import copy
import tempfile
from uuid import UUID

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.recording import run_writer as writer
from explaind_core.run.replay import Replay
from explaind_core.store import store_files as storefiles
from support.joint_loops import MATRICES, MUON, OPTIMIZERS, OTHERS, Joint, Nobody, closes, opened

needs_muon = pytest.mark.skipif(not MUON, reason="this torch has no Muon")
matrix_optimizers = st.sampled_from([name for name in OPTIMIZERS if name != "muon" or MUON])
other_optimizers = st.sampled_from([name for name in OPTIMIZERS if name != "muon"])
rounds = st.lists(st.sampled_from([(0, 1), (1, 0), (0,), (1,)]), min_size=1, max_size=6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def joint():
    return Joint("nesterov", "adamw")


# ------------------------------------------------------------------ the recorded steps
@settings(deadline=None, max_examples=25)
@given(
    first=matrix_optimizers,
    second=other_optimizers,
    pattern=rounds,
    missing=st.dictionaries(st.integers(1, 6), st.sets(st.sampled_from(MATRICES + OTHERS))),
    none=st.booleans(),
)
def test_any_pair_of_optimizers_steps_when_it_likes(first, second, pattern, missing, none):
    joint = Joint(first, second)
    reached = []
    with tempfile.TemporaryDirectory() as folder:
        with explaind.Recorder(f"{folder}/run", joint.model, joint.optimizers, joint.loss) as recorder:
            for s, members in enumerate(pattern, 1):
                joint.train(recorder, [members], missing=missing, first=s, set_to_none=none)
                reached.append({n: p.detach().clone() for n, p in joint.model.named_parameters()})
        run = opened(f"{folder}/run", joint)
        assert [run.stepped(s) for s in run.steps] == [tuple(sorted(members)) for members in pattern]
        for s, members in enumerate(pattern, 1):
            assert run.batch(s).ids.tolist() == joint.ids(s).tolist()
            fed = set().union(*(joint.names(member) for member in members)) - missing.get(s, set())
            assert set(run.gradients(s)) == fed
            assert all(torch.equal(run.theta(s)[n], value) for n, value in reached[s - 1].items())
        closes(run, joint.inputs)


@needs_muon
def test_muon_and_adamw_close_to_rounding(path):
    joint = Joint("muon", "adamw")
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        joint.train(recorder, [(0, 1)] * 12)
    run = opened(path, joint)
    assert len(run.steps) == 12
    assert closes(run, joint.inputs) < 1e-13
    result = explaind.attribute(run, joint.inputs, keep=("step",), progress=False)
    assert result.attrs["optimizer"] == "torch.optim.Muon + torch.optim.adamw.AdamW"
    assert result.attrs["rule"] == "explaind_optimizers.muon.MuonRule + explaind_optimizers.adam.AdamWRule"
    assert 0 < float(result.correction.max()) < 0.2  # of Muon's secants
    assert "Muon + torch.optim.adamw.AdamW" in repr(run)


@pytest.mark.parametrize("kinds", [("muon", "adamw"), ("descent", "adam"), ("rmsprop", "nesterov")])
@pytest.mark.parametrize("used", [0, 2])
def test_a_joint_run_is_its_optimizers_runs_put_together(tmp_path, kinds, used):
    """Each optimizer alone, on nothing but its own parameters, fed with the same gradients: the same splits."""
    if "muon" in kinds and not MUON:
        pytest.skip("this torch has no Muon")
    pattern = [(0, 1), (1, 0), (0,), (0, 1), (1,), (0, 1)]
    joint = Joint(*kinds)
    joint.train(Nobody(), [(0, 1)] * used)
    start = {n: p.detach().clone() for n, p in joint.model.named_parameters()}
    states = [copy.deepcopy(o.state_dict()) for o in joint.optimizers]
    with explaind.Recorder(tmp_path / "run", joint.model, joint.optimizers, joint.loss) as recorder:
        joint.train(recorder, pattern)
    run = opened(tmp_path / "run", joint)
    together = {step.step: step for step in explaind.decompose(run)}
    for member in (0, 1):
        names = [n for n in start if n in joint.names(member)]
        alone = nn.ParameterList([nn.Parameter(start[n].clone()) for n in names])
        optimizer = OPTIMIZERS[kinds[member]](alone.parameters())
        optimizer.load_state_dict(states[member])
        steps = [s for s, members in enumerate(pattern, 1) if member in members]
        with explaind.Recorder(tmp_path / f"alone {member}", alone, optimizer) as recorder:
            for s in steps:
                for parameter, name in zip(alone, names, strict=True):
                    parameter.grad = run.gradients(s)[name].clone()
                recorder.batch(torch.zeros(1), None, ids=[0])
                optimizer.step()
        for s, single in zip(steps, explaind.decompose(explaind.open_run(tmp_path / f"alone {member}")), strict=True):
            for index, name in enumerate(names):
                ours, expected = together[s].updates[name], single.updates[str(index)]
                for part in ("kernel", "regularization", "prehistory", "displacement"):
                    assert (getattr(ours, part) is None) == (getattr(expected, part) is None)
                    if getattr(ours, part) is not None:
                        assert torch.equal(getattr(ours, part), getattr(expected, part)), (s, name, part)
        for s in set(together) - set(steps):
            assert not set(together[s].updates) & set(names)


def test_hyper_parameters_of_all_groups_tell_their_optimizer(path, joint):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(joint.optimizers[1], 0.5)
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        for s in (1, 2, 3):
            joint.train(recorder, [(0, 1)], first=s)
            scheduler.step()
    run = opened(path, joint)
    assert [(g["optimizer"], g["lr"]) for s in run.steps for g in run.hyper(s)] == [
        (0, 0.1), (1, 0.02), (0, 0.1), (1, 0.01), (0, 0.1), (1, 0.005),
    ]  # fmt: skip
    assert [set(g["params"]) for g in run.hyper(1)] == [joint.names(0), joint.names(1)]
    assert [o["rule"]["name"].rpartition(".")[2] for o in run.optimizers] == ["SGDRule", "AdamWRule"]
    closes(run)


def test_one_optimizer_in_a_list_is_stored_as_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(storefiles, "uuid4", lambda: UUID(int=7))  # two runs never have the same name
    monkeypatch.setattr(writer, "provenance", lambda: {"libraries": {}, "git_commit": None})  # it tells the time
    stored = []
    for listed in (False, True):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.ones(4, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        path = tmp_path / str(listed)
        with explaind.Recorder(path, model, [optimizer] if listed else optimizer, nn.MSELoss()) as recorder:
            for _ in range(2):
                optimizer.zero_grad()
                model(x).sum().backward()
                recorder.batch(x, None, ids=range(4))
                optimizer.step()
        files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
        stored.append({str(file): (path / file).read_bytes() for file in files})
    assert stored[0] == stored[1]
    assert b'"optimizers"' not in stored[0]["manifest.json"]


def test_three_optimizers(path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.LayerNorm(2)).double()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.Adam(model[2].parameters(), lr=0.1),
        torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9),
    ]
    x = torch.randn(5, 2, dtype=torch.float64)
    pattern = [(0, 1, 2), (2, 0), (1,), (0, 1, 2), (2,), (1, 2)]
    with explaind.Recorder(path, model, optimizers) as recorder:
        for members in pattern:
            model.zero_grad()
            model(x).square().sum().backward()
            recorder.batch(x, None, ids=range(5))
            for member in members:
                optimizers[member].step()
    run = explaind.open_run(path, model=model)
    assert [run.stepped(s) for s in run.steps] == [tuple(sorted(m)) for m in pattern]
    closes(run, x)


def test_buffers_are_those_of_the_rounds_own_pass(path):
    """A round that ends when the next batch is declared has not seen the next pass."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    optimizers = [torch.optim.SGD(model[k].parameters(), lr=0.1) for k in (0, 1)]
    kept = []
    with explaind.Recorder(path, model, optimizers) as recorder:
        for s in range(4):
            x = torch.randn(5, 3, dtype=torch.float64)
            model.zero_grad()
            model(x).sum().backward()
            kept.append(model[1].running_mean.clone())
            recorder.batch(x, None, ids=range(5))
            optimizers[s % 2].step()
    run = explaind.open_run(path, model=model)
    for s in run.steps:
        assert torch.equal(run.buffers(s)["1.running_mean"], kept[s - 1])


# ------------------------------------------------------------------ closures, frozen, tied and joining parameters
def closure_of(joint, s):
    def closure():
        joint.zero_grad()
        ids = joint.ids(s)
        value = joint.loss(joint.model(joint.inputs[ids]), joint.targets[ids])
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("declared_inside", [False, True])
def test_the_first_optimizers_closure_gives_both_their_gradient(path, joint, declared_inside):
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        for s in (1, 2, 3):
            plain = closure_of(joint, s)

            def closure(s=s, plain=plain):
                if declared_inside:
                    joint.declare(recorder, s)
                return plain()

            if not declared_inside:
                joint.declare(recorder, s)
            joint.optimizers[0].step(closure)
            joint.optimizers[1].step()
    run = opened(path, joint)
    assert [run.stepped(s) for s in run.steps] == [(0, 1)] * 3
    closes(run, joint.inputs)
    explaind.attribute(run, joint.inputs, keep=("train",), progress=False)


def test_a_closure_for_each_optimizer_is_a_step_for_each(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        for s in (1, 2, 3, 4):
            joint.declare(recorder, s)
            joint.optimizers[s % 2].step(closure_of(joint, s))
        recorder.discard_batch()
        joint.declare(recorder, 5)
        joint.optimizers[0].step(closure_of(joint, 5))
        with pytest.raises(errors.RecordingError, match="no batch was declared"):
            joint.optimizers[1].step(closure_of(joint, 5))
    run = opened(path, joint)
    assert [run.stepped(s) for s in run.steps] == [(1,), (0,), (1,), (0,), (0,)]
    closes(run, joint.inputs)
    explaind.attribute(run, joint.inputs, keep=("train",), progress=False)


def test_a_step_inside_anothers_closure_is_refused(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.declare(recorder, 1)

        def closure():
            closure_of(joint, 1)()
            joint.optimizers[1].step()

        with pytest.raises(errors.RecordingError, match=r"stepped inside the step of another[\s\S]*AdamW"):
            joint.optimizers[0].step(closure)


def test_frozen_parameters_and_one_that_is_unfrozen_later(path, joint):
    joint.model[0].weight.requires_grad_(False)
    joint.model[2].bias.requires_grad_(False)
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        joint.train(recorder, [(0, 1), (0, 1)])
        joint.model[0].weight.requires_grad_(True)
        joint.train(recorder, [(0, 1), (0,), (1, 0)], first=3)
    run = opened(path, joint)
    assert [{"0.weight", "2.bias"} & set(run.gradients(s)) for s in run.steps] == [set(), set()] + [{"0.weight"}] * 3
    assert [run.stepped(s) for s in run.steps] == [(0, 1), (0, 1), (0, 1), (0,), (0, 1)]
    assert torch.equal(run.theta(2)["0.weight"], run.theta(0)["0.weight"])
    assert torch.equal(run.theta(5)["2.bias"], run.theta(0)["2.bias"])
    closes(run, joint.inputs)


def test_accumulation_is_found_in_a_parameter_that_was_unfrozen(path, joint):
    joint.model[2].weight.requires_grad_(False)
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0, 1)])
        joint.model[2].weight.requires_grad_(True)
        joint.train(recorder, [(0,)], first=2)
        kept = joint.model[2].weight.grad
        joint.zero_grad()
        joint.model[2].weight.grad = kept
        joint.backward(3)
        joint.declare(recorder, 3)
        with pytest.raises(errors.RecordingError, match=r"not taken where this step begins[\s\S]*'2.weight', step 3"):
            joint.optimizers[1].step()


def test_tied_weights_belong_to_one_of_them(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.LayerNorm(3)).double()
    model[2].weight = model[0].weight
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizers = [
        torch.optim.SGD(matrices, lr=0.1, momentum=0.9),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=0.1),
    ]
    x = torch.randn(4, 3, dtype=torch.float64)
    with explaind.Recorder(path, model, optimizers, nn.MSELoss()) as recorder:
        for members in [(0, 1), (1,), (0, 1)]:
            model.zero_grad()
            nn.functional.mse_loss(model(x), x).backward()
            recorder.batch(x, x, ids=range(4))
            for member in members:
                optimizers[member].step()
    run = explaind.open_run(path, model=model)
    assert "2.weight" not in run.parameters
    closes(run, x)
    explaind.attribute(run, x, keep=("train",), progress=False)
    with pytest.raises(errors.RecordingError, match=r"two optimizers train the same parameter[\s\S]*'0.weight'"):
        explaind.Recorder(path / "other", model, [optimizers[0], torch.optim.SGD([model[2].weight], lr=0.1)])


def test_parameters_that_join_the_second_optimizer_later(path):
    joint = Joint("nesterov", lambda ps: torch.optim.AdamW(list(ps)[:2], lr=0.05, betas=(0.5, 0.9)))
    late = [joint.model[2].bias, joint.model[3].bias]
    with explaind.Recorder(path, joint.model, joint.optimizers, snapshot_every=2) as recorder:
        joint.train(recorder, [(0, 1), (0,)])
        joint.optimizers[1].add_param_group({"params": late, "lr": 0.01, "weight_decay": 0.5})
        joint.train(recorder, [(0, 1), (1,), (0, 1)], first=3)
        joint.optimizers[0].add_param_group({"params": []})  # moves the second one's groups on by one
        joint.train(recorder, [(0, 1)], first=6)
    run = opened(path, joint)
    assert [[g["optimizer"] for g in run.hyper(s)] for s in run.steps] == [
        [0, 1], [0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert torch.equal(run.theta(2)["3.bias"], run.theta(0)["3.bias"])
    assert not torch.equal(run.theta(3)["3.bias"], run.theta(0)["3.bias"])
    closes(run, joint.inputs)
    state = Replay(run).state_after(6)  # from a snapshot behind which they joined
    names = {id(p): name for name, p in joint.model.named_parameters()}
    live = {names[id(p)]: entries for o in joint.optimizers for p, entries in o.state.items()}
    assert set(live) == set(state) == set(run.parameters)
    for name, entries in live.items():
        assert all(torch.equal(state[name][key], value) for key, value in entries.items()), name
