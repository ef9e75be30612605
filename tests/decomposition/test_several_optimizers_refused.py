"""Several optimizers on one model: which of them cannot be recorded together."""

from __future__ import annotations

import pytest
import torch

import explaind_core as explaind
from explaind_core import errors
from support.joint_loops import Joint, opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def joint():
    return Joint("nesterov", "adamw")


def test_optimizers_that_share_a_parameter(path, joint):
    other = torch.optim.SGD(joint.model[3].parameters(), lr=0.1)
    with pytest.raises(
        errors.RecordingError, match=r"two optimizers train[\s\S]*'3.weight'[\s\S]*optimizer 0 \(SGD\)[\s\S]*1 \(SGD\)"
    ):
        explaind.Recorder(path, joint.model, [joint.optimizers[0], other])
    assert not path.exists()


def test_a_parameter_that_another_optimizer_takes_over(path, joint):
    recorder = explaind.Recorder(path, joint.model, joint.optimizers)
    joint.train(recorder, [(0, 1)])
    weight = joint.optimizers[0].param_groups[0]["params"].pop()
    joint.optimizers[1].add_param_group({"params": [weight]})
    with pytest.raises(errors.RecordingError, match=r"took it over[\s\S]*'3.weight'"):
        joint.train(recorder, [(0, 1)], first=2)


@pytest.mark.parametrize(
    ("make", "wording"),
    [
        (lambda ps: torch.optim.LBFGS(ps), "LBFGS cannot be recorded together with other optimizers"),
        (
            lambda ps: pytest.importorskip("schedulefree").AdamWScheduleFree(ps, lr=0.1),
            "AdamWScheduleFree cannot be recorded together",
        ),
        (
            lambda ps: pytest.importorskip("pytorch_optimizer").SophiaH(ps, lr=0.1),
            "SophiaH cannot be recorded together",
        ),
    ],
)
def test_optimizers_that_are_recorded_alone_only(path, make, wording):
    joint = Joint("adamw", "adamw")
    others = make([p for p in joint.model.parameters() if p.ndim < 2])
    with pytest.raises(errors.UnsupportedOptionError, match=wording + r"[\s\S]*optimizer 1 of 2[\s\S]*record it alone"):
        explaind.Recorder(path, joint.model, [joint.optimizers[0], others])
    assert not path.exists()


@pytest.mark.parametrize("given", [[], "twice", ["adam"]])
def test_what_is_no_list_of_optimizers(path, joint, given):
    given = joint.optimizers[:1] * 2 if given == "twice" else given
    with pytest.raises(errors.RecordingError, match="not an optimizer, or a list of different ones"):
        explaind.Recorder(path, joint.model, given)


def test_a_group_entry_that_stands_where_the_owner_does(path, joint):
    joint.optimizers[0].param_groups[0]["optimizer"] = "mine"
    with pytest.raises(errors.RecordingError, match=r"an entry 'optimizer'[\s\S]*group 0 of optimizer 0"):
        explaind.Recorder(path, joint.model, joint.optimizers)


def test_a_step_that_ruins_a_parameter_stops_before_the_round_is_over(path):
    joint = Joint(lambda ps: torch.optim.SGD(ps, lr=1e308), "adamw")
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.zero_grad()
        joint.backward(1)
        for parameter in joint.model.parameters():
            parameter.grad.mul_(1e10)
        joint.declare(recorder, 1)
        with pytest.raises(errors.NonFiniteError, match=r"made a parameter NaN or infinite[\s\S]*'0.weight', step 1"):
            joint.optimizers[0].step()
    assert not opened(path, joint).steps
