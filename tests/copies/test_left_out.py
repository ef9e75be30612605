"""What leads to the model over many objects, or cannot be built again: never the model's own weights without a word."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from explaind_core import errors
from explaind_core.copies import plain_copy
from explaind_core.copies.search import Search
from support.module_copies import Base, X, independent

LEFT_OUT = "a copy of the model uses what cannot be copied"
REFUSED = "the model cannot be copied: a part of it runs this very model"


class Box:
    """An object that holds something."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def boxed(value: Any, count: int) -> Any:
    return functools.reduce(lambda inner, _: Box(inner), range(count), value)


def opened(box: Any, count: int) -> Any:
    return functools.reduce(lambda outer, _: outer.inside, range(count), box)


class Deep(Base):
    """A layer that is reached over so many objects."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.box = count, boxed(self.fc, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return opened(self.box, self.count)(x)


@pytest.mark.parametrize("count", range(12))
def test_over_however_many_objects_the_copy_or_an_error(count):
    model = Deep(count)
    copied = plain_copy(model)
    if count <= 4:
        independent(copied, model, X)
        return
    with pytest.raises(errors.QuestionError, match=rf"{LEFT_OUT}[\s\S]*module '', box[\s\S]*Box"):
        copied(X)
    again = plain_copy(copied)
    with pytest.raises(errors.QuestionError, match=LEFT_OUT):
        again(X)
    model(X)  # it is as it was


@pytest.mark.parametrize("count", range(12))
def test_what_does_not_lead_to_the_model_is_shared_however_deep_it_is(count):
    model = Base()
    model.box = boxed("a word", count)
    assert opened(plain_copy(model).box, count) == "a word"


class Ending:
    def __init__(self, inside: Any) -> None:
        self.inside, self.ended = inside, []

    def __del__(self) -> None:
        self.ended.append(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


def calls(function: Any) -> Any:
    """A model whose forward goes through something that holds its layer."""

    class Through(Base):
        def __init__(self) -> None:
            super().__init__()
            self.through = function(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.through(x)

    return Through()


def generator_of(model: nn.Module) -> Any:
    def run() -> Any:
        x = None
        while True:
            x = yield None if x is None else model.fc(x)

    made = run()
    next(made)
    return made


class Sending(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = generator_of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.generator.send(x)


@pytest.mark.parametrize("make", [lambda: calls(lambda model: Ending(model.fc)), Sending])
def test_what_cannot_be_built_again_is_an_error_where_it_is_used(make):
    model = make()
    copied = plain_copy(model)
    with pytest.raises(errors.QuestionError, match=LEFT_OUT):
        copied(X)
    model(X)


def many(model: nn.Module) -> Any:
    rows = [float(k) for k in range(5000)] + [model.fc]
    return Box(rows)


class Many(Base):
    """A list of thousands of entries, of which the last one matters."""

    def __init__(self) -> None:
        super().__init__()
        self.box = many(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.box.inside[-1](x)


class Array(Base):
    """An array of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.array([None, self.fc, 1.0], dtype=object)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.array[1](x)


class Getting(Base):
    """A method, written in C, of a container."""

    def __init__(self) -> None:
        super().__init__()
        self.get, self.seen = {"fc": self.fc}.get, []
        self.keep = self.seen.append

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keep(len(x))
        return self.get("fc")(x)


class Mapped(Base):
    """An iterator over functions of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = [map(self.fc, [X, X]), zip([self.fc], [self.fc], strict=True), operator.methodcaller("forward", X)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.maps[0]) if x is X else self.maps[2](self.fc)


class Proxied(Base):
    """A weak proxy, which says that it is what it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.weak = weakref.proxy(self.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weak(x)


@pytest.mark.parametrize("make", [Many, Array, Getting, Mapped, Proxied])
def test_whatever_holds_a_layer_is_built_around_the_copy(make):
    model = make()
    copied = plain_copy(model)
    with torch.no_grad():
        expected = model.fc(X)
        copied.fc.weight.zero_()
        copied.fc.bias.zero_()
        assert torch.equal(copied(X), torch.zeros_like(expected))
        assert torch.equal(model(X), expected)


def test_a_containers_method_writes_to_the_copy_alone():
    model = Getting()
    copied = plain_copy(model)
    copied(X)
    assert (copied.seen, model.seen) == ([5], [])


# ------------------------------------------------------------------ names outside of the module
HEAD = nn.Linear(3, 3)
STORE: dict[str, Any] = {}


class Registry:
    current: Any = None


def helped(x: torch.Tensor) -> torch.Tensor:
    return STORE["head"](x)


class ByName(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = HEAD

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HEAD(self.fc(x))


class ByHelper(ByName):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.fc(x))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        return helped(x)


class ByClass(ByName):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Registry.current(self.fc(x))


class ByItsOwnClass(ByName):
    shared: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.fc(x))


class Beside(ByName):
    """It reads such a name, but not in what forward runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(x))

    def described(self) -> str:
        return repr(HEAD)


@pytest.fixture
def named():
    STORE["head"] = Registry.current = ByItsOwnClass.shared = HEAD
    yield
    STORE.clear()
    Registry.current = ByItsOwnClass.shared = None


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ByName, "HEAD"), (ByHelper, "helped"), (ByClass, "Registry.current"), (ByItsOwnClass, "shared")],
)
def test_a_forward_that_reads_the_model_by_a_name_is_refused(named, kind, name):
    with pytest.raises(errors.QuestionError, match=rf"{REFUSED}[\s\S]*forward[\s\S]*{name!r}"):
        plain_copy(kind())


def test_a_name_that_forward_does_not_read_is_no_matter(named):
    model = Beside()
    independent(plain_copy(model), model, X)


def test_a_name_that_leads_to_another_model_is_no_matter(named):
    STORE["head"] = nn.Linear(3, 3)

    class Apart(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return helped(self.fc(x))

    model = Apart()
    independent(plain_copy(model), model, X)


# ------------------------------------------------------------------ the search
def test_the_search_finds_whatever_gc_knows_of():
    target = Base()
    search = Search({id(target)})
    cell = (lambda: target).__closure__[0]
    for holder in (
        [target], {1: target}, {target}, (target,), boxed(target, 50), lambda: target, functools.partial(print, target),
        cell, weakref.ref(target),
        weakref.proxy(target), iter([target]), map(print, [target]), (t for t in [target]),
        types.MappingProxyType({1: target}), target.forward, functools.lru_cache(lambda: target),
        np.array([target, None]), types.MethodType(print, target),
    ):  # fmt: skip
        assert search.leads(holder), holder
        assert search.leads(holder), "asked again"
    circle: list[Any] = []
    circle.append(circle)
    for other in (circle, Base(), boxed(1, 50), print, np.zeros(3), "words", Ending, lambda: HEAD):
        assert not search.leads(other), other
        assert not search.leads([other]), "asked again"
