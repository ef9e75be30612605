"""What stands in the copy of a model for an object that could not be copied: whoever uses it is told."""

from __future__ import annotations

from typing import Any, NoReturn

from explaind_core.errors import QuestionError

__all__ = ["NotCopied"]


class NotCopied:
    """Stands for an object that leads to the model that was copied, and cannot be made again around the copy.

    As long as it is only kept, nothing is wrong. The object itself would run the weights of the model, and not those of
    the copy.

    Args:
        where: the attribute that leads to it.
        got: what it is, and why it cannot be copied.

    Example:
        >>> bool(NotCopied("module '', helper", "a generator"))
        Traceback (most recent call last):
        explaind_core.errors.QuestionError: a copy of the model uses what cannot be copied, and would run the model
        ...
    """

    __slots__ = ("__weakref__", "_got", "_where")

    def __init__(self, where: str, got: str) -> None:
        object.__setattr__(self, "_where", where)
        object.__setattr__(self, "_got", got)

    def __getattribute__(self, _name: str) -> NoReturn:
        raise QuestionError(
            "a copy of the model uses what cannot be copied, and would run the model",
            where=object.__getattribute__(self, "_where"),
            expected="functions, containers and objects of Python classes, at most a few of them behind each other",
            got=object.__getattribute__(self, "_got"),
            remedy="hold the parts of the model that forward() needs in the module itself; or open the run with a new "
            "model of the same architecture, left as it is made",
        )

    def _used(self, *_arguments: Any, **_options: Any) -> Any:
        return self.anything

    __call__ = __bool__ = __iter__ = __next__ = __len__ = __getitem__ = __setitem__ = __delitem__ = __contains__ = _used
    __enter__ = __exit__ = __setattr__ = __delattr__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _used
    __float__ = __int__ = __index__ = __array__ = _used
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"NotCopied({object.__getattribute__(self, '_where')})"
