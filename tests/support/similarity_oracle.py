"""Cosines of explicit influence tensors, flattened."""

from __future__ import annotations

import itertools
import sys
from functools import lru_cache

import numpy as np
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from support.attribution_oracles import modules
from support.axes_oracle import AXES, Influences, influences
from support.axes_runs import ASKED, CASES, INPUTS, example

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
