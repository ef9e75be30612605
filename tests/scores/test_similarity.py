"""similarity() against cosines of the oracle's explicit influence tensors, flattened; its memory; what it refuses."""

from __future__ import annotations

import itertools
import sys
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.question import Question
from explaind_core.questions.restrictions import Sample
from explaind_core.scores import second_moments
from explaind_core.strategies import features as entries
from support.attribution_oracles import modules
from support.axes_oracle import AXES, Influences, influences
from support.axes_runs import ASKED, BATCHES, CASES, DATA, INPUTS, OPTIMIZERS, TARGETS, example, network, record_batches

#: The module, whose name in the package is that of its function.
MODULE = sys.modules["explaind_core.scores.grams"]
FLATTENED = tuple(axis for axis in AXES if axis != "test")
#: Elementwise and not, one and two filter states, a flat rule, micro-batches, gaps, another point, a used optimizer.
TRAINED = [
    ("adamw", "micro"), ("nesterov", "plain"), ("nesterov", "missing"), ("shampoo", "plain"), ("muon", "used"),
    ("lbfgs", "plain"), ("ademamix", "plain"), ("schedule-free", "evaluated"), ("lion", "plain"),
]  # fmt: skip
assert {*TRAINED} <= {*CASES}
SUBSETS = [over for size in range(1, 7) for over in itertools.combinations(FLATTENED, size)]
GRAM = ("step", "parameter", "train", "output")
#: What is explained: as the library is told, and as the oracle is.
OUTPUTS = {
    "logits": (None, None),
    "loss": (explaind.Loss(ASKED), lambda call, x: nn.functional.cross_entropy(call(x), ASKED, reduction="none")),
}
#: (what to ask for, layer -> {parameter: entries}).
LAYERS = {
    "modules": (None, None),
    "prefix": (["2"], {"2": {"2.weight": ..., "2.bias": ...}}),
    "parts": (
        {"neuron": {"0.weight": 1}, "next": {"0.weight": slice(2, 3)}, "column": {"2.weight": (slice(None), 1)}},
        {"neuron": {"0.weight": 1}, "next": {"0.weight": slice(2, 3)}, "column": {"2.weight": (slice(None), 1)}},
    ),
}  # fmt: skip


@lru_cache
def oracle(optimizer: str, training: str = "plain", nodes=2, output: str = "logits") -> Influences:
    return influences(example(optimizer, training), INPUTS, nodes, OUTPUTS[output][1])


def cosines(truth: Influences, over, per=(), *, layers="modules", steps=None, train=None, test=None):
    """Tensors of all axes, summed over those that are in neither ``over`` nor ``per``, flattened: their cosines.

    Masked where what is summed cancels: there is nothing but rounding to compare.
    """
    masks = modules(truth) if layers == "modules" else {
        layer: sum(truth.mask(n, entries=e) for n, e in parts.items() if n in truth.where)
        for layer, parts in LAYERS[layers][1].items()
    }  # fmt: skip
    windows = list(steps.values()) if isinstance(steps, dict) else [[s] for s in steps or range(1, len(truth.phi) + 1)]
    asked = [s for window in windows for s in window]
    kernel = truth.expected(AXES, layers=masks, steps=asked, train=train, test=test)["kernel"]
    kernel = np.moveaxis(kernel, AXES.index("test"), 0)
    gone = tuple(1 + n for n, axis in enumerate(FLATTENED) if axis not in over)
    groups = {
        "step": [[asked.index(s) for s in w] for w in windows] if "step" in per else [[*range(len(asked))]],
        "layer": [[n] for n in range(len(masks))] if "layer" in per else [[*range(len(masks))]],
    }
    axes = (*per, *(axis for axis in groups if axis not in per))
    found = np.ma.masked_all((*(len(groups[axis]) for axis in axes), len(kernel), len(kernel)))
    for place in np.ndindex(found.shape[:2]):
        chosen = {axis: groups[axis][n] for axis, n in zip(axes, place, strict=True)}
        part = kernel[:, chosen["step"]][:, :, :, chosen["layer"]]
        vectors = part.sum(gone).reshape(len(part), -1)
        sizes = np.linalg.norm(abs(part).sum(gone).reshape(len(part), -1), axis=1)
        norms = np.linalg.norm(vectors, axis=1)
        for a, b in np.ndindex(len(vectors), len(vectors)):
            if not sizes[a] * sizes[b]:
                found[*place, a, b] = np.nan
            elif min(norms[a] / sizes[a], norms[b] / sizes[b]) > 1e-3:
                found[*place, a, b] = (vectors[a] * vectors[b]).sum() / (norms[a] * norms[b])
    return found.reshape(found.shape[: len(per)] + found.shape[2:])


