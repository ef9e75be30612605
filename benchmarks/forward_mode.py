"""What one (step, node) of forward mode costs, in plain forward passes over the same samples.

The demo's Transformer, six layers x two terms = twelve tangents. Prints, at 100, 500 and 2,000 samples, the time
of one node divided by that of one forward pass, per tangent, and layer by layer where it goes.
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved

from explaind_core.decomposition import StepDecomposition, UpdateSplit, updates_of
from explaind_core.derivatives import ExplainedFunction, Outputs
from explaind_core.questions import resolve_layers
from explaind_core.strategies import _integrate, _tangents
from explaind_core.training_step import ParameterInfo
from explaind_studies.modular_addition import LAYERS, ModularTransformer, modular_addition


def main(chunk: int = 500) -> None:
    """Print the table."""
    torch.manual_seed(0)
    task, model = modular_addition(), ModularTransformer(115)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    info = {n: ParameterInfo(t.shape, t.dtype, True) for n, t in theta.items()}
    layers, _ = resolve_layers(LAYERS, info)
    update = {n: 1e-3 * torch.randn_like(t) for n, t in theta.items()}
    updates = {n: UpdateSplit(u.double(), -u.double(), None, u.double()) for n, u in update.items()}
    split = StepDecomposition(1, updates, theta, {n: t + update[n] for n, t in theta.items()}, 0.0, 0.0, 0.0)
    tangents = _tangents(updates_of(split, ("kernel", "regularization")), split, layers, None)
    table = Table("samples", "forward, ms", "forwards per node", "per tangent", *LAYERS)
    for samples in (100, 500, 2000):
        inputs = task.test_inputs[:samples]
        function = ExplainedFunction(model, {}, inputs, Outputs(), chunk=chunk).at()
        shape = (len(layers), samples, 115)

        def forward(inputs: torch.Tensor = inputs) -> None:
            with torch.no_grad():
                model(inputs)

        timed = {
            "forward": forward,
            "node": lambda function=function, shape=shape: _integrate(function, split, tangents, ((0.5, 1.0),), shape),
        }
        for layer in layers:
            share = layer.share(update)
            timed[layer.name] = lambda function=function, share=share: function.derivatives(theta, [share, share])
        times = interleaved(timed)
        plain, node = times.pop("forward"), times.pop("node")
        cells = [f"{node / plain:.1f}", f"{node / plain / (2 * len(layers)):.2f}"]
        table.add_row(str(samples), f"{1e3 * plain:.2f}", *cells, *(f"{t / plain / 2:.2f}" for t in times.values()))
    console = Console(width=150)
    console.print(table)
    console.print("last columns: forwards per tangent of a layer alone (kernel and regularization at once)")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
