"""Whether the model that a run was opened with returns what the trained one returned."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.func import functional_call

from explaind_core import trees
from explaind_core.errors import ExplaindError, QuestionError
from explaind_core.run import Run
from explaind_core.training_step import (
    ForwardState,
    MicroBatch,
    differ_beyond_rounding,
    keeps_outputs,
    output_entries,
    run_model,
)

__all__ = ["check_outputs"]

#: What a product is rounded to on a device whose tensor cores may be in use (TF32).
_OTHER_DEVICE = 2.0**-10
#: What autocast rounds to.
_AUTOCAST = {str(dtype): torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}


def check_outputs(run: Run) -> None:
    """Refuse a model that does not return what was recorded of a first, a middle and a last step.

    That sees what :func:`explaind_core.training_step.different_parts` does not: a function that ``forward`` calls, an
    attribute that training changed, an argument that the loop passed and did not declare.

    Once for a run: it takes a forward pass of each of these batches.

    Args:
        run: opened with its model.

    Raises:
        QuestionError: its outputs differ by more than rounding.
    """
    if run.outputs_accepted:
        return
    every = run.manifest.get("snapshot_every")
    if every is None:  # of version 1, which kept no outputs
        return
    # In snapshots mode only what stands behind a snapshot can be had without making steps again.
    kept = [s for s in run.steps if keeps_outputs(s, every) and (run.mode != "snapshots" or (s - 1) % every == 0)]
    found = {s: _difference(run, s) for s in sorted({kept[k] for k in (0, len(kept) // 2, -1)})} if kept else {}
    differing = {s: difference for s, difference in found.items() if difference}
    if not differing:
        run.outputs_accepted = True
        return
    alike = [s for s in found if s not in differing]
    raise QuestionError(
        "the run was opened with a model that gives other outputs than the trained one gave",
        where=run.path,
        expected="the recorded outputs, to rounding, of the recorded batches at the recorded parameters",
        got=", ".join(f"step {s}: {difference:.3g} of their size off" for s, difference in differing.items())
        + (f"; the same outputs at step {', '.join(map(str, alike))}" if alike else ""),
        remedy="open the run with the code that it was recorded with. Where an attribute of the model changes in "
        "training (a temperature, a mask), make it a buffer; where the loop passes more arguments than it declares "
        "(model(x, scale=0.5)), declare all of them: recorder.batch({'x': x, 'scale': 0.5}, ...). If the model is "
        "meant to be another one, say run.accept_model()",
    )


def _difference(run: Run, s: int) -> float:
    """How far the outputs of step s are off; 0 where none were kept, or these cannot be compared here."""
    try:
        micro = run.batch(s).micro[:1]
        if not micro or micro[0].forward is None or not micro[0].forward.outputs:
            return 0.0
        forward, kept, unit = micro[0].forward, micro[0].forward.outputs, _unit(run, micro[0].forward)
        now = _entries(run, s, micro[0], forward)
        difference = differ_beyond_rounding(kept, now, unit)
        if difference and differ_beyond_rounding(now, _entries(run, s, micro[0], forward), unit):
            return 0.0  # it draws random numbers that torch knows nothing of, or keeps something between calls
        return difference
    except (ExplaindError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return 0.0  # the question itself meets what raises here, and says what


def _entries(run: Run, s: int, micro: MicroBatch, forward: ForwardState) -> dict[str, Tensor]:
    model = run.model_in(forward.training)
    state = run.theta(s - 1, point="gradient") | run.buffers(s - 1) | run.buffers_before(s)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    held, inputs = (trees.map_tensors(lambda t: t.detach().clone().to(device), of) for of in (state, micro.inputs))
    for name, info in run.parameters.items():  # as in training: some models ask whether there is a gradient to come
        held[name].requires_grad_(info.trained)
    with warnings.catch_warnings(), torch.enable_grad(), forward.applied(model):
        warnings.simplefilter("ignore")  # whatever the model warns of, it did so in training
        return output_entries(run_model(lambda *a, **k: functional_call(model, held, a, k), inputs))


def _unit(run: Run, forward: ForwardState) -> float:
    """The rounding of the coarsest type that the outputs went through."""
    coarsest = max(torch.finfo(info.dtype).eps for info in run.parameters.values() if info.dtype.is_floating_point)
    if forward.autocast is not None:
        coarsest = max(coarsest, _AUTOCAST.get(forward.autocast, 1.0))
    return coarsest if forward.device_type == "cpu" else max(coarsest, _OTHER_DEVICE)