def ask(case, *, layers="modules", output="logits", nodes=2, inputs=INPUTS, **question):
    run = example(*case) if isinstance(case, tuple) else case
    return explaind.similarity(
        run, inputs, layers=LAYERS[layers][0], output=OUTPUTS[output][0], nodes=nodes, progress=False, **question
    )


def assert_same(found, expected, tolerance=1e-11):
    told = ~np.ma.getmaskarray(np.ma.asarray(expected))
    assert found.shape == told.shape
    np.testing.assert_allclose(found.values[told], np.asarray(expected)[told], rtol=0, atol=tolerance)


some_steps = st.sampled_from(
    [None, None, [2, 4], [3], {"early": [1, 2], "late": [3, 4]}, {"gap": [1, 3], "end": [4]}, {"all": [1, 2, 3, 4]}]
)
some_train = st.sampled_from([None, None, [0, 3], [4, 0, 1], {"x": [0, 1], "y": [3, 4, 2]}, {"one": [0, 1, 3]}])
some_per = st.sampled_from([(), ("layer",), ("step",), ("layer", "step"), ("step", "layer")])
questions = st.fixed_dictionaries(
    {
        "over": st.sampled_from([*SUBSETS, *([GRAM, ("step", "parameter"), (*GRAM, "layer")] * 8)]),
        "per": some_per,
        "steps": some_steps,
        "train": some_train,
        "layers": st.sampled_from([*LAYERS]),
        "test": st.sampled_from([None, None, [2, 0]]),
    }
)


# ------------------------------------------------------------------ the oracle
@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(TRAINED),
    question=questions,
    nodes=st.sampled_from([2, "left", "midpoint:3"]),
    output=st.sampled_from([*OUTPUTS]),
)
def test_any_similarity_is_the_cosine_of_the_flattened_tensors(case, question, nodes, output):
    found = ask(case, nodes=nodes, output=output, **question)
    assert_same(found, cosines(oracle(*case, nodes, output), **question))


@pytest.mark.parametrize("case", TRAINED)
def test_the_papers_similarity_of_every_optimizer(case):
    """Definition 4.4 as it stands, and by layer; momentum, matrices, secants, flat rules, repeated samples."""
    truth = oracle(*case)
    assert_same(ask(case), cosines(truth, GRAM))
    assert_same(ask(case, per="layer"), cosines(truth, GRAM, ("layer",)))


@pytest.mark.parametrize("over", SUBSETS)
def test_every_set_of_axes(over):
    assert_same(ask(("adamw", "micro"), over=over), cosines(oracle("adamw", "micro"), over))


@pytest.mark.parametrize(
    "over", [("step",), ("step", "train"), GRAM, ("parameter", "train"), ("gradient_step", "step")]
)
def test_windows_have_a_matrix_each_of_their_steps_flattened_or_summed(over):
    windows = {"first": [1, 3], "last": [4]}
    found = ask(("nesterov", "plain"), over=over, per="step", steps=windows)
    assert_same(found, cosines(oracle("nesterov"), over, ("step",), steps=windows))
    assert found.step.values.tolist() == ["first", "last"]
    # Without a matrix each, they say which steps there are: an entry of the tensors each, or summed.
    assert_same(ask(("nesterov", "plain"), over=over, steps=windows), cosines(oracle("nesterov"), over, steps=windows))


