"""The arguments of a question: one list for everything that asks one, with types, defaults and meanings.

A ``TypedDict`` is the one form that type checkers read as keyword arguments (``**question: Unpack[...]``), so that a
wrong name or type is an error in a user's own code, too; subclasses make longer lists of shorter ones. A dataclass
would be checked only where it is built, and would have to be written again for calls. Defaults and meanings, which a
``TypedDict`` has no place for, stand beside the type in ``Annotated``; :func:`spelled_out` reads them, and gives a
function the signature and the docstring that it would have if everything were written there.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_args, get_type_hints

__all__ = [
    "AXES",
    "DEFAULT_AXES",
    "AnswerArguments",
    "Argument",
    "AttributionArguments",
    "CommonArguments",
    "PathArguments",
    "QuestionArguments",
    "question_of",
    "spelled_out",
]

#: The axes of the influence tensor, in the order of a result's dimensions.
AXES = ("step", "gradient_step", "layer", "parameter", "train", "test", "output")
#: What is kept where nothing is said.
DEFAULT_AXES = ("step", "layer", "test", "output")


@dataclass(frozen=True)
class Argument:
    """What an argument is where nothing is said, and what it means.

    Attributes:
        default: its value where it is left out.
        meaning: for the docstring.
    """

    default: Any
    meaning: str


class CommonArguments(TypedDict, total=False):
    """What everything is asked with."""

    output: Annotated[Any, Argument(None, (
        "what is explained: None or ``Outputs()``, ``LogProbabilities()``, ``Chosen(columns)``, ``Loss(targets)``, "
        "``Activation(name)``, or any callable ``(call, inputs) -> [n, ...]``."
    ))]  # fmt: skip
    steps: Annotated[Any, Argument(None, (
        "a slice over step numbers (``slice(1850, 1900)`` is 1850..1899), a range, a list, or a ``Sample``; all by "
        "default. A mapping from names to these makes windows: the step axis then has one entry a window."
    ))]  # fmt: skip
    train: Annotated[Any, Argument(None, (
        "the training samples to count: ids, a slice of ids, a ``Sample``, or groups ``{name: ids}``."
    ))]  # fmt: skip
    shares: Annotated[str, Argument("outputs", (
        "what a sample's share of a step's gradient is: ``\"outputs\"``, the whole loss's gradient through its own "
        "outputs; or ``\"loss_terms\"``, the gradient of its own loss term through everybody's outputs, where the loss "
        "returns one number per sample. They are the same where the loss couples no samples."
    ))]  # fmt: skip
    layers: Annotated[Any, Argument(None, (
        "None for a layer per module that owns parameters, a list of module prefixes or types, or a mapping "
        "``{name: prefix, pattern, type, list of them, or {pattern: slices}}``."
    ))]  # fmt: skip
    test: Annotated[Any, Argument(None, (
        "which rows of ``inputs`` to explain: a slice, a list, or a ``Sample``."
    ))]  # fmt: skip
    nodes: Annotated[int | str, Argument("adaptive", (
        'Gauss-Legendre nodes per step, ``"adaptive"``, ``"left"`` (one node at t = 0: first order), or '
        '``"midpoint:q"`` (q equal midpoints, the paper\'s integration steps).'
    ))]  # fmt: skip
    tolerance: Annotated[float, Argument(1e-3, (
        "adaptive only: the largest residual of a step, as a fraction of the largest change of an output over all "
        "steps asked for."
    ))]  # fmt: skip
    max_nodes: Annotated[int, Argument(32, (
        "adaptive only: the most nodes a step may get; one that misses the tolerance is marked."
    ))]  # fmt: skip
    max_update_error: Annotated[float | None, Argument(None, (
        "the largest relative distance of a declared update from the recorded one that is accepted. None: what "
        "rounding makes of it, parameter by parameter; a step that its rule explains less is refused."
    ))]  # fmt: skip
    memory: Annotated[str | int, Argument("4GiB", (
        "the most that the result, and what is held to compute it, may take."
    ))]  # fmt: skip
    chunk: Annotated[int, Argument(500, (
        "test samples that pass through the model together: as many as the processor's cache is good for. Samples that "
        "are coupled in evaluation all do."
    ))]  # fmt: skip
    random_state: Annotated[int | None, Argument(None, (
        "a seed that every evaluation of a model begins with that draws random numbers in evaluation mode, too; "
        "without one, such a model is refused."
    ))]  # fmt: skip


class PathArguments(CommonArguments, total=False):
    """What attributions are asked with besides, whatever they keep."""

    gradient_steps: Annotated[Any, Argument(None, "the gradients to count, by the steps that were fed them.")]
    chords: Annotated[int, Argument(1, (
        "so many consecutive steps share one straight line and its feature map (labelled in the result)."
    ))]  # fmt: skip
    strategy: Annotated[str | None, Argument(None, (
        '``"forward"``, ``"reverse"``, ``"features"`` or ``"adjoint"``; the cheapest by default, see '
        ":func:`explaind_core.plan`."
    ))]  # fmt: skip
    unattributed: Annotated[str, Argument("refuse", (
        "what to do where the gradients of a step's samples do not add up to the gradient that it was fed, by more "
        'than rounding: ``"refuse"``, or ``"carry"`` the difference. What rounding makes of it is carried in any case: '
        "it is the term ``unattributed``."
    ))]  # fmt: skip
    buffers: Annotated[str, Argument("recorded", (
        'where buffers moved in training (running statistics): ``"recorded"``, f is at every step that of the buffers '
        'then, and what their moves added is the term ``statistics``; or ``"final"``, f is that of the last ones '
        "throughout."
    ))]  # fmt: skip


class KeptArguments(TypedDict, total=False):
    """What is told apart."""

    keep: Annotated[Sequence[str], Argument(DEFAULT_AXES, (
        "the axes to keep, any subset of step, gradient_step, layer, parameter, train, test, output; all others are "
        "summed as early as possible. Only the kernel has a gradient_step and a train axis."
    ))]  # fmt: skip


class QuestionArguments(KeptArguments, PathArguments, total=False):
    """All that makes a question."""


class AnswerArguments(TypedDict, total=False):
    """How a question is answered, which changes nothing of the answer."""

    engine: Annotated[str, Argument("local", '``"local"``.')]
    progress: Annotated[bool, Argument(True, "show a bar with the remaining time.")]
    out: Annotated[str | os.PathLike[str] | None, Argument(None, (
        "a zarr folder to write to while computing, in blocks of 50 steps (or, with the adjoint, blocks of test "
        "samples; in one go, where that axis is not kept). The result is then read from there lazily, may exceed "
        "``memory``, and an interrupted call resumes. See :func:`explaind_core.open_result`."
    ))]  # fmt: skip


class AttributionArguments(QuestionArguments, AnswerArguments, total=False):
    """What attribute is called with, and plan as well."""


def question_of(arguments: AttributionArguments) -> QuestionArguments:
    """Those that make the question."""
    kept = {name: value for name, value in arguments.items() if name in QuestionArguments.__annotations__}
    return cast("QuestionArguments", kept)


# ---------------------------------------------------------------------- functions that take them
_Function = TypeVar("_Function", bound=Callable[..., Any])


def spelled_out(function: _Function) -> _Function:
    """A function whose ``**arguments: Unpack[...]`` are spelled out in its signature, its docstring and its calls.

    Whatever is left out of a call is there at its default; a name that is not in the list is a TypeError. In the
    docstring, the entry ``**arguments:`` gives way to one entry an argument, but for those that have one already.

    Example:
        >>> from typing import Unpack
        >>> @spelled_out
        ... def ask(**question: Unpack[CommonArguments]) -> list[str]:
        ...     return [*question]
        >>> inspect.signature(ask).parameters["nodes"].default, ask(nodes=3)[:2]
        ('adaptive', ['output', 'steps'])
    """
    written = inspect.signature(function)
    *own, last = written.parameters.values()
    annotation = last.annotation
    if isinstance(annotation, str):  # annotations are read when they are needed; those of the others are not
        annotation = eval(annotation, inspect.unwrap(function).__globals__)
    (listed,) = get_args(annotation)
    meanings: dict[str, str] = {}
    parameters = list(own)
    for name, hint in get_type_hints(listed, include_extras=True).items():
        kind, argument = get_args(hint)
        meanings[name] = argument.meaning
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=argument.default, annotation=kind)
        )
    signature = written.replace(parameters=parameters)

    @functools.wraps(function)
    def called(*positional: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)

    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__doc__ = _spelled_out(function.__doc__ or "", last.name, meanings)
    return cast("_Function", called)


def _spelled_out(text: str, name: str, meanings: dict[str, str]) -> str:
    """A docstring with an entry for every argument in place of that for ``**name``."""
    entry = re.search(rf"^( +)\*\*{name}:.*\n(?:\1 +\S.*\n)*", text, re.MULTILINE)
    if entry is None:
        return text
    indent = entry[1]
    entries = [
        textwrap.fill(
            f"{argument}: {meaning}", 120, initial_indent=indent, subsequent_indent=f"{indent}    ",
            break_long_words=False, break_on_hyphens=False,
        )
        for argument, meaning in meanings.items()
        if not re.search(rf"^{indent}{argument}:", text, re.MULTILINE)
    ]  # fmt: skip
    return text[: entry.start()] + "".join(f"{line}\n" for line in entries) + text[entry.end() :]
