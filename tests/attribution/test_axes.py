"""attribute() over all seven axes against the dense oracle: any axes, restrictions, optimizers, nodes, strategies."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.question import Question
from support.attribution_oracles import modules
from support.axes_oracle import AXES, SUBSETS, Influences, assert_answers, influences
from support.axes_runs import ASKED, BATCHES, CASES, DATA, INPUTS, OPTIMIZERS, TARGETS, example, network, record_batches

STRATEGIES = ("forward", "reverse", "features", "adjoint")
#: What is explained: as the library is told, and as the oracle is.
OUTPUTS = {
    "logits": (None, None),
    "loss": (
        explaind.Loss(ASKED),
        lambda call, x: nn.functional.cross_entropy(call(x), ASKED, reduction="none"),
    ),
    "margin": (
        lambda call, x: call(x)[:, 0] - call(x)[:, 1],
        lambda call, x: call(x)[:, 0] - call(x)[:, 1],
    ),
    "activation": (explaind.Activation("1"), lambda call, x: call.model[1](call.model[0](x))),
}
#: (what to ask for, the entries it names: layer -> {parameter: entries}).
LAYERS = {
    "modules": (None, None),
    "prefix": (["2"], {"2": {"2.weight": ..., "2.bias": ...}}),
    "patterns": (
        {"last": "2.*", "first": ["0.weight"]},
        {"last": {"2.weight": ..., "2.bias": ...}, "first": {"0.weight": ...}},
    ),
    "parts": (
        {"neuron": {"0.weight": 1}, "next": {"0.weight": slice(2, 3)}, "column": {"2.weight": (slice(None), 1)}},
        {
            "neuron": {"0.weight": 1},
            "next": {"0.weight": slice(2, 3)},
            "column": {"2.weight": (slice(None), 1)},
        },
    ),
}


@lru_cache
def oracle(optimizer: str, training: str, nodes: int | str, output: str = "logits") -> Influences:
    return influences(example(optimizer, training), INPUTS, nodes, OUTPUTS[output][1])


def masks(truth: Influences, name: str) -> dict[str, torch.Tensor]:
    if name == "modules":
        return modules(truth)
    return {
        layer: sum(truth.mask(n, entries=e) for n, e in entries.items() if n in truth.where)
        for layer, entries in LAYERS[name][1].items()
    }


some_steps = st.sampled_from(
    [
        None, 2, [1], [4], [2, 4], [1, 3, 4], range(2, 4), slice(2, 4), slice(3, None), slice(None, None, 2),
        {"early": [1, 2], "late": slice(3, 5)}, {"gap": [1, 3], "end": 4}, {"only": range(2, 4)}, {"a": [1], "b": [4]},
    ]
)  # fmt: skip
some_gradient_steps = st.sampled_from([None, None, 1, [1], [1, 3], slice(1, 3), range(1, 2), [1, 4]])
some_train = st.sampled_from(
    [None, None, [0, 3], [4, 0], torch.tensor([2]), slice(0, 4), slice(0, None, 2), [8, 1],
     {"x": [0, 1], "y": [4, 7]}, {"zero": [0], "others": slice(1, 7)}]
)  # fmt: skip
some_test = st.sampled_from([None, None, [1], [2, 0], slice(0, 2), 1])
subsets = st.sampled_from(SUBSETS)


def asked(truth, question):
    """The question as the oracle takes it; and whether it asks for samples that the run never saw."""
    told = {**question, "layers": masks(truth, question["layers"])}
    told["test"] = [told["test"]] if isinstance(told["test"], int) else told["test"]
    train = told["train"] = told["train"].tolist() if isinstance(told["train"], torch.Tensor) else told["train"]
    known = truth.scope(**{**told, "train": None})[0]["train"]
    groups = train.values() if isinstance(train, dict) else [train]
    unknown = any(
        not set(known) & set(range(100)[group])
        if isinstance(group, slice)
        else bool(set(group) - set(truth.updates.ids))
        for group in groups
        if group is not None
    )
    if isinstance(train, dict):
        told["train"] = {
            n: [k for k in known if k in range(100)[g]] if isinstance(g, slice) else g for n, g in train.items()
        }
    elif isinstance(train, slice):
        told["train"] = [k for k in known if k in range(100)[train]]
    return told, unknown


def small_pieces(chunk):
    """The test samples in pieces of ``chunk``."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(Question, "ask", partial(Question.ask, chunk=chunk)))
    return stack


def ask(case, question, keep, *, nodes=2, output="logits", chunk=500, **options):
    """The library's answer, compared with the oracle's (which must be an error where samples are not known)."""
    truth = oracle(*case, nodes, output)
    told, unknown = asked(truth, question)
    arguments = {**question, "layers": LAYERS[question["layers"]][0]}
    call = partial(
        explaind.attribute, example(*case), INPUTS, keep=keep, nodes=nodes, output=OUTPUTS[output][0],
        progress=False, **arguments, **options,
    )  # fmt: skip
    with small_pieces(chunk):
        if unknown:
            with pytest.raises(QuestionError):
                call()
            return
        result = call()
    assert_answers(result, truth, keep, **told)


