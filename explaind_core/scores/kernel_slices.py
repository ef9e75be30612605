r"""Slices of the kernel matrix of every layer, and the similarity of the same predictions, in one walk over the run.

Both need the features ``h_{s,k} = sum_i alpha_{s,i} P_s E_i g_{i,k}`` of every training sample, which is most of the
work: asked for apart, they are computed twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import xarray as xr

from explaind_core.attribution import Frame, contributions
from explaind_core.questions import CommonArguments, Question, check_fits, spelled_out
from explaind_core.run import Run
from explaind_core.strategies import choose, cosines, row_bytes

__all__ = ["kernel_slices"]

_KEEP = ("step", "layer", "train", "test")


@spelled_out
def kernel_slices(run: Run, inputs: Any, *, progress: bool = True, **question: Unpack[CommonArguments]) -> xr.Dataset:
    r"""The kernel by training and test sample, window by window and layer by layer, and Definition 4.4's similarity.

    ::

        kernel[S, l, k, x]      = - sum_{s in S} sum_{p in l} phi_s(x)_p h_{s,k,p}        summed over outputs
        similarity[S, l, x, x'] = cos of the tensors (phi_s(x)_p h_{s,k,p}) over s in S, p in l and k

    The kernel equals ``attribute(..., keep=("step", "layer", "train", "test"))``, the similarity
    ``similarity(..., per=("step", "layer"), over=("step", "parameter", "train"))`` (paper, section 5.2). Name
    windows of steps: ``{"late": slice(1850, 1900)}``.

    Args:
        run: a run opened with its model.
        inputs: the n test samples, as for :func:`explaind_core.attribute`; outputs are summed.
        memory: must hold the features of all training samples (gradient, states and what is read out: four numbers per
            sample and parameter), and the feature maps of all test samples.
        **question: what is asked, see :class:`explaind_core.questions.CommonArguments`.
        progress: show a bar with the remaining time.

    Returns:
        The Dataset that ``attribute`` returns for these axes, which closes, with ``similarity`` over
        (step, layer, test, other) besides; NaN for a sample that nothing influenced.

    Raises:
        QuestionError: an argument makes no sense; what is asked for does not fit into ``memory``.

    Example:
        >>> from explaind_core.testing import record_example
        >>> import torch
        >>> inputs = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0]], dtype=torch.float64)
        >>> slices = kernel_slices(record_example(steps=2), inputs, steps={"all": slice(1, 3)}, progress=False)
        >>> dict(slices.similarity.sizes)
        {'step': 1, 'layer': 2, 'test': 2, 'other': 2}
    """
    asked = replace(Question.ask(run, inputs, keep=_KEEP, strategy="features", **question), gram=True)
    frame = Frame(asked, "features")
    choice = choose(asked, frame.examined())
    n = asked.function.samples
    check_fits(
        asked.memory, 4 * n * row_bytes(asked), f"kernel slices, feature maps of {n} test samples at a time",
        "restrict layers= or test=, or raise memory=",
    )  # fmt: skip
    matrices = 3 * 8 * len(asked.windows) * len(asked.layers) * n**2
    check_fits(
        asked.memory, asked.result_bytes(frame.outputs) + matrices,
        f"kernel slices and similarities of {n} test samples", "name fewer windows or test samples, or raise memory=",
    )  # fmt: skip
    parts = list(contributions(frame, choice, progress=progress))
    similar = cosines(np.stack([part.gram for part in parts if part.gram is not None]))
    found = frame.collect(parts)
    return found.assign(similarity=(("step", "layer", "test", "other"), similar)).assign_coords(other=found.test.values)
