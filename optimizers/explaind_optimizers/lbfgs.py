"""L-BFGS: a preconditioner over all tensors at once, built from past gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from explaind_core import RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import LinearOperator

__all__ = ["LBFGSRule", "TwoLoop"]


@dataclass(frozen=True, eq=False)
class TwoLoop(LinearOperator):
    """The inverse Hessian of L-BFGS (Nocedal, 1980), applied by its two loops; it is symmetric.

    ``H_0 = scale I;  H_{j+1} = V_j^T H_j V_j + ro_j s_j s_j^T`` with ``V_j = I - ro_j y_j s_j^T`` and
    ``ro_j = 1 / <y_j, s_j>``.

    Args:
        scale: H_0's factor.
        differences: y_j, of gradients.
        moves: s_j, of parameters; the oldest first.
        ro: ``ro_j = 1 / <y_j, s_j>``.

    Example:
        >>> import torch
        >>> y, s = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
        >>> TwoLoop(0.5, (y,), (s,), (0.5,)).apply(y)  # the secant equation H y = s
        tensor([1., 0.])
    """

    scale: float
    differences: Sequence[Tensor]
    moves: Sequence[Tensor]
    ro: Sequence[float]

    def apply(self, x: Tensor) -> Tensor:
        """Both loops, in torch's own order of operations: a noisy pair has a huge ro_j, which amplifies rounding."""
        pairs = list(zip(self.differences, self.moves, self.ro, strict=True))
        weights = []
        for y, s, ro in reversed(pairs):
            weights.append(float(s.dot(x) * ro))
            x = x.add(y, alpha=-weights[-1])
        x = x * self.scale
        for y, s, ro in pairs:
            x = x.add(s, alpha=weights.pop() - float(y.dot(x) * ro))
        return x

    @property
    def adjoint(self) -> LinearOperator:
        """Itself."""
        return self


class LBFGSRule(UpdateRule):
    r"""torch.optim.LBFGS (Liu & Nocedal, 1989), with and without the strong-Wolfe line search.

    Each inner iteration is a step: ``theta <- theta - t_s H_s g`` over all tensors as one vector, H_s the two-loop
    inverse Hessian of the last ``history_size`` pairs. It is frozen: that H_s was built from past gradients is not
    part of their influence.
    """

    optimizers = ("torch.optim.lbfgs.LBFGS",)
    options = frozenset(
        {"lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn"}
    )
    flat = True
    no_closed_form = (
        "H_s is made of inner products over all tensors and of past gradients; it is read from the optimizer's state, "
        "and one element shows nothing of it"
    )

    def iterations(self, state: Mapping[str, Any]) -> int:
        """The state's ``n_iter``."""
        return int(state.get("n_iter", 0))

    def one_iteration(self, hyper: Mapping[str, Any], evaluations: int) -> Mapping[str, Any]:
        """One iteration, with what is left of ``max_eval`` (the line search stops there)."""
        return {"max_iter": 1, "max_eval": hyper["max_eval"] - evaluations + 1}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = t_s H_s``; 0 where the iteration found no descent and stayed."""
        after = step.after
        moved = bool(step.displacement.any())
        ro = tuple(map(float, after["ro"]))
        inverse = TwoLoop(float(after["H_diag"]), tuple(after["old_dirs"]), tuple(after["old_stps"]), ro)
        return StepCoefficients(preconditioner=inverse * float(after["t"]) if moved else 0.0)