EVERYTHING = {"steps": None, "gradient_steps": None, "train": None, "layers": "modules", "test": None}
questions = st.fixed_dictionaries(
    {
        "steps": some_steps,
        "gradient_steps": some_gradient_steps,
        "train": some_train,
        "layers": st.sampled_from([*LAYERS]),
        "test": some_test,
    }
).filter(
    # A gradient that is asked for must have been taken before the last step that is explained.
    lambda q: not (q["steps"] in ([1], 2, {"a": [1]}) and q["gradient_steps"] in ([1, 4],))
)


# ------------------------------------------------------------------ any question
@settings(deadline=None, max_examples=100)
@given(
    case=st.sampled_from(CASES),
    keep=subsets,
    question=questions,
    nodes=st.sampled_from([1, 2, "left", "midpoint:2"]),
    output=st.sampled_from([*OUTPUTS]),
    chunk=st.sampled_from([1, 2, 500]),
)
def test_any_question_is_answered_as_the_oracle_answers_it(case, keep, question, nodes, output, chunk):
    ask(case, question, keep, nodes=nodes, output=output, chunk=chunk)


@pytest.mark.parametrize("restricted", [False, True], ids=["everything", "restricted"])
@pytest.mark.parametrize(
    "case",
    [("nesterov", "used"), pytest.param(("muon+adamw", "taking turns, used"), marks=pytest.mark.slow)],
    ids="-".join,
)
def test_every_subset_of_the_axes_sums_the_others(case, restricted):
    """All 128 of them, on runs with a sample twice in a batch, momentum, decay and a prehistory."""
    question = EVERYTHING | (
        {"steps": [2, 4], "gradient_steps": [1, 2, 4], "train": [4, 0, 3], "layers": "parts", "test": [2, 0]}
        if restricted
        else {}
    )
    assert len(SUBSETS) == 2 ** len(AXES)
    for keep in SUBSETS:
        ask(case, question, keep)


@pytest.mark.parametrize("strategy", ["features", "adjoint"])
@pytest.mark.parametrize("case", [("sgd+adam", "taking turns"), ("sgd+adam", "taking turns, used")], ids="-".join)
def test_steps_may_feed_none_of_the_parameters_asked_for(case, strategy):
    for keep in (("train",), ("gradient_step", "train", "parameter"), ("step",)):
        ask(case, EVERYTHING | {"layers": "parts", "train": [4, 0, 3]}, keep, strategy=strategy)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_training_is_answered_on_all_axes_and_by_training_sample(case):
    for keep in (AXES, ("train", "test", "output"), ("gradient_step", "parameter"), ("step", "train")):
        ask(case, EVERYTHING, keep)
    ask(case, EVERYTHING | {"steps": {"early": [1, 2], "late": [4]}}, ("step", "layer", "train", "test"), nodes="left")


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_is_answered_on_all_axes(output):
    for keep in (AXES, ("step", "layer", "train"), ("train", "test", "output")):
        ask(("adamw", "missing"), EVERYTHING | {"test": [2, 0]}, keep, output=output)


# ------------------------------------------------------------------ strategies
def must_answer(strategy, keep, question):
    """What each strategy is there for; it may answer more."""
    plain = question["gradient_steps"] is None and question["train"] is None
    if strategy == "forward":  # the recorded update, pushed through the model
        return plain and not {"gradient_step", "parameter", "train"} & set(keep)
    if strategy == "reverse":  # pulled back, and multiplied by the recorded update
        return plain and not {"gradient_step", "train"} & set(keep)
    if strategy == "adjoint":  # in reverse time, and multiplied by the samples' gradients
        return plain and "train" in keep and not {"step", "gradient_step", "layer", "parameter"} & set(keep)
    return False


def answers(strategy, case, question, keep, nodes):
    """Whether the strategy answers, and then it does so rightly."""
    try:
        ask(case, question, keep, nodes=nodes, strategy=strategy)
    except QuestionError as error:
        if "strategy" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_that_is_insisted_on_gives_the_same_answer_or_refuses(strategy):
    answered = set()

    @settings(deadline=None, max_examples=30)
    @given(case=st.sampled_from(CASES), keep=subsets, question=questions, nodes=st.sampled_from([1, 2, "left"]))
    def check(case, keep, question, nodes):
        if answers(strategy, case, question, keep, nodes):
            answered.add(keep)
        else:
            assert not must_answer(strategy, keep, question)

    check()
    assert answered


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_answers_the_same_subsets_for_everything(strategy):
    """All 128 subsets, where the strategy applies."""
    answered = [keep for keep in SUBSETS if answers(strategy, ("nesterov", "micro"), EVERYTHING, keep, 1)]
    assert {keep for keep in SUBSETS if must_answer(strategy, keep, EVERYTHING)} <= set(answered)
    assert len(answered) >= {"forward": 16, "reverse": 32, "adjoint": 4, "features": 8}[strategy]


