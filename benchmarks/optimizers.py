"""Measures every rule: drawn trainings by the conformance kit, and 50 recorded steps of the demo's Transformer.

Writes docs/optimizers.json (the numbers) and docs/optimizers.md (the table made from them and from the registry, by
tools/optimizer_tables.py)::

    make optimizers                                     # all rules, 200 drawn trainings for each family
    make optimizers ARGS="--only AdamWRule --examples 20"
    make optimizers ARGS=--page                         # only makes the page anew
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import explaind_core as explaind
from explaind_core.conformance import check_trials
from explaind_core.errors import ConformanceError
from explaind_core.naming import qualified_name
from explaind_core.plugins import default_registry
from explaind_core.progress import track
from explaind_studies.modular_addition import ModularTransformer, modular_addition
from optimizer_tables import tables

DOCS = Path(__file__).parent.parent / "docs"
STEPS = 50
BATCH = 500
#: What the demo's model needs beyond an optimizer's own defaults.
OPTIONS = {
    "LBFGSRule": {"max_iter": 5, "line_search_fn": "strong_wolfe"},
    "SGDScheduleFreeRule": {"lr": 0.01},
    "RpropRule": {"lr": 1e-3, "step_sizes": (1e-6, 1e-2)},
    "SGDRule": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-3},
    "RMSpropRule": {"momentum": 0.9, "centered": True, "lr": 1e-3},
    "ShampooRule": {"preconditioning_compute_steps": 10, "lr": 1e-4},
}


HEAD = """# All optimizers

Made by `make optimizers` from the registry and from measurements on this page's own versions (optimizers.json); do not
edit by hand. Notation: [theory.md](theory.md).

- *one step*: largest distance of theta_{s-1} + declared update from the optimizer's own theta_s, over all drawn
  trainings (hyper-parameters, schedules, groups, shapes, missing and zero gradients, clipping), relative to
  1 + max|theta| + max|kernel| + max|regularization|.
- *rollout*: the same after up to 6 steps by the declaration alone. *alphas*: the filter's recurrence against the
  explicit sum over the step learning rates. *adjoints*: <A x, y> against <x, A' y>, for every declared operator.
