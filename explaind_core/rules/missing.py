"""An optimizer that no rule speaks for: the rules nearest to it, and the ways out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from explaind_core.errors import RuleNotFoundError
from explaind_core.naming import held_by, qualified_name

__all__ = ["optimizer_inside", "rule_not_found"]

#: Where wrappers keep the optimizer that they wrap.
INSIDE = ("optimizer", "base_optimizer", "inner_optimizer")
#: Between the lines of one row of an error.
_NEXT = "\n            "
#: Named where none is near.
_FAMILIAR = ("SGD", "Adam", "AdamW")
#: How many of the nearest rules are named.
_NEAREST = 3

#: Kinds of optimizers that need more than a rule: a pattern of their qualified names, whether the optimizer inside can
#: be recorded in their place, and what to know.
_KINDS: tuple[tuple[re.Pattern[str], bool, str], ...] = (
    (
        re.compile(r"(?:.*\.)?[A-Za-z]*SAM|.*\bsam\.\w+"),
        False,
        "SAM takes its gradients at a climbed point, not where the parameters stand: they are no gradients of the "
        "recorded parameters, whatever a rule says. Train with its base optimizer alone",
    ),
    (
        re.compile(r".*\b\w*Look-?[aA]head\w*|.*\blookahead\.\w+"),
        False,
        "Lookahead pulls the parameters to slow weights of its own every k steps, behind the back of the optimizer "
        "inside, which cannot be recorded in its place. Train without it, or declare both together in a plugin",
    ),
    (
        re.compile(r"(?:.*\.)?\w*(?:SWA|EMA)(?:Optimizer|Wrapper)?|.*\b(?:Averaged|Polyak|WeightAverag)\w*"),
        True,
        "Weight averaging (SWA, EMA) keeps a second set of weights beside training: record the optimizer inside, which "
        "trains; what is explained are the trained weights, not their average",
    ),
    (
        re.compile(r"(?:bitsandbytes|torchao)\..*|.*(?:8bit|4bit|8Bit|4Bit|Fp8|FP8)\w*"),
        True,
        "An 8-bit optimizer rounds its states anew in every step, which no linear filter does. Train with the one that "
        "keeps them in full, or pass an InferredRule, whose corrections show the rounding",
    ),
)


def rule_not_found(optimizer: Any, known: Mapping[str, str]) -> RuleNotFoundError:
    """The error for an optimizer without a rule: what is nearest, and what can be done.

    Args:
        optimizer: the optimizer.
        known: qualified name of a class -> the rule that speaks for it, in words.

    Example:
        >>> class Adam2(torch.optim.SGD):
        ...     "Another one."
        >>> optimizer = Adam2([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> rule_not_found(optimizer, {"torch.optim.adam.Adam": "AdamRule"}).expected
        'one of torch.optim.adam.Adam (AdamRule), the nearest of 1'
    """
    kind = type(optimizer)
    name = qualified_name(kind)
    classes = [qualified_name(base) for base in kind.__mro__ if base not in (object, torch.optim.Optimizer)]
    bases = [base for base in classes[1:] if base in known]
    nearest = list(dict.fromkeys([*bases, *_nearest(kind.__name__, known)]))
    familiar = [one for one in sorted(known) if one.rpartition(".")[2] in _FAMILIAR]
    return RuleNotFoundError(
        f"no registered rule speaks for the optimizer {name}",
        expected=f"one of {', '.join(f'{found} ({known[found]})' for found in nearest)}, the nearest of {len(known)}"
        if nearest
        else f"one of {len(known)} optimizers" + (f", such as {', '.join(familiar)}" if familiar else ""),
        got=name + (f"; a rule exists for its base class: {', '.join(known[base] for base in bases)}" if bases else ""),
        remedy=_NEXT.join(_ways_out(optimizer, name, classes, bases)),
    )


def _nearest(name: str, known: Mapping[str, str]) -> list[str]:
    """Classes called the same, of other packages, then those called nearly so."""
    full = re.sub(r"(?i)^paged|_?[48]bit.*$|fp8.*$", "", name).lower() or name.lower()
    short: dict[str, list[str]] = {}
    for one in known:
        short.setdefault(one.rpartition(".")[2].lower(), []).append(one)
    close = get_close_matches(full, short, n=_NEAREST, cutoff=0.6)
    return [one for word in close for one in short[word]][: _NEAREST + 1]


def _ways_out(optimizer: Any, name: str, classes: Sequence[str], bases: Sequence[str]) -> list[str]:
    special = next(((into, text) for one in classes for is_one, into, text in _KINDS if is_one.fullmatch(one)), None)
    ways = [special[1]] if special else []
    path, inside = optimizer_inside(optimizer)
    if inside is not None and (special is None or special[0]):
        ways.append(f"it wraps another one: pass that, {path}, which is a {qualified_name(type(inside))}")
    if bases:
        ways.append("if it changes nothing of the step() of its base class, pass the rule of that: rule=...")
    if special is None or special[0]:
        ways.append("pass rule=explaind.InferredRule(): assumed, and every result says how far it is off")
    ways.append(
        f"install a plugin that declares it, or write one: a subclass of explaind.UpdateRule whose optimizers "
        f"contain {name!r}, 20 lines in docs/plugins.md"
    )
    return [*ways, "explaind optimizers lists those that have a rule"]


def optimizer_inside(wrapper: Any) -> tuple[str, torch.optim.Optimizer | None]:
    """The innermost optimizer that ``wrapper`` wraps, and the way to it; None where it wraps none.

    Example:
        >>> class Wrapper:
        ...     def __init__(self, inside):
        ...         self.base_optimizer = inside
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> path, found = optimizer_inside(Wrapper(sgd))
        >>> path, found is sgd
        ('optimizer.base_optimizer', True)
    """
    path, found, seen = "optimizer", None, {id(wrapper)}
    while True:
        held = ((attribute, held_by(wrapper, attribute)) for attribute in INSIDE)
        step = next(((a, o) for a, o in held if isinstance(o, torch.optim.Optimizer) and id(o) not in seen), None)
        if step is None:
            return path, found
        path, found = f"{path}.{step[0]}", step[1]
        wrapper = found
        seen.add(id(found))