def test_a_strategy_that_cannot_answer_says_so():
    with pytest.raises(QuestionError, match="strategy"):
        explaind.attribute(example("adamw"), INPUTS, keep=("parameter",), strategy="forward", nodes=1, progress=False)
    with pytest.raises(QuestionError, match="strategy"):
        explaind.attribute(example("adamw"), INPUTS, strategy="fastest", nodes=1, progress=False)


# ------------------------------------------------------------------ nodes, memory, precision
@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(CASES),
    keep=subsets,
    question=questions.filter(lambda q: not isinstance(q["steps"], dict)),
    tolerance=st.sampled_from([1e-2, 1e-5]),
)
def test_adaptive_nodes_are_those_of_the_oracle_at_the_orders_that_are_told(case, keep, question, tolerance):
    """Where steps are kept, the result tells the order of each; at these orders the oracle says the same."""
    keep = tuple(axis for axis in AXES if axis in {*keep, "step"})
    run = example(*case)
    told, unknown = asked(oracle(*case, 1), question)
    if unknown:
        return
    arguments = {**question, "layers": LAYERS[question["layers"]][0], "tolerance": tolerance}
    result = explaind.attribute(run, INPUTS, keep=keep, nodes="adaptive", progress=False, **arguments)
    orders = dict.fromkeys(run.steps, 1) | dict(zip(result.step.values.tolist(), result.nodes.values, strict=True))
    assert_answers(result, influences(run, INPUTS, [int(q) for q in orders.values()]), keep, **told)


def test_the_whole_path_is_told_to_the_tolerance_by_adaptive_nodes():
    fine = oracle("rmsprop", "plain", 16)
    for keep in (("train", "test", "output"), ("layer", "parameter", "test"), ("gradient_step", "output")):
        result = explaind.attribute(
            example("rmsprop"), INPUTS, keep=keep, nodes="adaptive", tolerance=1e-9, progress=False
        )
        expected = fine.expected(keep)
        for name in ("kernel", "regularization"):
            np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=1e-6, err_msg=name)
        assert explaind.closure_error(result) < 1e-12


@pytest.mark.parametrize("keep", [AXES, ("train",), ("step", "train", "test"), ("train", "test", "output")])
@pytest.mark.parametrize("strategy", ["features", "adjoint"])
def test_little_memory_means_smaller_pieces_and_the_same_numbers(keep, strategy):
    """As little as the library says it needs for one test sample at a time."""
    with pytest.raises(QuestionError, match="memory"):
        explaind.attribute(example("adamw"), INPUTS, keep=keep, nodes=2, memory=8, progress=False)
    run, arguments = example("adamw"), {"keep": keep, "nodes": 2, "strategy": strategy, "progress": False}
    for memory in (2**k for k in range(3, 20)):
        try:
            planned = explaind.plan(
                run, INPUTS, memory=memory, **{k: v for k, v in arguments.items() if k != "progress"}
            )
        except QuestionError:
            continue
        if planned.fits:
            break
    assert (planned.passes > 1) == (strategy == "adjoint" and "test" in keep and len(keep) == 3)
    ask(("adamw", "plain"), EVERYTHING, keep, memory=memory, strategy=strategy)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_a_run_in_float32_closes_as_exactly_and_is_right_to_its_own_precision(optimizer):
    run = record_batches(network(dtype=torch.float32), OPTIMIZERS[optimizer], DATA.float(), TARGETS, BATCHES)
    truth = influences(run, INPUTS.float(), 2)
    for keep in (AXES, ("train", "test", "output"), ("step", "train"), ("gradient_step", "layer"), ("parameter",), ()):
        result = explaind.attribute(run, INPUTS.float(), keep=keep, nodes=2, progress=False)
        # Some dozen roundings of 6e-8 each, of gradients, of per-sample gradients and of f.
        assert_answers(result, truth, keep, tolerance=2e-5)


def test_the_order_in_which_axes_are_named_does_not_matter():
    arguments = {"nodes": 1, "progress": False}
    one = explaind.attribute(example("nesterov"), INPUTS, keep=("output", "train", "step"), **arguments)
    other = explaind.attribute(example("nesterov"), INPUTS, keep=("step", "train", "output"), **arguments)
    assert one.identical(other)
    assert one.kernel.dims == ("step", "train", "output")


def test_parameters_know_their_tensors():
    layers = {"neuron": {"0.weight": 1}, "bias": ["2.bias"]}
    result = explaind.attribute(example("adamw"), INPUTS, keep=("parameter",), layers=layers, nodes=1, progress=False)
    assert result.parameter.values.tolist() == [3, 4, 5, 18, 19]
    names = [result.attrs["tensors"][code] for code in result.tensor.values.tolist()]
    assert names == ["0.weight"] * 3 + ["2.bias"] * 2
    assert result.tensor.dims == ("parameter",)


def test_the_users_model_and_random_numbers_are_left_alone():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    run = example("adamw")
    state = {n: t.clone() for n, t in run.model.state_dict().items()}
    explaind.attribute(run, INPUTS, keep=("train", "test"), nodes=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, state[n]) for n, t in run.model.state_dict().items())
    assert not run.model.training
    assert not any(p.requires_grad or p.grad is not None for p in run.model.parameters())
