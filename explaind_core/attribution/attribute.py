"""attribute(): the one question, and the labelled result that closes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Unpack

import xarray as xr

from explaind_core.attribution.frame import Frame
from explaind_core.errors import QuestionError
from explaind_core.questions import (
    AttributionArguments,
    Contribution,
    Question,
    question_of,
    spelled_out,
)
from explaind_core.results import TERMS, ResultWriter, closure_error, summed
from explaind_core.results import result_writer as appending
from explaind_core.run import Run
from explaind_core.store import readable_size
from explaind_core.strategies import Choice, choose, insisted_on

__all__ = ["TERMS", "answer", "attribute", "closure_error", "contributions", "summed"]


@spelled_out
def attribute(run: Run, inputs: Any, **arguments: Unpack[AttributionArguments]) -> xr.Dataset:
    """Split predictions into what each step, layer and term added to them (paper, Theorem 3.1, Definition 4.2).

    ``f(theta_N; x) = f(theta_0; x) + sum_s (kernel_s(x) + regularization_s(x) + residual_s(x))``, every
    contribution being what is ADDED to the output (the negative of the paper's psi).

    Every contribution is a sum of cells of the influence tensor, with phi_s the feature map of Theorem 3.1::

        kernel[s, i, l, p, k, x, j] = - phi_s(x)_{j,p} (alpha_{s,i} P_s E_i g_{i,k})_p        p in layer l, i <= s

    Args:
        run: a run opened with its model.
        inputs: the n test samples: a tensor, or a tuple (positional arguments) or dict (keywords) of tensors.
        **arguments: see :class:`explaind_core.questions.AttributionArguments`.

    Returns:
        A Dataset over the kept axes: ``kernel``; without gradient_step and train ``regularization`` and, where there is
        something to tell, ``prehistory`` (recording began with a used optimizer, or a filter starts elsewhere than at
        zero), ``penalty`` (a term of the loss that depends on the parameters alone) and ``unattributed`` (what no
        sample explains of the gradients); over (step, test, output) as far as kept ``residual``, ``omitted`` and, where
        buffers moved, ``statistics``; ``initial`` and ``final`` over (test, output) as far as kept; ``nodes``,
        ``converged`` and ``update_error`` over step. ``omitted`` is what restrictions left out: other layers, training
        samples and gradient steps, and steps between those asked for. Along ``parameter`` stand positions in all
        parameters, one behind the other, and ``tensor``, a number into ``attrs["tensors"]``.

    Raises:
        QuestionError, LayerError: an argument makes no sense; the result does not fit into ``memory``.
        RecordingError: the gradients of a step's samples do not make up the gradient that it was fed.
        NonFiniteError: the explained function is not finite somewhere on the way.
        StoreError: what lies at ``out`` is damaged; it cannot be written, or another process is writing it.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=3)
        >>> result = attribute(run, torch.ones(2, 4, dtype=torch.float64), progress=False)
        >>> dict(result.kernel.sizes), result.layer.values.tolist()
        ({'step': 3, 'layer': 2, 'test': 2, 'output': 3}, ['0', '2'])
        >>> closure_error(result) < 1e-12
        True
    """
    check_engine(arguments["engine"])
    question = Question.ask(run, inputs, **question_of(arguments))
    return answer(question, progress=arguments["progress"], out=arguments["out"])


def check_engine(engine: str) -> None:
    """Refuse an engine that is not there (QuestionError)."""
    if engine != "local":
        raise QuestionError("there is no such engine", where="engine", expected="'local'", got=engine)


def answer(question: Question, *, progress: bool = True, out: str | os.PathLike[str] | None = None) -> xr.Dataset:
    """The answer to a question that was checked (see :func:`attribute`)."""
    insisted_on(question)  # before any work
    frame = Frame(question)
    choose(question, frame.outputs)  # refuses what does not fit before anything is evaluated
    if out is None:
        _check_size(frame)
    choice = choose(question, frame.examined())
    frame.strategy = choice.strategy.name
    if out is not None:
        return _to_zarr(frame, choice, out, progress)
    return _in_memory(frame, choice, progress)


def _check_size(frame: Frame) -> None:
    question = frame.question
    needed = question.result_bytes(frame.outputs)
    if needed > question.memory:
        raise QuestionError(
            "the result does not fit into the memory budget",
            where=f"{question.shape(frame.outputs)}",
            expected=f"at most {readable_size(question.memory)}",
            got=readable_size(needed),
            remedy="keep fewer axes, ask for fewer test samples or steps, raise memory=, or write it with out=",
        )


def _in_memory(frame: Frame, choice: Choice, progress: bool) -> xr.Dataset:
    parts = contributions(frame, choice, progress=progress)
    return frame.collect(parts if choice.strategy.along == "step" else frame.joined(parts))


def contributions(frame: Frame, choice: Choice, *, done: int = 0, progress: bool = True) -> Iterator[Contribution]:
    """Those of the strategy, behind the first ``done`` windows or test samples."""
    return choice.strategy.contributions(
        frame.question, frame.ends, choice, done=done, block=appending.BLOCK, progress=progress
    )


def _to_zarr(frame: Frame, choice: Choice, path: str | os.PathLike[str], progress: bool) -> xr.Dataset:
    """Compute block by block, appending each; continue where an interrupted call stopped."""
    question, along = frame.question, choice.strategy.along
    axis = along if question.keeps(along) else None
    total = {"test": question.function.samples, "step": len(question.windows), None: 1}[axis]
    with ResultWriter(path, frame.fingerprint(), axis, total) as writer:
        if not writer.finished:
            labels = frame.coordinates(range(len(question.windows)))
            # Blocks of test samples as they were begun: products of other sizes round differently.
            choice = replace(choice, rows=min(choice.rows, writer.chunk or choice.rows))
            for block in _blocks(frame, choice, axis, writer.done, progress):
                writer.append(block, labels)
        return writer.result()


def _blocks(frame: Frame, choice: Choice, axis: str | None, done: int, progress: bool) -> Iterator[xr.Dataset]:
    """The result behind the first ``done`` entries of the axis along which it is written, block by block."""
    if axis is None:
        _check_size(frame)
        yield _in_memory(frame, choice, progress)
        return
    question = frame.question
    windows, samples = len(question.windows), question.function.samples
    parts = contributions(frame, choice, done=done, progress=progress)
    if axis == "step":
        for start in range(done, windows, appending.BLOCK):
            yield frame.collect(islice(parts, min(appending.BLOCK, windows - start)), unfinished=True)
    else:
        for start in range(done, samples, choice.rows):
            rows = slice(start, min(start + choice.rows, samples))
            yield frame.collect(islice(parts, windows), rows, unfinished=True)
    for _ in parts:  # lets the progress bar close
        pass