@pytest.mark.parametrize("per", [("step", "layer"), ("layer", "step")])
@pytest.mark.parametrize("over", [GRAM, ("train", "output")])
def test_matrices_come_in_the_order_that_they_are_asked_for(per, over):
    windows = {"a": [1], "b": [2, 3], "c": [4]}
    found = ask(("adamw", "plain"), per=per, over=over, steps=windows)
    assert found.dims == (*per, "test", "other")
    assert_same(found, cosines(oracle("adamw"), over, per, steps=windows))


def test_training_samples_left_out_do_not_count_whether_flattened_or_summed():
    """Summed: the recorded update would be that of all of them."""
    for over in (GRAM, ("step", "parameter", "output"), ("step", "parameter")):
        assert_same(ask(("adamw", "plain"), over=over, train=[0, 2]), cosines(oracle("adamw"), over, train=[0, 2]))
        everyone = cosines(oracle("adamw"), over)
        assert abs(ask(("adamw", "plain"), over=over, train=[0, 2]) - everyone).max() > 1e-3


def test_labels_and_what_is_told():
    found = ask(("adamw", "plain"), per=("step", "layer"), steps={"a": [1, 2], "b": 4}, test=[2, 0], over=GRAM)
    assert found.dims == ("step", "layer", "test", "other")
    assert found.step.values.tolist() == ["a", "b"]
    assert found.layer.values.tolist() == ["0", "2"]
    assert found.test.values.tolist() == found.other.values.tolist() == [2, 0]
    assert (found.name, found.dtype) == ("similarity", "float64")
    assert found.attrs["over"] == list(GRAM)
    assert found.attrs["summed_first"] == ["gradient_step"]
    assert (found.attrs["nodes_used"], found.attrs["steps_not_converged"]) == (3 * 2, 0)
    assert "sampled" not in found.attrs
    drawn = ask(("adamw", "plain"), train=Sample(3, seed=2), nodes=1)
    assert drawn.attrs["sampled"].endswith("drawn with seed 2")


def test_an_axis_needs_no_tuple():
    found = ask(("descent", "plain"), over="train", per="step")
    assert_same(found, cosines(oracle("descent"), ("train",), ("step",)))


def test_samples_that_nothing_influenced_are_like_nothing():
    """Their gradient is zero; no warning (which would be an error here)."""
    inputs = torch.cat([INPUTS, torch.zeros(1, 3).double()])
    for over in (GRAM, ("step", "parameter"), ("train",)):
        found = explaind.similarity(
            example("adamw"), inputs, over=over, output=lambda call, x: call(x) * x[:, :1], nodes=1, progress=False
        )
        assert np.isnan(found.values[3]).all()
        assert np.isnan(found.values[:, 3]).all()
        np.testing.assert_allclose(found.values[:3, :3].diagonal(), 1, rtol=1e-12)


# ------------------------------------------------------------------ nodes
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter", "train")])
@pytest.mark.parametrize("layers", ["modules", "prefix"])
def test_adaptive_nodes_are_those_of_attribute(over, layers, monkeypatch):
    """Along the whole step, whatever layers are asked for; outputs summed first or not."""
    orders = []
    original = MODULE.order_of

    def spy(*arguments):
        orders.append(original(*arguments)[0])
        return original(*arguments)

    monkeypatch.setattr(MODULE, "order_of", spy)
    found = ask(("rmsprop", "plain"), over=over, layers=layers, nodes="adaptive", tolerance=1e-6)
    keep = ("step", "parameter", "test", *(a for a in over if a == "output"))
    taken = explaind.attribute(
        example("rmsprop"), INPUTS, keep=keep, layers=LAYERS[layers][0], nodes="adaptive", tolerance=1e-6,
        strategy="reverse", progress=False,
    )  # fmt: skip
    assert orders == taken.nodes.values.tolist()
    assert max(orders) > 2
    assert found.attrs["nodes_used"] == sum(orders)
    assert_same(found, cosines(influences(example("rmsprop"), INPUTS, orders), over, layers=layers))


@pytest.mark.parametrize("over", [GRAM, ("train",), ("step", "train")])
def test_steps_that_miss_the_tolerance_are_told(over):
    missed = ask(("adamw", "plain"), over=over, nodes="adaptive", tolerance=1e-9, max_nodes=1)
    assert (missed.attrs["nodes_used"], missed.attrs["steps_not_converged"]) == (4, 4)
    assert ask(("adamw", "plain"), over=over, nodes="adaptive").attrs["steps_not_converged"] == 0


