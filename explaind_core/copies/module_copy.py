"""Private copies of models: parameters, buffers and structure are copied, what else a module holds on to is not.

``copy.deepcopy`` copies whatever a module can reach, and fails at the first activation, lock, logger or open file. Here
modules are built again one by one. What stands in their attributes:

- parameters, buffers and other leaf tensors are cloned, once each, so that ties stay ties;
- tensors with a graph behind them (activations that a module keeps) are detached and cloned;
- containers, bound methods, partial and nested functions are built again around the copies, if they hold any;
- random generators are cloned: the copy must not draw from the training's numbers;
- all other objects are shared, unless they lead to a module or parameter. Then they are built again, too;
- what leads to the model and cannot be built again is left out: an error says so where the copy uses it. A ``forward``
  or a hook that reads the model by a global name is refused at once.
"""

from __future__ import annotations

import copy
import functools
import random
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind_core.copies.forward_names import outside_names
from explaind_core.copies.not_copied import NotCopied
from explaind_core.copies.object_parts import (
    ATOMS,
    LRU_CACHE,
    TRANSPARENT,
    WEAK,
    behind,
    cloned_generator,
    content,
    global_parts,
    is_free,
    is_the_programs,
    parts_of,
    slots,
)
from explaind_core.copies.search import Search, leads_over
from explaind_core.errors import QuestionError
from explaind_core.naming import inner_name, plain, wrapping

__all__ = ["plain_copy"]

