"""What the grokking study computes, at the paper's size and small."""

from __future__ import annotations

from dataclasses import dataclass

from explaind_studies import demo

__all__ = ["EXPERIMENTS", "PAPER", "QUICK", "GrokkingSetting"]

#: Experiment -> figures and tables of the paper.
EXPERIMENTS = {
    "influences": "Figure 3a",
    "pipelines": "Figures 3b and 8",
    "longer": "Figure 3b, trained five times as long",
    "kernels": "Figures 4, 5 and 6",
    "swapping": "Figure 7",
    "lasso": "Figure 9 and Table 2",
}


@dataclass(frozen=True)
class GrokkingSetting(demo.Setting):
    """The study of section 5: a modular-addition experiment, and what is asked of it.

    Attributes:
        explained: test samples whose predictions are explained.
        train_explained: training samples whose predictions are explained (Figure 4's lower row).
        window: steps before a stage.
        kernel_nodes: quadrature nodes of each step there.
        restarts: seeds of the trainings from parts of checkpoints.
        restart_steps: their length.
        test_every: steps between measurements of test accuracy there, and between swaps of layers.
        alpha: weight of the lasso's penalty.
        memory: bytes that kernel slices may take.
        experiments: which to run; the lasso needs the kernels.
        samples_at_once: samples explained in one pass of Figure 3a.
        tolerance: of its adaptive nodes.
    """

    explained: int = 500
    train_explained: int = 250
    window: int = 50
    kernel_nodes: int = 2
    restarts: int = 5
    restart_steps: int = 200
    test_every: int = 5
    alpha: float = 1e-3
    memory: str = "16GiB"
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)

    @property
    def longer_steps(self) -> int:
        """Length of the trainings that go on where those of Figure 3b end."""
        return 5 * self.restart_steps


PAPER = GrokkingSetting()
QUICK = GrokkingSetting(
    p=23, train=200, test=76, seed=0, most_steps=200, explained=40, train_explained=20, samples_at_once=40, window=10,
    restarts=2, restart_steps=20,
)  # fmt: skip