- *one step, float32*: what remains when the optimizer itself computes in single precision: its rounding.
- *proof*: in how many configurations `explaind.symbolic.prove` showed the declaration to be the optimizer's recursion.
"""


def train(rule, make, dtype, folder):
    """50 steps (LBFGS: inner iterations) of the demo's Transformer on batches of 500 of its 4,000 samples."""
    task = modular_addition()
    torch.manual_seed(0)
    model = ModularTransformer(task.vocabulary).to(dtype)
    name, loss = type(rule).__name__, nn.NLLLoss()
    if name == "MuonRule":  # for matrices only; other parameters stay as they are
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make([{"params": parameters}], **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    with explaind.Recorder(folder / "run", model, optimizer, loss, train_size=4000) as recorder:
        while recorder.steps < STEPS:
            ids = torch.randperm(4000, generator=generator)[:BATCH]
            inputs, targets = task.train_inputs[ids], task.train_targets[ids]

            def closure(inputs=inputs, targets=targets):
                optimizer.zero_grad()
                value = loss(model(inputs), targets)
                value.backward()
                if name == "SparseAdamRule":
                    for p in parameters:
                        p.grad = p.grad.to_sparse(1)
                return value

            recorder.batch(inputs, targets, ids=ids)
            if rule.iterations({}) is not None:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    run = explaind.open_run(
        folder / "run", model=model, until=STEPS, make_optimizer=lambda groups: make(groups, **OPTIONS.get(name, {}))
    )
    return run, task.test_inputs[:10]


def closes(run, inputs):
    """How far the declared updates of a run are from its parameters, and from its predictions."""
    errors, units, corrections = [], [], []
    total = {n: torch.zeros(i.shape, dtype=torch.float64) for n, i in run.parameters.items()}
    for step in explaind.decompose(run):
        missed = sum(float((u.declared - u.displacement).square().sum()) for u in step.updates.values()) ** 0.5
        moved = sum(float(u.displacement.square().sum()) for u in step.updates.values()) ** 0.5
        size = sum(float(step.theta[n].double().square().sum()) for n in step.updates) ** 0.5
        errors.append(missed / moved if moved else 0.0)
        units.append(missed / (size * torch.finfo(next(iter(step.theta.values())).dtype).eps))
        corrections.append(step.correction)
        for n, update in step.updates.items():
            total[n] += update.declared
    first, last = run.theta(0), run.theta(len(run.steps))
    size = max(float(t.abs().max()) for t in last.values())
    path = max(float((last[n].double() - first[n].double() - total[n]).abs().max()) for n in total) / size
    result = explaind.attribute(run, inputs, keep=("layer", "test", "output"), nodes=2, progress=False)
    return {
        "update_error": sorted(errors)[len(errors) // 2],
        "largest_update_error": max(errors),
        "roundings": max(units),
        "correction": max(corrections),
        "path": path,
        "closure": explaind.closure_error(result) / float(abs(result.final).max()),
        "steps": len(run.steps),
    }


def measure(rule, examples):
    """Both kinds of numbers for one rule."""
    families = default_registry().trials_for(rule)
    kit = {}
    for trials in families:
        found = vars(check_trials(rule, trials, max_examples=examples))
        kit[trials.name] = found | {"tolerance": trials.tolerance}
    runs = {}
    for dtype in (torch.float64, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            run, inputs = train(rule, families[0].make_optimizer, dtype, Path(folder))
            runs[str(dtype)] = closes(run, inputs)
    double, single = runs["torch.float64"], runs["torch.float32"]
    text = (
        f"{double['steps']} steps of the demo's Transformer, float64 and float32: update error, median over steps, "
        f"{double['update_error']:.1e} and {single['update_error']:.1e}, at most {double['roundings']:.2g} and "
        f"{single['roundings']:.2g} times eps |theta|; path theta_0 to theta_N rebuilt to {double['path']:.1e} and "
        f"{single['path']:.1e}; closure error of predictions {double['closure']:.1e} and {single['closure']:.1e}"
    )
    if rule.closed_by_secant:
        text += f"; secants up to {double['correction']:.1e} of the update"
    return {"kit": kit, "run": {**runs, "text": text}}


def main():
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="names of rules")
    parser.add_argument("--half", type=int, help="0 or 1: every second rule, for two processes at once")
    parser.add_argument(
        "--page", action="store_true", help="only make docs/optimizers.md anew from docs/optimizers.json"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch's own Adagrad
    torch.set_num_threads(1)
    numbers = DOCS / "optimizers.json"
    known = json.loads(numbers.read_text()) if numbers.exists() else {"rules": {}}
    rules = [r.rule for r in default_registry().rules() if not asked.only or type(r.rule).__name__ in asked.only]
    rules = rules if asked.half is None else rules[asked.half :: 2]
    for rule in track([] if asked.page else rules, len(rules), "measuring", enabled=not asked.page):
        start = time.perf_counter()
        try:
            found = measure(rule, asked.examples)
        except ConformanceError as error:
            if "is installed here" not in str(error):
                raise
            print(f"{type(rule).__name__}: not measured, {error.what}")
            continue
        if numbers.exists():  # another process may measure other rules
            known = json.loads(numbers.read_text())
        known["rules"][qualified_name(type(rule))] = found
        known |= {"torch": torch.__version__, "python": platform.python_version(), "examples": asked.examples}
        numbers.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"{type(rule).__name__}: {time.perf_counter() - start:.0f} s")
    drawn = f"{known.get('examples')} drawn trainings of each family, and a quarter as many in float32"
    measured = f"Measured with torch {known.get('torch')}, {drawn}."
    (DOCS / "optimizers.md").write_text(f"{HEAD}\n{measured}\n\n{tables(known['rules'])}")


if __name__ == "__main__":
    main()
