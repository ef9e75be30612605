"""What is drawn to check the rules for optimizers of other packages, and how these are made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from explaind_core import UpdateRule
from explaind_core.rules import SHAPES, Shapes, Trials

__all__ = ["Entry", "Strategies", "among", "draws", "given_hessians"]

Strategies = Mapping[str, st.SearchStrategy[Any]]
Kind = type[torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """One optimizer class, and the trainings that its rule is checked on.

    Attributes:
        rule: its rule.
        path: ``package:Class``, as users import it.
        hyper: constructor option -> what is drawn.
        scheduled: the same for a schedule and a second group.
        shapes: of the parameters.
        groups: how many parameter groups.
        tolerance: of one step in float64.
        elsewhere: check the point where the model is evaluated too.
        adapted: makes a subclass that can be stepped without arguments.
    """

    rule: type[UpdateRule]
    path: str
    hyper: Strategies
    scheduled: Strategies
    shapes: Shapes = SHAPES
    groups: int = 2
    tolerance: float = 1e-14
    elsewhere: bool = False
    adapted: Callable[[Kind], Kind] | None = None

    def kind(self) -> Kind:
        """The class. Raises ImportError where its package is not installed."""
        package, _, name = self.path.partition(":")
        found: Kind = getattr(importlib.import_module(package), name)
        return found

    def maker(self) -> Callable[..., torch.optim.Optimizer]:
        """Makes an optimizer that is ready for training."""
        kind = self.kind()
        made = kind if self.adapted is None else self.adapted(kind)

        def make(groups: Any, **options: Any) -> torch.optim.Optimizer:
            optimizer = made(groups, **options)
            if hasattr(optimizer, "train"):  # Schedule-Free optimizers start in evaluation mode
                optimizer.train()
            return optimizer

        make.__module__, make.__qualname__ = kind.__module__, kind.__qualname__
        return make

    def trials(self, name: str = "") -> tuple[Trials, ...]:
        """For the conformance kit, one for each point."""
        points = ("gradient", "evaluated") if self.elsewhere else ("gradient",)
        make = self.maker()
        return tuple(
            Trials(
                make,
                self.hyper,
                self.scheduled,
                shapes=self.shapes,
                groups=self.groups,
                tolerance=self.tolerance,
                point=point,
                name=f"{name}, evaluated point" if point == "evaluated" else name,
            )
            for point in points
        )


def given_hessians(kind: Kind) -> Kind:
    """SophiaH whose Hessian is drawn: gradients that are given have no graph to estimate it from."""

    class Given(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None, hessian: Any = None) -> Any:
            if hessian is not None:  # in replay
                return super().step(closure, hessian=hessian)
            t = int(self.param_groups[0].get("step", 0))
            generator, drawn = torch.Generator().manual_seed(t), None
            if t % 2 == 0:
                shapes = [p for group in self.param_groups for p in group["params"]]
                drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in shapes]
            return super().step(closure, hessian=drawn)

    Given.__module__, Given.__qualname__ = kind.__module__, kind.__qualname__
    return Given


def draws(*parts: Strategies, **more: st.SearchStrategy[Any]) -> Strategies:
    """Everything that is drawn: ``parts`` together, and ``more``."""
    joined = {name: strategy for part in parts for name, strategy in part.items()}
    return joined | more


def among(*values: Any) -> st.SearchStrategy[Any]:
    """One of these."""
    return st.sampled_from(values)


# A rate of 0 is where a warm-up starts. Values are sampled, not floats from 0 on: the smallest numbers round.
LR = st.floats(1e-4, 1.0) | st.just(0.0)
POSITIVE = st.floats(1e-2, 1.0)
BETA = among(0.1, 0.5, 0.98)
BETAS = st.tuples(among(0.0, 0.5, 0.98), among(0.5, 0.9, 0.999))
EPS = among(1e-8, 1e-3)
DECAY = among(0.0, 0.01, 0.2)
MOMENTUM = among(0.0, 0.9)
SWITCH = st.booleans()
SOME = draws(lr=LR, weight_decay=DECAY)
ADAPTIVE = draws(SOME, betas=BETAS, eps=EPS)
#: What nearly all of pytorch_optimizer's classes have.
PLAIN = draws(SOME, maximize=SWITCH, foreach=among(None, True, False))
COMMON = draws(PLAIN, weight_decouple=SWITCH, fixed_decay=SWITCH)
ADANORM = draws(adanorm=SWITCH, adanorm_r=among(0.5, 0.95))
RECTIFY = draws(rectify=SWITCH, n_sma_threshold=among(4, 5, 6), degenerated_to_sgd=SWITCH, adam_debias=SWITCH)
