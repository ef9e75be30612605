"""Private copies of models, against copy.deepcopy where that works, and where it does not."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import io
import logging
import threading
import types
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from explaind_core import errors
from explaind_core.copies import plain_copy
from support.module_copies import Base, Data, X, alike, assert_untouched, independent, state_of


# ------------------------------------------------------------------ models that copy.deepcopy copies
def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    model.append(model[3])  # a module that stands twice
    model[4] = nn.Linear(3, 3)
    model[4].bias = model[3].bias
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


def parametrized() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 3)
    parametrizations.weight_norm(first)
    parametrizations.spectral_norm(second)
    return nn.Sequential(first, second).eval()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    model[0].register_forward_hook(lambda _m, _i, out: out * 2)
    model[2].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    return model


MODELS = {
    "tied": tied,
    "recurrent": Recurrent,
    "parametrized": parametrized,
    "hooked": hooked,
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).eval(),
    "lists": lambda: nn.Sequential(collections.OrderedDict(a=nn.Linear(4, 4), b=nn.Sequential(nn.Linear(4, 3)))),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_where_deepcopy_works_the_copy_is_the_same(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    before = state_of(model)
    copied, deep = plain_copy(model), copy.deepcopy(model)
    alike(copied, model)
    alike(copied, deep)
    with torch.no_grad():
        assert torch.equal(copied(X), deep(X))
    assert_untouched(before, model)
    alike(plain_copy(copied), model)  # of the copy, too
    independent(copied, model, X)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    kinds=st.lists(st.sampled_from(["norm", "twice", "tie", "frozen", "none"]), min_size=5, max_size=5),
    training=st.booleans(),
)
def test_of_any_stack_of_layers_the_copy_is_deepcopys(widths, kinds, training):
    layers: list[nn.Module] = []
    for a, b, kind in zip(widths, widths[1:], kinds, strict=False):
        layers.append(nn.Linear(a, b))
        if kind == "norm":
            layers.append(nn.LayerNorm(b))
        elif kind == "twice":
            layers += [square := nn.Linear(b, b), square]
        elif kind == "tie":
            layers += [one := nn.Linear(b, b), other := nn.Linear(b, b)]
            other.weight = one.weight
        elif kind == "frozen":
            layers[-1].requires_grad_(False)
    model = nn.Sequential(*layers).train(training)
    copied, deep = plain_copy(model), copy.deepcopy(model)
    alike(copied, model)
    x = torch.ones(2, widths[0])
    assert torch.equal(copied(x), deep(x))
    assert [m.training for m in copied.modules()] == [m.training for m in deep.modules()]


def test_a_recurrent_layer_computes_with_the_weights_of_the_copy():
    model = Recurrent()
    copied = plain_copy(model)
    assert all(a is b for a, b in zip(copied.lstm._flat_weights, copied.lstm.parameters(), strict=True))
    assert all(ref() is p for ref, p in zip(copied.lstm._flat_weight_refs, copied.lstm.parameters(), strict=True))


# ------------------------------------------------------------------ what modules hold on to
Pair = collections.namedtuple("Pair", "first second")


class Slotted:
    __slots__ = ("count", "layer")

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.count = layer, 0


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.inner = {"model": model, "lock": threading.Lock()}


class Holding(Base):
    """Everything that copy.deepcopy stumbles over, or copies for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.logger, self.file = (
            threading.RLock(),
            logging.getLogger("holding"),
            io.TextIOWrapper(io.BytesIO()),
        )
        self.data, self.event = Data(), threading.Event()
        self.generator, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(0)
        self.parts = [self.fc, (self.fc.weight, 1), {"bias": self.fc.bias}, {self.fc}, Pair(self.fc, None)]
        self.slotted, self.helper = Slotted(self.fc), Helper(self)
        self.bound, self.partial = self.fc.forward, functools.partial(nn.functional.linear, weight=self.fc.weight)
        self.weak, self.proxy = weakref.ref(self.fc), weakref.WeakKeyDictionary({self.fc: "fc"})
        self.default = collections.defaultdict(list, {0: [self.fc]})
        self.queue = collections.deque([self.fc], maxlen=2)
        self.seen: list[Any] = []
        self.again = [self]
        self.iterator = iter([1, 2])
        self.array, self.mask = np.zeros(3), torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.kept = self.bound(x) * self.slotted.layer(x)
            self.seen.append(self.kept)
            self.mask.add_(1)
            self.array += 1
            return self.kept + self.partial(x) + self.weak()(x) + self.queue[0](x) + self.parts[4].first(x)


