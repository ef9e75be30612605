"""An optimizer without a rule: its error names what is near and the ways out, and no list of everything."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import RecordingError, RuleNotFoundError
from explaind_core.plugins import default_registry
from explaind_core.rules.missing import optimizer_inside


def parameters():
    return [nn.Parameter(torch.ones(2))]


def named(name, base=torch.optim.Optimizer, module="somewhere.optim"):
    """An optimizer's class of this name."""

    def made(self, params, lr=0.1):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr})

    body = {} if base is not torch.optim.Optimizer else {"__init__": made}
    return type(name, (base,), {**body, "__module__": module})


def wrapping(name, inside, attribute="optimizer", module="somewhere.optim"):
    made = named(name, module=module)(inside.param_groups)
    setattr(made, attribute, inside)
    return made


def refusal(optimizer):
    with pytest.raises(RuleNotFoundError) as caught:
        default_registry().rule_for(optimizer)
    return str(caught.value)


def sgd():
    return torch.optim.SGD(parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("AdamW", "torch.optim.adamw.AdamW (explaind_optimizers.adam.AdamWRule"),  # of another package
        ("Adamw2", "torch.optim.adamw.AdamW"),
        ("NAdamW", "torch.optim.nadam.NAdam"),
        ("Lionn", "lion_pytorch.lion_pytorch.Lion"),
        ("RMSProp", "torch.optim.rmsprop.RMSprop"),
        ("AdamW8bit", "torch.optim.adamw.AdamW"),
    ],
)
def test_the_nearest_names_are_named_and_no_others(name, near):
    text = refusal(named(name)(parameters()))
    assert near in text
    known = {n for r in default_registry().rules() for n in r.rule.optimizers}
    assert sum(n in text for n in known) <= 8
    assert "torch.optim.lbfgs.LBFGS" not in text


def test_where_nothing_is_near_it_says_how_many_there_are():
    text = refusal(named("Xyzzy")(parameters()))
    assert "such as torch.optim.adam.Adam, torch.optim.adamw.AdamW" in text
    assert "explaind optimizers lists those that have a rule" in text


def test_a_base_class_with_a_rule_is_named_with_its_way_out():
    text = refusal(named("Mine", torch.optim.AdamW)(parameters()))
    assert "a rule exists for its base class: explaind_optimizers.adam.AdamWRule" in text
    assert "pass the rule of that: rule=..." in text
    grandchild = refusal(named("Theirs", named("Mine", torch.optim.AdamW))(parameters()))
    assert "a rule exists for its base class: explaind_optimizers.adam.AdamWRule" in grandchild


def test_the_ways_out_are_an_inferred_rule_and_a_plugin():
    text = refusal(named("Xyzzy")(parameters()))
    assert "rule=explaind.InferredRule()" in text
    assert "docs/plugins.md" in text
    assert "'somewhere.optim.Xyzzy'" in text


@pytest.mark.parametrize("attribute", ["optimizer", "base_optimizer", "inner_optimizer"])
def test_what_wraps_an_optimizer_is_told_to_pass_that(attribute):
    text = refusal(wrapping("Sharded", sgd(), attribute))
    assert f"pass that, optimizer.{attribute}, which is a torch.optim.sgd.SGD" in text


def test_wrappers_of_wrappers_are_followed_to_the_innermost():
    path, found = optimizer_inside(wrapping("Outer", wrapping("Inner", inside := sgd(), "inner_optimizer")))
    assert (path, found) == ("optimizer.optimizer.inner_optimizer", inside)
    circle = wrapping("Round", inside)
    circle.base_optimizer = circle.optimizer = circle
    assert optimizer_inside(circle) == ("optimizer", None)


def test_accelerates_optimizer_is_told_to_pass_the_one_inside_which_is_then_recorded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(2, 1).double()
    prepared = accelerate.Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert "pass that, optimizer.optimizer, which is a torch.optim.sgd.SGD" in refusal(prepared)
    x = torch.ones(3, 2, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, prepared.optimizer) as recorder:
        model(x).square().sum().backward()
        recorder.batch(x, None, ids=range(3))
        prepared.step()
    assert recorder.steps == 1


def test_a_wrapper_that_is_no_optimizer_at_all_is_told_so_too(tmp_path):
    class Engine:
        def __init__(self, inside):
            self.base_optimizer = inside

        @property
        def optimizer(self):
            raise RuntimeError("not before the first step")

    model = nn.Linear(2, 1)
    with pytest.raises(
        RecordingError, match=r"pass that, optimizer\.base_optimizer, which is a torch\.optim\.sgd\.SGD"
    ):
        explaind.Recorder(tmp_path / "run", model, Engine(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_a_shell_that_is_no_optimizer_is_known_by_the_one_inside(tmp_path):
    class Engine:
        def __init__(self, inside):
            self.optimizer = inside

        @property
        def base_optimizer(self):
            raise RuntimeError("not before the first step")

    model = nn.Linear(2, 1)
    with explaind.Recorder(tmp_path / "run", model, Engine(torch.optim.SGD(model.parameters(), lr=0.1))):
        pass
    assert explaind.open_run(tmp_path / "run", model=model).manifest["optimizer"] == "torch.optim.sgd.SGD"


@pytest.mark.parametrize(
    ("name", "module", "sentence", "inferred"),
    [
        ("SAM", "sam", "a climbed point", False),
        ("ASAM", "somewhere", "a climbed point", False),
        ("Minimizer", "somewhere.sam", "a climbed point", False),
        ("Lookahead", "somewhere", "slow weights of its own", False),
        ("RangerLookahead", "somewhere", "slow weights of its own", False),
        ("SWA", "torchcontrib.optim.swa", "a second set of weights", True),
        ("EMAOptimizer", "lightning.somewhere", "a second set of weights", True),
        ("AveragedOptimizer", "somewhere", "a second set of weights", True),
        ("AdamW", "bitsandbytes.optim.adamw", "An 8-bit optimizer", True),
        ("AdamW8bit", "torchao.optim.adam", "An 8-bit optimizer", True),
        ("PagedLion8bit", "elsewhere", "An 8-bit optimizer", True),
    ],
)
def test_kinds_that_need_more_than_a_rule_get_a_sentence_of_their_own(name, module, sentence, inferred):
    text = refusal(named(name, module=module)(parameters()))
    assert sentence in text
    assert ("rule=explaind.InferredRule()" in text) is inferred
    inside = refusal(wrapping(name, sgd(), "base_optimizer", module))
    assert ("pass that, optimizer.base_optimizer" in inside) is inferred  # not of SAM and Lookahead
    child = refusal(named("Mine", named(name, module=module))(parameters()))
    assert sentence in child


@pytest.mark.parametrize("name", ["AdEMAMix2", "Sample", "Balsam", "Swapper", "Emanate"])
def test_names_that_only_look_like_them_get_none(name):
    text = refusal(named(name)(parameters()))
    for sentence in ("a climbed point", "slow weights", "a second set of weights", "An 8-bit optimizer"):
        assert sentence not in text
