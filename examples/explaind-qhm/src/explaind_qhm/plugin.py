"""What explaind-core must know of QHM."""

from typing import Any

import explaind_core as explaind


class QHMRule(explaind.UpdateRule):
    """QHM (Ma & Yarats, 2019): ``m <- beta m + (1 - beta) g;  theta <- theta - lr [(1 - nu) g + nu m]``."""

    optimizers = ("explaind_qhm.optimizer.QHM",)
    options = frozenset({"lr", "beta", "nu", "weight_decay"})
    filter_states = ("average",)

    def coefficients(self, step: explaind.RecordedStep) -> explaind.StepCoefficients:
        """``A = beta, B = 1 - beta``; the filter reads out ``nu beta m + (1 - nu beta) g``; ``P_s = lr``."""
        beta, nu = step.hyper["beta"], step.hyper["nu"]
        return explaind.StepCoefficients(
            filter=explaind.LinearFilter(A=((beta,),), B=(1 - beta,), C=(nu * beta,), D=1 - nu * beta),
            preconditioner=step.hyper["lr"],
            coupled_decay=step.hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """The step as the paper writes it (its equations 3 and 4), for the symbolic proof."""
        hyper, beta, nu = step.hyper, step.hyper["beta"], step.hyper["nu"]
        g = step.gradient + hyper["weight_decay"] * step.theta
        m = step.state["average"] = beta * step.state["average"] + (1 - beta) * g
        return step.theta - hyper["lr"] * ((1 - nu) * g + nu * m)

    def alpha(self, s: Any, i: Any, hyper: Any) -> Any:
        """``nu (1 - beta) beta^(s-i)``, and ``1 - nu`` more for the present gradient."""
        average = hyper["nu"] * (1 - hyper["beta"]) * hyper["beta"] ** (s - i)
        return average + 1 - hyper["nu"] if i == s else average


@explaind.hookimpl
def explaind_update_rules() -> list[explaind.UpdateRule]:
    """The rules of this package."""
    return [QHMRule()]
