"""Several optimizers on one model: their runs opened, restored, resumed and explained by other rules."""

from __future__ import annotations

import pytest
import torch

import explaind_core as explaind
from explaind_core import errors
from support.joint_loops import Joint, Nobody, closes, opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def joint():
    return Joint("nesterov", "adamw")


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_a_restored_run_trains_on_bitwise(path, stop):
    pattern = [(0, 1), (0,), (1, 0), (1,), (0, 1), (0, 1)]
    through, again = Joint("nesterov", "adamw"), Joint("nesterov", "adamw")
    with explaind.Recorder(path, through.model, through.optimizers, snapshot_every=2) as recorder:
        through.train(recorder, pattern)
    again.train(Nobody(), [(0, 1)] * 4)
    assert opened(path, through).restore(again.model, again.optimizers, stop) == stop
    again.train(Nobody(), pattern[stop:], first=stop + 1)
    assert again.same_weights(through)


def test_a_run_is_resumed(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0, 1), (1,)])
    with explaind.Recorder(path, joint.model, joint.optimizers, resume=True) as recorder:
        assert recorder.steps == 2
        joint.train(recorder, [(0,), (0, 1)], first=3)
    assert [opened(path, joint).stepped(s) for s in (1, 2, 3, 4)] == [(0, 1), (1,), (0,), (0, 1)]
    closes(opened(path, joint))
    with pytest.raises(errors.RecordingError, match=r"another optimizer[\s\S]*SGD \+ torch.optim.adamw.AdamW"):
        explaind.Recorder(path, joint.model, joint.optimizers[::-1], resume=True)


def test_restoring_into_other_optimizers(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0, 1)])
    run = opened(path, joint)
    with pytest.raises(errors.QuestionError, match=r"another number of optimizers[\s\S]*2: torch[\s\S]*got: *1"):
        run.restore(joint.model, joint.optimizers[0])
    with pytest.raises(errors.QuestionError, match=r"not the optimizers[\s\S]*in this order"):
        run.restore(joint.model, joint.optimizers[::-1])
    fewer = [joint.optimizers[0], torch.optim.AdamW([joint.model[0].bias])]
    with pytest.raises(errors.QuestionError, match=r"'2.weight'[\s\S]*number 1 of them trains it[\s\S]*none trains it"):
        run.restore(joint.model, fewer)


def test_makers_are_given_one_for_each(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0, 1)] * 2)
    asked = []

    def make(groups):
        asked.append([sorted(group) for group in groups])
        return torch.optim.AdamW(groups)

    closes(opened(path, joint, make_optimizer=[None, make]))
    assert len(asked) == 1
    assert "optimizer" not in asked[0][0]
    with pytest.raises(errors.QuestionError, match=r"one maker for each optimizer[\s\S]*list of 2"):
        opened(path, joint, make_optimizer=make)


class Unknown(torch.optim.SGD):
    """Nobody has declared this one."""


def test_one_of_them_may_be_explained_by_an_inferred_rule(path):
    joint = Joint("adamw", lambda ps: Unknown(ps, lr=0.1, momentum=0.8))
    with pytest.raises(errors.RuleNotFoundError, match="Unknown"):
        explaind.Recorder(path, joint.model, joint.optimizers)
    rule = explaind.InferredRule(momentum=0.8)
    with pytest.raises(errors.RecordingError, match=r"not one rule for each optimizer[\s\S]*2 rules"):
        explaind.Recorder(path, joint.model, joint.optimizers, rule=rule)
    with explaind.Recorder(path, joint.model, joint.optimizers, rule=[None, rule]) as recorder:
        joint.train(recorder, [(0, 1), (0,), (0, 1)])
    run = opened(path, joint)
    assert run.inferred
    assert run.closed_by_secant
    assert run.rule_name == "explaind_optimizers.adam.AdamWRule + explaind_core.rules.inferred.InferredRule"
    assert run.given_rules == [None, rule]
    closes(run, joint.inputs)
    wrong = opened(path, joint, rule=[None, explaind.InferredRule(momentum=0.1, bound=1e-6)])
    with pytest.raises(errors.InferenceError, match=r"correction is above the bound"):
        list(explaind.decompose(wrong))
    closes(run.explained_by(explaind.InferredRule(force=True)))  # one rule for all of them
