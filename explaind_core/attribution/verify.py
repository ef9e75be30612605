"""verify(): does the declared algebra rebuild every update, and the kernel the prediction?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from torch import Tensor

from explaind_core.attribution.attribute import TERMS, attribute, summed
from explaind_core.run import Run

__all__ = ["Verification", "agreement", "kl_divergence", "verify"]


@dataclass(frozen=True)
class Verification:
    """How well the decomposition rebuilds a run's predictions (the paper's Table 1). Prints as a table.

    Attributes:
        agreement: fraction of samples whose argmax (J = 1: sign) agrees with the model's.
        kl: mean ``KL(softmax(f) || softmax(rebuilt))`` in nats; None for J = 1.
        max_error: of ``|rebuilt - f|`` over samples and outputs.
        mean_error: of the same.
        largest_output: ``max |f|``.
        update_error: the largest relative distance of a declared update from the recorded one, whose unit is never
            below 4,096 roundings of the parameters (:class:`explaind_core.decomposition.StepDecomposition`).
        correction: the largest size of a rank-one secant relative to its update; None for a rule that needs none.
        rule: the rule; an inferred one says so.
        nodes_used: nodes per step on average (accepted).
        nodes_evaluated: the same, refinements included.
        steps: how many were verified.
        samples: of how many test samples.
        parameters: of how many entries.
        asked: with which nodes.
        result: per step: ``residual`` (step, test, output), ``nodes``, ``converged``, ``update_error``.
    """

    agreement: float
    kl: float | None
    max_error: float
    mean_error: float
    largest_output: float
    update_error: float
    correction: float | None
    rule: str
    nodes_used: float
    nodes_evaluated: float
    steps: int
    samples: int
    parameters: int
    asked: str
    result: xr.Dataset

    @property
    def residual(self) -> xr.DataArray:
        """What the quadrature and training's own rounding left open: (step, test, output)."""
        residual: xr.DataArray = self.result.residual
        return residual

    def rows(self) -> list[tuple[str, str]]:
        """The table's rows; the first three are those of the paper's Table 1."""
        per_step: xr.DataArray = abs(self.residual).max([d for d in self.residual.dims if d != "step"])
        worst = int(np.argmax(per_step.values))
        return [
            ("integration steps (nodes per step)", f"{self.nodes_used:.2f} ({self.asked})"),
            ("EPK accuracy (agreement)", f"{self.agreement:.4f}"),
            ("KL divergence", "-" if self.kl is None else f"{self.kl:.2e}"),
            ("max error", f"{self.max_error:.2e} (outputs reach {self.largest_output:.3g})"),
            ("mean error", f"{self.mean_error:.2e}"),
            ("largest residual of a step", f"{float(per_step[worst]):.2e} (step {int(per_step.step[worst])})"),
            ("largest relative update error", f"{self.update_error:.2e}"),
            *([] if self.correction is None else [("largest secant, of its update", f"{self.correction:.2e}")]),
            ("rule", self.rule),
            ("steps x parameters x samples", f"{self.steps} x {self.parameters:,} x {self.samples}"),
            ("steps that missed the tolerance", f"{int((~self.result.converged).sum())}"),
        ]

    def __str__(self) -> str:
        table = Table(title="prediction rebuilt from the decomposition", show_header=False)
        for row in self.rows():
            table.add_row(*row)
        text = StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue()


def agreement(reference: Tensor, rebuilt: Tensor) -> float:
    """Fraction of rows ``[n, J]`` whose argmax agrees; for J = 1, whose sign does.

    Example:
        >>> agreement(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        0.5
    """
    if reference.shape[1] == 1:
        return float(((reference > 0) == (rebuilt > 0)).double().mean())
    return float((reference.argmax(1) == rebuilt.argmax(1)).double().mean())


def kl_divergence(reference: Tensor, rebuilt: Tensor) -> float:
    """Mean ``KL(softmax(reference) || softmax(rebuilt))`` over rows ``[n, J]``, in nats.

    Log-probabilities are their own logits; rebuilt ones, which need not be normalised, are renormalised.

    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2))
        0.0
    """
    p, q = reference.log_softmax(1), rebuilt.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def verify(
    run: Run,
    inputs: Any,
    *,
    nodes: int | str = 2,
    tolerance: float = 1e-3,
    max_nodes: int = 32,
    output: Any = None,
    memory: str | int = "4GiB",
    random_state: int | None = None,
    progress: bool = True,
) -> Verification:
    """Rebuild predictions from ``f(theta_0)`` and the declared updates alone, and compare (paper, section 3.1).

    ``rebuilt(x) = f(theta_0; x) + sum_s phi_s(x) (declared update of step s)``: the residual is left out.

    Args:
        run: a run opened with its model.
        inputs: the samples, as for :func:`explaind_core.attribute`.
        nodes: Gauss-Legendre nodes per step, ``"adaptive"`` (see ``tolerance``, ``max_nodes`` there), or
            ``"midpoint:100"``: the paper's rule, with as many integration steps.
        tolerance: adaptive only, see there.
        max_nodes: adaptive only, see there.
        output: what is rebuilt, the model's outputs by default.
        memory: the most that the result, and what is held to compute it, may take.
        random_state: the seed of a model that draws random numbers in evaluation mode, see there.
        progress: show a bar with the remaining time.

    Example:
        >>> from explaind_core.testing import record_example
        >>> check = verify(record_example(steps=3), torch.ones(2, 4, dtype=torch.float64), progress=False)
        >>> check.agreement, check.update_error < 1e-12, check.max_error < 1e-6
        (1.0, True, True)
    """
    result = attribute(
        run, inputs, keep=("step", "test", "output"), output=output, nodes=nodes, tolerance=tolerance,
        max_nodes=max_nodes, memory=memory, random_state=random_state, progress=progress,
        max_update_error=math.inf,  # it is told, and not refused
    )  # fmt: skip
    return from_result(run, result)


def from_result(run: Run, result: xr.Dataset) -> Verification:
    """The verification that a result over (step, test, output), of all steps and layers, contains."""
    rebuilt, reference = torch.from_numpy(summed(result, TERMS).values), torch.from_numpy(result.final.values)
    error = (rebuilt - reference).abs()
    steps = result.sizes["step"]
    return Verification(
        agreement=agreement(reference, rebuilt),
        kl=kl_divergence(reference, rebuilt) if reference.shape[1] > 1 else None,
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        largest_output=float(reference.abs().max()),
        update_error=float(result.update_error.max()),
        correction=float(result.correction.max()) if "correction" in result else None,
        rule=f"INFERRED: {result.attrs['rule']}" if result.attrs["inferred"] else str(result.attrs["rule"]),
        nodes_used=float(result.nodes.sum()) / steps,
        nodes_evaluated=float(result.evaluations.sum()) / steps,
        steps=steps,
        samples=len(reference),
        parameters=sum(p.shape.numel() for p in run.parameters.values()),
        asked=str(result.attrs["nodes_asked"]),
        result=result,
    )