# ------------------------------------------------------------------ memory
def least(**question) -> int:
    """The least memory that is enough, to a few bytes."""
    for memory in range(64, 9000, 64):
        try:
            ask(("nesterov", "plain"), nodes=1, memory=memory, **question)
        except QuestionError:
            continue
        return memory
    raise AssertionError


@pytest.mark.parametrize("over", [GRAM, ("step", "parameter", "train"), ("step", "parameter", "output")])
@pytest.mark.parametrize("per", [(), ("layer",)])
def test_little_memory_means_more_passes_and_smaller_blocks_and_the_same_numbers(over, per, monkeypatch):
    seen = {"entries": [], "rows": set(), "columns": set()}

    class Spy(entries.EntryFeatures):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen["entries"].append(self.count)

    def feature_map(question, before, after, names, block, points, columns):
        found = original(question, before, after, names, block, points, columns)
        seen["rows"].add(block.stop - block.start)
        seen["columns"].add(next(iter(found.values())).shape[1])
        return found

    original = MODULE.feature_map
    monkeypatch.setattr(second_moments, "EntryFeatures", Spy)
    monkeypatch.setattr(MODULE, "feature_map", feature_map)
    monkeypatch.setattr(MODULE, "HELD", 1)
    truth = oracle("nesterov", "plain", 1)
    for steps in (None, {"a": [1, 3], "b": [4]}):
        assert_same(
            ask(("nesterov", "plain"), over=over, per=per, nodes=1, memory=700, steps=steps),
            cosines(truth, over, per, steps=steps),
        )
    assert seen["rows"] == seen["columns"] == {1}
    assert seen["entries"] == ([2] * 8 if "train" in over else [])

    for found in seen.values():
        found.clear()
    ask(("nesterov", "plain"), over=over, per=per, nodes=1)
    assert seen["rows"] == {3}
    assert seen["columns"] == ({2} if "output" in over else {1})
    assert seen["entries"] == ([8] if "train" in over else [])


def test_a_few_outputs_at_a_time_where_all_of_them_do_not_fit(monkeypatch):
    """Three samples fit with one column, not with two."""
    widths = set()
    original = MODULE.feature_map

    def feature_map(*arguments):
        found = original(*arguments)
        widths.add(next(iter(found.values())).shape[:2])
        return found

    monkeypatch.setattr(MODULE, "feature_map", feature_map)
    over = ("step", "parameter", "output")
    found = ask(("nesterov", "plain"), over=over, nodes=1, memory=4 * 5 * 20 * 8)
    assert widths == {(3, 1)}
    assert_same(found, cosines(oracle("nesterov", "plain", 1), over))


@pytest.mark.parametrize("train", [None, [4]])
def test_a_pass_may_have_no_sample_in_a_micro_batch(train):
    found = ask(("nesterov", "micro"), nodes=1, memory=2400, train=train)
    assert_same(found, cosines(oracle("nesterov", "micro", 1), GRAM, train=train))


@pytest.mark.parametrize(("over", "bytes_"), [(GRAM, 2 * 3 * 20 * 8), (("step", "parameter"), 4 * 20 * 8)])
def test_what_one_sample_takes_must_fit(over, bytes_):
    assert bytes_ <= least(over=over) < bytes_ + 64
    with pytest.raises(QuestionError) as error:
        ask(("nesterov", "plain"), over=over, memory=bytes_ - 1)
    assert error.value.what == "the question does not fit into the memory budget"
    assert "one t" in error.value.where
    assert "memory=" in error.value.remedy


def test_the_matrices_must_fit():
    inputs = torch.zeros(50, 3).double()
    with pytest.raises(QuestionError, match="memory budget") as error:
        ask(("descent", "plain"), inputs=inputs, memory=3 * 8 * 50 * 50 - 1)
    assert "50 test samples" in error.value.where
    with pytest.raises(QuestionError, match="memory budget"):
        ask(("descent", "plain"), inputs=inputs, per="layer", memory=3 * 8 * 50 * 50 * 2 - 1)


