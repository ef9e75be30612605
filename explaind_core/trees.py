"""Nested Python data with tensors inside, as flat named tensors plus JSON.

Batches, optimizer states and hyper-parameters are such data. JSON and tensors can be stored without
pickle, so opening a store never runs code. Tuples survive the round trip; everything else that JSON
does not know is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_core.errors import RecordingError

__all__ = ["flatten", "leaves", "map_tensors", "rebuilt", "unflatten"]


def flatten(tree: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Split ``tree`` into a JSON value and its tensors; :func:`unflatten` is the inverse.

    Args:
        tree: tensors, numbers, strings, None, and lists, tuples and string-keyed mappings of these.
        where: what the tree is, for the error.

    Returns:
        The JSON value, and the tensors by the names that it gives them.

    Raises:
        RecordingError: the tree holds something else.

    Example:
        >>> import torch
        >>> flatten({"x": torch.ones(2), "n": (1, None)}, "example")
        ({'x': {'#tensor': '0'}, 'n': {'#tuple': [1, None]}}, {'0': tensor([1., 1.])})
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            parts = [visit(part.detach(), path) for part in (value._indices(), value._values())]
            return {"#sparse": [*parts, list(value.shape), value.is_coalesced()]}
        if isinstance(value, Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach()
            return {"#tensor": key}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple):
            return {"#tuple": [visit(v, f"{path}[{i}]") for i, v in enumerate(value)]}
        if isinstance(value, list):
            return [visit(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) and not key.startswith("#") for key in value):
                # Integer keys occur in optimizer states; they are kept apart from strings.
                return {"#items": [[visit(k, path), visit(v, f"{path}[{k!r}]")] for k, v in value.items()]}
            return {key: visit(v, f"{path}.{key}") for key, v in value.items()}
        raise RecordingError(
            f"{where} holds a {type(value).__name__}, which cannot be stored without pickle",
            where=path,
            expected="tensors, numbers, strings, None, and lists, tuples or dicts of them",
            remedy="convert it (numpy arrays with torch.as_tensor), or leave it out",
        )

    return visit(tree, where), tensors


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what :func:`flatten` split.

    Args:
        structure: the JSON value.
        tensors: by the names that it gives them.

    Returns:
        The tree.

    Raises:
        LookupError, TypeError, ValueError: these do not fit each other.

    Example:
        >>> import torch
        >>> unflatten(*flatten({"n": (1, torch.zeros(1))}, "example"))
        {'n': (1, tensor([0.]))}
    """
    if isinstance(structure, list):
        return [unflatten(v, tensors) for v in structure]
    if isinstance(structure, dict):
        if "#tensor" in structure:
            return tensors[structure["#tensor"]]
        if "#sparse" in structure:
            indices, values, shape, coalesced = unflatten(structure["#sparse"], tensors)
            return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True, is_coalesced=coalesced)
        if "#tuple" in structure:
            return tuple(unflatten(v, tensors) for v in structure["#tuple"])
        if "#items" in structure:
            return {unflatten(k, tensors): unflatten(v, tensors) for k, v in structure["#items"]}
        return {key: unflatten(v, tensors) for key, v in structure.items()}
    return structure


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree with a function applied to each of its tensors; containers are copied, other leaves kept.

    Args:
        function: of one tensor.
        tree: lists, tuples and mappings of anything.

    Returns:
        The new tree.

    Example:
        >>> import torch
        >>> map_tensors(lambda x: x + 1, [torch.zeros(1), "a"])
        [tensor([1.]), 'a']
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(map_tensors(function, v) for v in tree)
    if isinstance(tree, list):
        return [map_tensors(function, v) for v in tree]
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, v) for key, v in tree.items()}
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """All tensors in a tree.

    Args:
        tree: lists, tuples and mappings of anything.

    Returns:
        The tensors, in order.

    Example:
        >>> import torch
        >>> leaves({"a": torch.zeros(1), "b": [torch.ones(1)]})
        [tensor([0.]), tensor([1.])]
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, tree)
    return found


def rebuilt(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """A tree with other tensors in the place of its own; its containers keep their classes.

    Args:
        tree: lists, tuples and mappings of anything.
        tensors: as many as the tree has, in the order of :func:`leaves`.

    Returns:
        The new tree.

    Example:
        >>> import torch
        >>> rebuilt({"a": torch.zeros(1), "b": (torch.zeros(1), 3)}, iter([torch.ones(1), torch.ones(1)]))
        {'a': tensor([1.]), 'b': (tensor([1.]), 3)}
    """
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, tuple):
        values = [rebuilt(value, tensors) for value in tree]
        make: Callable[..., Any] = getattr(type(tree), "_make", type(tree))  # a named tuple
        return make(values)
    if isinstance(tree, list):
        return [rebuilt(value, tensors) for value in tree]
    if isinstance(tree, Mapping):
        other: Any = copy.copy(tree)
        for key in list(tree):
            other[key] = rebuilt(tree[key], tensors)
        return other
    return tree