def test_whatever_a_module_holds_on_to_leads_to_the_copy_or_is_shared():
    model = Holding()
    model(X).sum().backward()
    before = state_of(model)
    copied = plain_copy(model)
    alike(copied, model)
    for name in ("lock", "logger", "file", "data", "event", "iterator"):
        assert getattr(copied, name) is getattr(model, name), name
    assert copied.helper.inner["model"] is copied
    assert copied.helper.inner["lock"] is model.helper.inner["lock"]
    assert copied.parts[1][0] is copied.fc.weight
    assert copied.parts[2]["bias"] is copied.fc.bias
    assert copied.parts[3] == {copied.fc}
    assert copied.default[0] == [copied.fc]
    assert copied.default.default_factory is list
    assert copied.queue.maxlen == 2
    assert copied.proxy[copied.fc] == "fc"
    assert copied.again[0] is copied
    assert copied.kept.grad_fn is None
    assert torch.equal(copied.kept, model.kept)
    assert copied.seen[0] is copied.kept
    assert copied.fc.weight.grad is None
    first = [torch.rand(2, generator=copied.generator), copied.numpy.random(2)]
    copied(X)
    assert_untouched(before, model)  # a call of the copy writes to the copy alone
    assert model.array.tolist() == [1, 1, 1]
    assert torch.equal(model.mask, torch.full((4,), 2.0))
    assert torch.equal(torch.rand(2, generator=model.generator), first[0])  # and draws from its own generators
    assert (model.numpy.random(2) == first[1]).all()
    model.array -= 1
    model.mask.sub_(1)
    independent(copied, model, X)


def test_the_copy_keeps_nothing_of_the_model_alive():
    model = Holding()
    model(X)
    copied, gone = plain_copy(model), weakref.ref(model.fc)
    del model
    gc.collect()
    assert gone() is None
    copied(X)


def wrapped_by_a_closure() -> nn.Module:
    model = Base()
    before = model.forward
    model.forward = lambda x: before(x) * 2
    return model


def wrapped_by_wraps() -> nn.Module:
    model = Base()

    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def run(x: torch.Tensor, *, factor: float = 2.0) -> torch.Tensor:
            return function(x) * factor

        return run

    model.fc.forward = doubled(model.fc.forward)
    return model


def wrapped_by_an_object() -> nn.Module:
    class Doubled:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x) * 2

    model = Base()
    model.forward = Doubled(model.forward)
    return model


def bound() -> nn.Module:
    model = Base()
    model.forward = types.MethodType(lambda self, x: self.fc(x) * 2, model)
    return model


def cached() -> nn.Module:
    model = Base()
    model.scale = functools.lru_cache(maxsize=None)(lambda: model.fc.weight.detach().sum() * 0 + 2)
    model.forward = types.MethodType(lambda self, x: self.fc(x) * self.scale(), model)
    return model


def hooked_by_the_parent() -> nn.Module:
    model = nn.Sequential(Base(), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda _m, _i, out: model[1](out))
    return model


def compiled_inside() -> nn.Module:
    model = nn.Sequential(Base(), Base().fc)
    model[1] = nn.Linear(3, 3)
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    model[1].compile(backend="eager")
    return nn.Sequential(model)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Linear(4, 3))
    model(X)
    return model


def parametrized_by_a_part() -> nn.Module:
    class Plus(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.others = [other]

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.kept = weight + self.others[0].weight
            return self.kept

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[1], "weight", Plus(model[0]))
    model(X)
    return model


@pytest.mark.parametrize(
    "make",
    [
        wrapped_by_a_closure, wrapped_by_wraps, wrapped_by_an_object, bound, cached, hooked_by_the_parent,
        compiled_inside, old_weight_norm, parametrized_by_a_part,
    ],
)  # fmt: skip
def test_functions_around_a_module_run_the_copy(make):
    torch.manual_seed(0)
    model = make()
    copied = plain_copy(model)
    independent(copied, model, X)
    copied(X).sum().backward()
    assert any(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())


MODEL = Base()
FORWARD = MODEL.forward


def test_a_function_that_reads_the_model_by_a_global_name_is_refused():
    MODEL.forward = lambda x: FORWARD(x) * 2
    with pytest.raises(errors.QuestionError, match=r"the model cannot be copied[\s\S]*FORWARD[\s\S]*MethodType"):
        plain_copy(MODEL)
    del MODEL.forward
    plain_copy(MODEL)
    handle = MODEL.fc.register_forward_hook(lambda _m, _i, out: out + MODEL.fc.bias)
    with pytest.raises(errors.QuestionError, match="'fc', _forward_hooks"):
        plain_copy(MODEL)
    handle.remove()