#: So many objects that stand behind each other are built again. A model's own helpers are not deeper; what is, as a
#: trainer in an attribute, is the program's: it is left out where it leads to the model, and else shared.
_LEVELS = 4
#: What a module must not take along: it would run the module that was compiled.
_COMPILED_CALL = "_compiled_call_impl"
#: Where accelerate keeps the ``forward`` that it wraps in autocast and in a conversion of the outputs.
_ACCELERATE = "_original_forward"


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a module in which nothing is wrapped or compiled, in no part of it; the module is left as it is.

    Parameters and buffers have storages of their own and the ties of the original. Hooks and parametrizations
    work on the copy. Wrappers (``torch.compile``, ``nn.DataParallel``, ``DistributedDataParallel``) are left away.

    Args:
        model: any module.

    Returns:
        The copy.

    Raises:
        QuestionError: a function that stands in an attribute, or a hook, runs this very model through a global name.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first = torch.compile(nn.Linear(2, 2), backend="eager")
        ...     def forward(self, x):
        ...         self.kept = self.first(x)  # with its graph
        ...         return self.kept
        >>> model = Net()
        >>> _ = model(torch.ones(1, 2))
        >>> copied = plain_copy(model)
        >>> type(copied.first).__name__, copied.kept.requires_grad, copied.first.weight is model.first.weight
        ('Linear', False, False)
    """
    copied: nn.Module = _Copier(model).copy(plain(model))
    return copied


class _Copier:
    """Copies the parts of one model, each of them once.

    Args:
        model: whose modules and parameters must not be reached from the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # what was copied is kept alive, so that its id stays its own
        self._own = {id(part) for module in wrapping(model)[-1].modules() for part in (module, *_tensors(module))}
        self._own |= {id(module) for module in wrapping(model)}
        self._search = Search(self._own)
        self._classes: set[type] = set()  # whose forward was looked at
        self._names = {id(module): name for name, module in model.named_modules()}
        self._where: list[str] = []
        self._objects = 0  # how many objects that are no modules stand around the present one

    def copy(self, value: Any) -> Any:
        """The copy of a value, the value itself where it may be shared."""
        if type(value) is NotCopied:
            return value
        if isinstance(value, ATOMS) or (isinstance(value, types.BuiltinFunctionType) and is_free(value)):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._kept.append(value)
        container = _CONTAINERS.get(type(value))
        if container is not None:
            return container(self, value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
            return self._remember(value, cloned_generator(value))
        if type(value) is np.ndarray and value.dtype != object:
            return value if self._objects else self._remember(value, value.copy())
        if isinstance(value, types.BuiltinFunctionType) and type(value.__self__) in _CONTAINERS:
            return self._method(value)
        if is_the_programs(value):
            return value
        ends = hasattr(type(value), "__del__")  # a copy would end what the value holds
        if self._search.leads(value):
            if ends:
                return self._leave_out(value, "ends something when it is deleted")
            if self._objects >= _LEVELS and not isinstance(value, TRANSPARENT):
                return self._leave_out(value, f"stands behind {self._objects} other objects")
        elif ends or not self._reaches(value):
            return value
        return self._around(value)

    def _remember(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        return copied

    # ------------------------------------------------------------------ modules and tensors
    def _module(self, module: nn.Module) -> Any:
        if inner_name(module) is not None:
            return self._remember(module, self.copy(plain(module)))
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):  # these know how they are made
            return self._remember(module, self._by_itself(module))
        name = self._names.get(id(module), type(module).__name__)
        self._check_class(type(module), f"module {name!r}, forward")
        made: nn.Module = object.__new__(type(module))
        self._memo[id(module)] = made
        attributes = dict(vars(module))
        attributes.pop(_COMPILED_CALL, None)
        if _ACCELERATE in attributes:
            attributes["forward"] = attributes.pop(_ACCELERATE)
            if getattr(attributes["forward"], "__func__", None) is type(module).forward:
                del attributes["forward"]
        objects, self._objects = self._objects, 0
        try:
            for attribute, value in attributes.items():
                self._where.append(f"module {name!r}, {attribute}")
                made.__dict__[attribute] = self.copy(value)
                self._where.pop()
            self._fill_slots(made, module)
        finally:
            self._objects = objects
        return made

    def _tensor(self, tensor: Tensor) -> Any:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # left behind by a derivative of the copy
            tensor = torch._C._functorch.get_unwrapped(tensor)
        own = isinstance(tensor, nn.Parameter) or id(tensor) in self._own
        if self._objects and tensor.is_leaf and not own:
            return tensor
        if tensor.is_leaf and (tensor.grad is None or tensor.grad.is_leaf):
            return copy.deepcopy(tensor, self._memo)  # what shares its storage goes on to do so
        base = tensor._base
        if base is not None and id(base) in self._own and isinstance(base, nn.Parameter):  # a view of the weights
            view = self.copy(base).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            return self._remember(tensor, view)
        return self._remember(tensor, tensor.detach().clone())

    # ------------------------------------------------------------------ containers
    def _list(self, value: list[Any]) -> Any:
        made = self._remember(value, [])
        made.extend(self.copy(entry) for entry in value)
        return made

    def _dict(self, value: dict[Any, Any]) -> Any:
        made = self._remember(value, type(value)())
        for key, entry in value.items():
            made[self.copy(key)] = self.copy(entry)
        return made

    def _set(self, value: Any) -> Any:
        return self._remember(value, type(value)(self.copy(entry) for entry in value))

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        entries = [self.copy(entry) for entry in value]
        same = all(a is b for a, b in zip(entries, value, strict=True))
        return value if same else self._remember(value, tuple.__new__(type(value), entries))

    def _weak(self, value: Any) -> Any:
        made = self._remember(value, type(value)())
        if isinstance(value, weakref.WeakSet):
            made.update(self.copy(entry) for entry in value)
        else:
            made.update({self.copy(key): self.copy(entry) for key, entry in value.items()})
        return made

    def _proxy(self, value: Any) -> Any:
        inside = behind(value)
        return value if inside is None else self._remember(value, weakref.proxy(self.copy(inside)))

    # ------------------------------------------------------------------ functions and objects around the model
    def _around(self, value: Any) -> Any:
        """The copy of something, no container, that leads to a part of the model."""
        if isinstance(value, types.MethodType | types.BuiltinMethodType | types.MethodWrapperType):
            return self._method(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, weakref.ReferenceType):
            return self._remember(value, weakref.ref(self.copy(value())))
        if isinstance(value, LRU_CACHE):
            inside = self.copy(value.__wrapped__)
            made = inside if type(inside) is NotCopied else functools.lru_cache(**value.cache_parameters())(inside)
            return self._remember(value, made)
        if isinstance(value, tuple):  # a named one
            return self._tuple(value)
        if hasattr(type(value), "__deepcopy__"):
            return self._remember(value, self._by_itself(value))
        return self._object(value)

    def _by_itself(self, value: Any) -> Any:
        """A copy as the object's own ``__deepcopy__`` makes it, which may find tensors with a graph behind them."""
        try:
            return copy.deepcopy(value, self._memo)
        except RuntimeError:
            for entry in parts_of(value):
                self.copy(entry)
            return copy.deepcopy(value, self._memo)

    def _method(self, method: Any) -> Any:
        owner = method.__self__
        made = self.copy(owner)
        if type(made) is NotCopied:
            return self._remember(method, made)
        if isinstance(owner, nn.Module) and inner_name(owner) is not None:  # of a wrapper: it is not there any more
            return self._remember(method, getattr(made, method.__name__))
        if isinstance(method, types.MethodType):
            return self._remember(method, types.MethodType(self.copy(method.__func__), made))
        return self._remember(method, getattr(made, method.__name__))

    def _function(self, function: types.FunctionType) -> Any:
        compiled = vars(function).get("_torchdynamo_orig_callable")
        if compiled is not None:
            return self._remember(function, self.copy(compiled))
        for name, value in global_parts(function).items():
            if self._search.leads(value):
                got = f"reads the global name {name!r}, and that leads to the model"
                if self._objects:
                    return self._leave_out(function, got)
                self._refuse(function.__qualname__, got)
        cells = function.__closure__ or ()
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, tuple(types.CellType() for _ in cells)
        )
        self._memo[id(function)] = made
        for cell, new in zip(cells, made.__closure__ or (), strict=True):
            if (found := content(cell)) is not None:
                new.cell_contents = self.copy(found[0])
        made.__defaults__ = self.copy(function.__defaults__)
        made.__kwdefaults__ = self.copy(function.__kwdefaults__)
        made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
        made.__dict__.update({name: self.copy(value) for name, value in vars(function).items()})
        return made

    def _partial(self, value: functools.partial[Any]) -> Any:
        keywords = {name: self.copy(entry) for name, entry in value.keywords.items()}
        made = type(value)(self.copy(value.func), *[self.copy(entry) for entry in value.args], **keywords)
        self._memo[id(value)] = made
        vars(made).update({name: self.copy(entry) for name, entry in vars(value).items()})
        return made

    def _object(self, value: Any) -> Any:
        self._objects += 1
        try:
            try:
                made = object.__new__(type(value))
            except TypeError:  # of a class that is written in C, or comes from one
                return self._reduced(value)
            self._memo[id(value)] = made
            for name, entry in getattr(value, "__dict__", {}).items():
                made.__dict__[name] = self.copy(entry)
            self._fill_slots(made, value)
            return made
        finally:
            self._objects -= 1

    def _reduced(self, value: Any) -> Any:
        """An object of a class like ``collections.deque``, or derived from ``dict``, made as ``copy.deepcopy`` does."""
        try:
            make, given, state, entries, items = (*value.__reduce_ex__(4), None, None, None)[:5]
        except Exception:
            return self._leave_out(value, "cannot be made again") if self._search.leads(value) else value
        arguments = [self.copy(each) for each in given]
        try:
            made = self._remember(value, make(*arguments))
        except QuestionError:  # what was left out is used right now
            return self._leave_out(value, "cannot be made again")
        for entry in entries or ():
            made.append(self.copy(entry))
        for key, entry in items or ():
            made[self.copy(key)] = self.copy(entry)
        if isinstance(state, dict):
            vars(made).update({name: self.copy(entry) for name, entry in state.items()})
        return made

    def _fill_slots(self, made: Any, value: Any) -> None:
        for name in slots(type(value)):
            if hasattr(value, name):
                object.__setattr__(made, name, self.copy(getattr(value, name)))

    def _check_class(self, kind: type, where: str) -> None:
        """Refuse a class whose ``forward`` reads this very model from outside of the module."""
        if kind in self._classes:
            return
        self._classes.add(kind)
        for function, name, value in outside_names(kind):
            if self._search.leads(value):
                self._where.append(where)
                self._refuse(function, f"reads {name!r}, which is no attribute of the module and leads to the model")

    def _leave_out(self, value: Any, why: str) -> Any:
        what = getattr(value, "__qualname__", type(value).__qualname__)
        return self._remember(value, NotCopied(self._where[-1] if self._where else "", f"{what}, which {why}"))

    def _refuse(self, what: str, why: str) -> None:
        raise QuestionError(
            "the model cannot be copied: a part of it runs this very model, whatever copy it stands in",
            where=self._where[-1] if self._where else None,
            expected="functions that get the module as an argument, or hold it in a closure",
            got=f"{what}, which {why}",
            remedy="write it as a method of a subclass, or bind it: model.forward = types.MethodType(function, model) "
            "with function(self, x); or open the run with a new model of the same architecture, left as it is made",
        )

    # ------------------------------------------------------------------ what else leads to modules
    def _reaches(self, value: Any) -> bool:
        """Whether a value holds other modules, or graphs, over a few objects: these are not to be shared.

        The objects that stand around the value already count: what lies further away is shared.
        """
        return leads_over(_LEVELS - self._objects, value, self._is_part)

    def _is_part(self, value: Any) -> bool:
        if self._objects:  # other modules, and graphs, are those of the object
            return isinstance(value, nn.Module) and id(value) in self._memo
        if isinstance(value, Tensor):
            return isinstance(value, nn.Parameter) or not value.is_leaf
        return isinstance(value, nn.Module)


#: How containers of exactly these classes are copied, whether they hold parts of the model or not.
_CONTAINERS: Mapping[type, Callable[[_Copier, Any], Any]] = {
    list: _Copier._list,
    dict: _Copier._dict,
    OrderedDict: _Copier._dict,
    set: _Copier._set,
    frozenset: _Copier._set,
    tuple: _Copier._tuple,
    **dict.fromkeys(WEAK, _Copier._weak),
    **dict.fromkeys(weakref.ProxyTypes, _Copier._proxy),
}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers."""
    yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
