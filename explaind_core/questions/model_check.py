"""Whether the model that a run was opened with is the one that was trained, as far as shapes do not tell."""

from __future__ import annotations

import torch

from explaind_core.derivatives import SampleGradients
from explaind_core.errors import ExplaindError, QuestionError
from explaind_core.questions.output_check import check_outputs
from explaind_core.run import Run
from explaind_core.tensors import to_dense
from explaind_core.training_step import different_parts

__all__ = ["check_model"]

#: Modules that an error names.
_NAMED = 3
#: What the same function may differ by, computed in another order, of the gradient's norm in units of eps.
_ROUNDING = 200.0


def check_model(run: Run) -> None:
    """Refuse a model that has the recorded parameters' shapes, and is another function of them.

    A run keeps what its model is made of. Where the model that it is opened with is made of the same, there is nothing
    to ask; where not, it is the same function if it gives the gradient that was recorded of the first batch. That it
    also returns what was recorded is asked later (:func:`~explaind_core.questions.output_check.check_outputs`).

    Args:
        run: opened with its model.

    Raises:
        QuestionError: the model is made of something else, and gives another gradient, or none that can be compared.
    """
    if run.model is None:
        return
    if run.mode != "steps":  # steps that are made again would come out otherwise, and not say why
        check_outputs(run)
    recorded = run.manifest.get("modules")
    if recorded is None or run.model_accepted:
        return
    differing = different_parts(recorded, run.modules)
    if not differing:
        return
    if not _gives_the_recorded_gradient(run):
        more = f" (and {len(differing) - _NAMED} more)" if len(differing) > _NAMED else ""
        raise QuestionError(
            "the run was opened with another model than the recorded one",
            where=run.path,
            expected="the model that was trained, or one that gives the recorded gradients",
            got="; ".join(differing[:_NAMED]) + more,
            remedy="open the run with the code that it was recorded with; if the model is meant to be another one, say "
            "run.accept_model()",
        )
    run.model_accepted = True


def _gives_the_recorded_gradient(run: Run) -> bool:
    if run.loss is None or not run.steps:
        return False
    gradients = run.gradients(1)
    for training in (True, False):
        try:
            samples = SampleGradients(
                run.model_in(training), run.loss, run.batch(1), run.theta(0), run.buffers(0), list(gradients)
            )
            factor = samples.fit(gradients, step=1)
            total = samples.total()
        except (ExplaindError, RuntimeError, ValueError, TypeError, AttributeError):
            continue
        fed = {n: to_dense(g).to(total[n]) for n, g in gradients.items()}
        missed, size = (sum(float(t.double().square().sum()) for t in of.values()) ** 0.5 for of in (
            {n: g - factor * total[n] for n, g in fed.items()}, fed
        ))  # fmt: skip
        if missed <= _ROUNDING * torch.finfo(next(iter(fed.values())).dtype).eps * size:
            return True
    return False