def test_tensors_that_are_asked_for_must_fit():
    with pytest.raises(QuestionError, match="memory budget"):
        ask(("descent", "plain"), over=("gradient_step", "parameter", "train"), memory=2000)


class Largest(TorchDispatchMode):
    """The most entries of any tensor made."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return found


def test_nothing_is_held_for_all_training_samples_and_parameters_or_test_samples():
    """With 24 test samples, 24 training samples, two outputs and a tensor of 48 entries."""
    generator = torch.Generator().manual_seed(2)
    data, targets = torch.randn(24, 3, generator=generator).double(), torch.randint(2, (24,), generator=generator)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    batches = [list(range(a, a + 8)) for a in (0, 8, 16)]
    run = record_batches(model, OPTIMIZERS["nesterov"], data, targets, batches)
    inputs = torch.randn(24, 3, generator=generator).double()
    with Largest() as largest:
        found = explaind.similarity(run, inputs, nodes=1, memory=3 * 8 * 24**2, progress=False)
    with Largest() as at_once:
        whole = explaind.similarity(run, inputs, nodes=1, progress=False)
    assert_same(found, whole.values)
    assert at_once.size >= max(24 * 48, 24 * 2 * 48)
    assert largest.size < min(24 * 48, 24 * 24, 24 * 2 * 48)


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    run = example("adamw")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    class Broken(entries.EntryFeatures):
        def blocks(self, split, **options):
            seen.extend(tmp_path.rglob("moments"))
            if split.step == 3:
                raise KeyboardInterrupt
            return super().blocks(split, **options)

    ask(run)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(second_moments, "EntryFeatures", Broken)
    with pytest.raises(KeyboardInterrupt):
        ask(run)
    assert seen
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("question", [{}, {"memory": 5000}, {"over": ("step", "parameter")}, {"steps": [2, 4]}])
def test_the_bar_ends_where_it_should(question, monkeypatch):
    totals, done = [], []

    @contextmanager
    def counted(total, description, *, enabled):
        assert enabled
        totals.append(total)
        yield done.append

    monkeypatch.setattr(MODULE, "counted", counted)
    explaind.similarity(example("nesterov"), INPUTS, nodes=1, **question)
    assert totals == [sum(done)]


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter"), ("step", "train", "output"), ("train",)])
def test_a_run_in_float32_is_right_to_its_own_precision(optimizer, over):
    run = single(optimizer)
    found = ask(run, over=over, inputs=INPUTS.float())
    assert_same(found, cosines(influences(run, INPUTS.float(), 2), over), 5e-6)
    assert found.dtype == "float64"


@lru_cache
def single(optimizer):
    return record_batches(network(dtype=torch.float32), OPTIMIZERS[optimizer], DATA.float(), TARGETS, BATCHES)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter")])
def test_squares_of_small_and_large_numbers_are_no_matter(over, factor):
    """A saturated output: phi is 1e-25, and its square no number in single precision."""
    scaled = explaind.similarity(
        single("adamw"), INPUTS.float(), over=over, output=lambda call, x: factor * call(x), nodes=1, progress=False
    )
    plain = ask(single("adamw"), over=over, inputs=INPUTS.float(), nodes=1)
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=2e-6)


# ------------------------------------------------------------------ what is forgotten
@lru_cache
def long_run(kind: str):
    """Steps of one sample: 60 of them, or 20 whose momentum forgets within some ten."""
    optimizers = {
        "slow": lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.99)),
        "two states": OPTIMIZERS["ademamix"],
        "sixty": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.3),
    }
    options = {
        "schedule": {"schedule": [{"momentum": 0.9 if s < 6 else 0.02 + 0.05 * (s % 3)} for s in range(1, 21)]},
        "missing": {"missing": {s: ["2.bias"] for s in range(10, 18)}},
    }
    make = optimizers.get(kind, lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.05))
    batches = [[s % 9] for s in range(60 if kind == "sixty" else 20)]
    return record_batches(network(), make, DATA, TARGETS, batches, **options.get(kind, {}))


def first_that_matters(run, first: int) -> int:
    """The step of the first gradient that the momenta of the steps behind it leave more than a rounding of."""
    left = [np.prod([run.hyper(s)[0]["momentum"] for s in range(i + 1, first)]) for i in range(1, first + 1)]
    return 1 + int(np.argmax(np.array(left) > np.finfo(float).eps / first))


@pytest.mark.parametrize(
    ("kind", "first"), [("fast", 2), ("fast", 19), ("schedule", 15), ("schedule", 19), ("sixty", 59)]
)
def test_gradients_that_were_forgotten_are_not_taken_and_the_result_says_so(kind, first, monkeypatch):
    run, taken = long_run(kind), []

    class Spy(entries.EntryFeatures):
        def blocks(self, split, **options):
            taken.append(split.step)
            return super().blocks(split, **options)

    monkeypatch.setattr(second_moments, "EntryFeatures", Spy)
    question = {"steps": slice(first, first + 2), "nodes": 1}
    found = ask(run, **question)
    start = first_that_matters(run, first)
    assert start == {"fast": 5 if first == 19 else 1, "sixty": 25}.get(kind, start)
    assert taken == list(range(start, first + 2))
    if start > 1:
        assert found.attrs["tail_dropped"] == f"below rounding before step {start}"
    else:
        assert "tail_dropped" not in found.attrs

    taken.clear()
    monkeypatch.setattr(second_moments, "horizon", lambda _: 1)
    whole = ask(run, **question)
    assert taken == list(range(1, first + 2))
    assert "tail_dropped" not in whole.attrs
    assert_same(found, whole.values, 1e-13)


@pytest.mark.parametrize("kind", ["missing", "slow", "two states"])
def test_what_is_not_forgotten_is_taken(kind):
    """A parameter without gradients forgets nothing; 0.9^18 is no rounding; filters of two states are not bounded."""
    found = ask(long_run(kind), steps=[19, 20], nodes=1)
    assert "tail_dropped" not in found.attrs
    question = Question.ask(long_run(kind), INPUTS, keep=("test", "train"), steps=[19])
    assert entries.horizon(question) == 1


def test_a_dropped_tail_is_the_oracles_to_rounding():
    run = long_run("fast")
    found = ask(run, steps=[17, 18], nodes=1)
    assert "tail_dropped" in found.attrs
    assert_same(found, cosines(influences(run, INPUTS, 1), GRAM, steps=[17, 18]))


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "question",
    [
        {"over": ()}, {"over": ("test",)}, {"over": ("step", "parameters")}, {"over": ("step", "step")},
        {"per": ("train",)}, {"per": ("test",)}, {"per": ("layer", "layer")}, {"per": "layers"},
    ],
)  # fmt: skip
def test_axes_that_make_no_sense_are_refused(question):
    with pytest.raises(QuestionError, match="similarity cannot be taken like that") as error:
        ask(("descent", "plain"), **question)
    assert error.value.where == "over, per"
    assert "'train'" in error.value.expected
    assert "'test'" not in error.value.expected


@pytest.mark.parametrize(
    ("question", "wording"),
    [
        ({"train": [99]}, "no sample that was trained on"),
        ({"steps": [7]}, "the run has no step 7"),
        ({"nodes": 0}, "number of nodes"),
        ({"test": [5]}, "rows are outside"),
        ({"memory": "much"}, "no amount of memory"),
    ],
)
def test_other_arguments_are_refused_as_by_attribute(question, wording):
    with pytest.raises(QuestionError, match=wording):
        ask(("descent", "plain"), **question)


def test_a_run_whose_loss_is_not_known_has_no_training_samples():
    class Loss(nn.CrossEntropyLoss):
        pass

    run = record_batches(network(), OPTIMIZERS["descent"], DATA, TARGETS, BATCHES, loss=Loss())
    run = explaind.open_run(Path(run.path), model=network())
    with pytest.raises(QuestionError, match="loss is not known"):
        ask(run)
    assert ask(run, over=("step", "parameter")).shape == (3, 3)
