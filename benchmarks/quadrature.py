"""How many nodes are enough: the demo's own run, rebuilt with several, and its importances against 128 nodes.

Usage: python benchmarks/quadrature.py [runs/demo]. Needs a finished `explaind demo`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import xarray as xr

import explaind_core as explaind
from explaind_studies.demo import PAPER
from explaind_studies.modular_addition import LAYERS, ModularTransformer, modular_addition


def main(folder: str = "runs/demo") -> None:
    """Print agreement, KL and error by number of nodes, then the error of importances by step and layer."""
    task = modular_addition(PAPER.p, PAPER.train, PAPER.test, seed=PAPER.seed)
    run = explaind.open_run(Path(folder) / "run", model=ModularTransformer(task.vocabulary))
    inputs = task.test_inputs[: PAPER.explained]
    for nodes in (1, 2, "adaptive"):
        check = explaind.verify(run, inputs, nodes=nodes, tolerance=PAPER.tolerance)
        print(
            f"nodes {nodes}: {check.nodes_used:.2f} per step ({check.nodes_evaluated:.2f} evaluated), agreement "
            f"{check.agreement:.4f}, KL {check.kl:.2e}, max error {check.max_error:.3f} of {check.largest_output:.0f}"
        )
    stored = xr.open_zarr(Path(folder) / "result.zarr", consolidated=False, chunks=None)
    last = len(run.steps)
    for step in (11, last // 4, last // 2, 3 * last // 4, last):
        reference = explaind.attribute(run, inputs, steps=[step], layers=LAYERS, nodes=128, progress=False)
        truth = explaind.importance(reference.sel(step=step))
        for nodes in (1, 2, "the demo's"):
            if nodes == "the demo's":
                result = stored[["kernel", "regularization", "nodes"]].sel(step=step).load()
            else:
                result = explaind.attribute(run, inputs, steps=[step], layers=LAYERS, nodes=nodes, progress=False).sel(
                    step=step
                )
            error = abs(explaind.importance(result) / truth - 1).max()
            print(
                f"step {step}, {nodes} nodes ({int(result.nodes)}): importance differs from 128 nodes by at most "
                f"{float(error.kernel):.3%} (kernel), {float(error.regularization):.3%} (regularization) in any layer"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
