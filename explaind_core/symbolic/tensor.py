"""Symbols in the place of tensors: a rule's own ``coefficients`` runs on them, and its algebra can be read off."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import sympy  # type: ignore[import-untyped]
import torch

from explaind_core.errors import ProofError
from explaind_core.symbolic.branches import Datum, current

__all__ = ["SymbolicTensor", "exact", "mean"]

#: The number of elements of the tensor.
ELEMENTS = sympy.Symbol("n", integer=True, positive=True)


class mean(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """The mean over a tensor of which the argument is one element; all that is known of it is that it is linear."""

    is_real = True

    @classmethod
    def eval(cls, x: Any) -> Any:
        """Sums and constant factors go outside: numbers, hyper-parameters, other means."""
        x = sympy.expand(x)
        if isinstance(x, sympy.Add):
            return sympy.Add(*map(cls, x.args))
        factors = sympy.Mul.make_args(x)
        inside = [factor for factor in factors if _varies(factor)]
        if len(inside) == len(factors):
            return None  # sympy's word for "leave it as it is"
        outside = sympy.Mul(*(factor for factor in factors if factor not in inside))
        return outside * cls(sympy.Mul(*inside)) if inside else outside

    def _eval_is_nonnegative(self) -> Any:
        return self.args[0].is_nonnegative

    def _eval_is_positive(self) -> Any:
        return self.args[0].is_positive


def _varies(x: Any) -> bool:
    """Whether an expression may differ between the elements of a tensor."""
    return bool(x.xreplace(dict.fromkeys(x.atoms(mean), sympy.S.One)).has(Datum))


def exact(value: Any) -> Any:
    """A number as the exact one that it is written as, or the expression of a symbol.

    Example:
        >>> exact(0.1), exact(2.0), exact(torch.tensor(0.5))
        (1/10, 2, 1/2)
    """
    if isinstance(value, SymbolicTensor):
        return value.expr
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and math.isfinite(value):
        return sympy.Rational(repr(value))
    if isinstance(value, Fraction):
        return sympy.Rational(value.numerator, value.denominator)
    return sympy.sympify(value)


_NUMBERS = (int, float, Fraction, torch.Tensor, sympy.Basic)


def _binary(compute: Callable[[Any, Any], Any]) -> Any:
    def method(self: SymbolicTensor, other: Any) -> Any:
        if not isinstance(other, (SymbolicTensor, *_NUMBERS)):
            return NotImplemented  # an operator, say, knows how to be multiplied
        return SymbolicTensor(compute(self.expr, exact(other)))

    return method


def _unary(compute: Callable[[Any], Any]) -> Any:
    return lambda self: SymbolicTensor(compute(self.expr))


def _positive(x: Any) -> int:
    return int(current().is_positive(x))


class SymbolicTensor:
    """One element of a tensor of any size, or a number: a sympy expression that code takes for a torch tensor.

    Elementwise operations act on the expression. A mean over the tensor becomes the function ``mean(...)`` of it. A
    comparison is answered at once, with 1 or 0: see :func:`explaind_core.symbolic.branches.branches`. Python's
    numbers are exact: 0.1 is 1/10.

    Example:
        >>> g = SymbolicTensor(Datum("g", real=True))
        >>> torch.sqrt(0.5 * g.square()) + torch.zeros_like(g)
        SymbolicTensor(sqrt(2)*Abs(g)/2)
    """

    shape = torch.Size(())
    ndim = 0
    dtype = torch.float64
    device = torch.device("cpu")
    is_sparse = False
    requires_grad = False
    _op_priority = 20  # sympy's expressions, on the left, leave operations to this class

    def __init__(self, value: Any) -> None:
        self.expr = exact(value)

    def __repr__(self) -> str:
        return f"SymbolicTensor({self.expr})"

    def _sympy_(self) -> Any:
        return self.expr

    def __hash__(self) -> int:
        return hash(self.expr)

    @property
    def free_symbols(self) -> set[Any]:
        """The symbols in it; that there is such an attribute is how filters and operators know a symbol."""
        found: set[Any] = self.expr.free_symbols
        return found

    # ------------------------------------------------------------------ arithmetic
    __add__ = __radd__ = _binary(lambda a, b: a + b)
    __sub__, __rsub__ = _binary(lambda a, b: a - b), _binary(lambda a, b: b - a)
    __mul__ = __rmul__ = _binary(lambda a, b: a * b)
    __truediv__, __rtruediv__ = _binary(lambda a, b: a / b), _binary(lambda a, b: b / a)
    __pow__, __rpow__ = _binary(lambda a, b: a**b), _binary(lambda a, b: b**a)
    __neg__ = neg = _unary(lambda a: -a)
    __abs__ = abs = absolute = _unary(sympy.Abs)
    sqrt, rsqrt = _unary(sympy.sqrt), _unary(lambda a: 1 / sympy.sqrt(a))
    square, reciprocal = _unary(lambda a: a**2), _unary(lambda a: 1 / a)
    exp, log, sign = _unary(sympy.exp), _unary(sympy.log), _unary(sympy.sign)
    mul = multiply = __mul__
    div = divide = true_divide = __truediv__
    pow = __pow__
    maximum, minimum = _binary(sympy.Max), _binary(sympy.Min)

    def add(self, other: Any, *, alpha: Any = 1) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(self.expr + exact(alpha) * exact(other))

    def sub(self, other: Any, *, alpha: Any = 1) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(self.expr - exact(alpha) * exact(other))

    def lerp(self, end: Any, weight: Any) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(self.expr + exact(weight) * (exact(end) - self.expr))

    def addcmul(self, first: Any, second: Any, *, value: Any = 1) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(self.expr + exact(value) * exact(first) * exact(second))

    def addcdiv(self, first: Any, second: Any, *, value: Any = 1) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(self.expr + exact(value) * exact(first) / exact(second))

    def clamp(self, min: Any = None, max: Any = None) -> SymbolicTensor:  # noqa: A002, D102
        lower = self if min is None else self.maximum(min)
        found: SymbolicTensor = lower if max is None else lower.minimum(max)
        return found

    clip = clamp

    # ------------------------------------------------------------------ over the whole tensor
    def mean(self, dim: Any = None) -> SymbolicTensor:  # noqa: D102
        if dim is not None:
            raise ProofError("a mean along one axis: the proof's tensors have elements, but no axes", got=f"dim={dim}")
        return SymbolicTensor(mean(self.expr))

    def sum(self, dim: Any = None) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(ELEMENTS * self.mean(dim).expr)

    def norm(self, p: Any = 2, dim: Any = None) -> SymbolicTensor:  # noqa: D102
        if p not in (1, 2, "fro"):
            raise ProofError("a norm that the proof does not know", expected="p = 1 or 2", got=f"p={p}")
        found: SymbolicTensor = abs(self).sum(dim) if p == 1 else self.square().sum(dim).sqrt()
        return found

    def numel(self) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(ELEMENTS)

    # ------------------------------------------------------------------ questions
    __gt__ = gt = _binary(lambda a, b: _positive(a - b))
    __lt__ = lt = _binary(lambda a, b: _positive(b - a))
    __ge__ = ge = _binary(lambda a, b: 1 - _positive(b - a))
    __le__ = le = _binary(lambda a, b: 1 - _positive(a - b))
    __eq__ = eq = _binary(lambda a, b: int(current().is_zero(a - b)))
    __ne__ = ne = _binary(lambda a, b: 1 - int(current().is_zero(a - b)))
    __and__ = logical_and = _binary(lambda a, b: int(bool(a) and bool(b)))
    __or__ = logical_or = _binary(lambda a, b: int(bool(a) or bool(b)))
    __invert__ = logical_not = _unary(lambda a: 1 - a)

    def __bool__(self) -> bool:
        return not current().is_zero(self.expr)

    def where(self, condition: Any, other: Any) -> SymbolicTensor:  # noqa: D102
        return self if condition else SymbolicTensor(other)

    # ------------------------------------------------------------------ numbers
    def item(self) -> SymbolicTensor:
        """Itself: a number, but not one of Python's."""
        return self

    def __float__(self) -> float:
        if not self.expr.is_number:
            raise ProofError(
                f"float() or a function of math was called on {self.expr}",
                remedy="write x.item() instead of float(x), and x**0.5 instead of math.sqrt(x)",
            )
        return float(self.expr)

    def __index__(self) -> int:
        if not self.expr.is_Integer:
            raise ProofError("a whole number is needed", got=self.expr)
        return int(self.expr)

    __int__ = __index__

    # ------------------------------------------------------------------ tensors like this one
    def clone(self, *_: Any, **__: Any) -> SymbolicTensor:  # noqa: D102
        return self

    detach = double = float = to = contiguous = coalesce = any = all = clone

    def zeros_like(self, **_: Any) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(0)

    def ones_like(self, **_: Any) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(1)

    def full_like(self, value: Any, **_: Any) -> SymbolicTensor:  # noqa: D102
        return SymbolicTensor(value)

    new_tensor = full_like

    #: Functions of torch that are no methods, or have another order of arguments.
    _functions: ClassVar[dict[str, Callable[..., SymbolicTensor]]] = {
        "where": lambda condition, a, b: SymbolicTensor(a).where(condition, b),
        "full": lambda _, value, **__: SymbolicTensor(value),
        "linalg_vector_norm": lambda x, *a, **k: x.norm(*a, **k),
        "linalg_norm": lambda x, *a, **k: x.norm(*a, **k),
    }

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if name in cls._functions:
            return cls._functions[name](*args, **(kwargs or {}))
        method = getattr(cls, name, None)
        if method is None:
            raise ProofError(f"torch.{name} is not among the operations that the proof knows")
        return method(cls(args[0]), *args[1:], **(kwargs or {}))
