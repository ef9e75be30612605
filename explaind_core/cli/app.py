"""The command line: ``explaind demo``, ``study``, ``check``, ``verify``, ``attribute``, ``optimizers`` and so on.

Exit status 0 means that the check a command names holds; 1 that it does not; 2 that the call was wrong, or a file is
damaged; 130 that it was interrupted.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from explaind_core.cli.optimizers import optimizers
from explaind_core.cli.study import INTERRUPTED, study
from explaind_core.errors import ExplaindError, QuestionError, printable

__all__ = ["main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(study)
app.command()(optimizers)
console = Console()

RunPath = Annotated[Path, typer.Argument(help="the folder that was passed to explaind.Recorder")]
ModelName = Annotated[str, typer.Option(help="MODULE:CALLABLE that returns the architecture")]
InputFile = Annotated[Path, typer.Option(help="test samples: a safetensors file; its tensor 'inputs', or keywords")]
Nodes = Annotated[str, typer.Option(help="quadrature nodes per step, 'adaptive' or 'midpoint:q'")]


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="where to write (runs/demo or runs/quick); an interrupted demo continues there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smaller modulus, within 2 minutes")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="explain all 2,000 test samples (scores only)")] = False,
    seed: Annotated[int | None, typer.Option(help="of data and initialisation")] = None,
) -> None:
    """Train the paper's modular-addition Transformer, record, verify and decompose it, draw Figure 3a."""
    from dataclasses import replace

    from explaind_studies import demo as study

    setting = study.QUICK if quick else study.PAPER
    if paper:
        setting = replace(setting, explained=setting.test)
    if seed is not None:
        setting = replace(setting, seed=seed)
    folder = out if out is not None else Path("runs") / ("quick" if quick else "demo")
    raise typer.Exit(0 if study.demo(folder, setting, console=console).holds else 1)


@app.command()
def check(run: RunPath) -> None:
    """Read every file of a recorded run and compare it with its checksums; 0 if all are intact."""
    from explaind_core.store import RunStore, damages

    found = damages(RunStore(run), progress=True)
    for error in found:
        console.print(str(error), markup=False, highlight=False)
    console.print(f"{len(found)} files are damaged or missing" if found else "every file is intact")
    raise typer.Exit(1 if found else 0)


@app.command()
def digest(
    path: Annotated[Path, typer.Argument(help="the folder of a recorded run or of a result")],
    expect: Annotated[str, typer.Option(help="the digest that it must have")] = "",
) -> None:
    """Print one SHA-256 over all files of a run or a result; with --expect, 0 only if it is that one."""
    import explaind_core as explaind

    found = explaind.digest(path)
    console.print(f"{found}  {printable(path)}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if expect and expect.lower() != found else 0)


@app.command()
def verify(
    run: RunPath,
    model: ModelName,
    inputs: InputFile,
    nodes: Nodes = "2",
    tolerance: float = 1e-3,
    max_update_error: Annotated[float, typer.Option(help="largest relative update error that passes")] = 1e-3,
) -> None:
    """Rebuild predictions from a recorded run and compare; 0 if every decision agrees and every update closes."""
    import explaind_core as explaind

    opened = explaind.open_run(run, model=_model(model))
    check = explaind.verify(opened, _inputs(inputs), nodes=_nodes(nodes), tolerance=tolerance)
    console.print(printable(check), markup=False)
    raise typer.Exit(0 if check.agreement == 1.0 and check.update_error <= max_update_error else 1)


@app.command()
def attribute(
    run: RunPath,
    model: ModelName,
    inputs: InputFile,
    out: Annotated[
        Path | None, typer.Option(help="the result, a zarr folder; an interrupted call continues there")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="axes to keep, of step, gradient_step, layer, parameter, train, test, output")
    ] = "step,layer,test,output",
    steps: Annotated[
        str | None, typer.Option(help="701:751 (the last left out), 1,5,9, or windows: a=200:250,b=450:500")
    ] = None,
    gradient_steps: Annotated[str | None, typer.Option(help="whose gradients count: 1:200, or 1,5,9")] = None,
    train: Annotated[
        str | None, typer.Option(help="ids of training samples: 0:100, 1,5,9, or groups: a=0:100,b=100:200")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="module prefixes, separated by commas")] = None,
    test: Annotated[str | None, typer.Option(help="rows of the inputs: 0:10, or 1,5,9")] = None,
    nodes: Annotated[str, typer.Option(help="nodes per step, 'adaptive', 'left' or 'midpoint:q'")] = "adaptive",
    tolerance: float = 1e-3,
    strategy: Annotated[
        str | None, typer.Option(help="forward, reverse, features or adjoint; the cheapest by default")
    ] = None,
    memory: Annotated[str, typer.Option(help="the most to hold at a time")] = "4GiB",
    max_update_error: Annotated[
        float | None, typer.Option(help="largest relative update error that is accepted; rounding by default")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="say what would be done and stop; 1 if the result exceeds --memory")
    ] = False,
) -> None:
    """Split predictions along the kept axes; 0 if the result closes to 1e-4 of the largest output."""
    import explaind_core as explaind
    from explaind_core.attribution import answer
    from explaind_core.questions import Question

    if out is None and not plan:
        raise QuestionError("it is not said where to write", where="--out", remedy="name a folder, or say --plan")
    question: dict[str, Any] = {
        "keep": tuple(axis for axis in keep.split(",") if axis),
        "steps": _selection(steps, "--steps"),
        "gradient_steps": _selection(gradient_steps, "--gradient-steps"),
        "train": _selection(train, "--train"),
        "layers": layers.split(",") if layers else None,
        "test": _selection(test, "--test"),
        "nodes": _nodes(nodes),
        "tolerance": tolerance,
        "strategy": strategy,
        "memory": memory,
        "max_update_error": max_update_error,
    }
    opened, samples = explaind.open_run(run, model=_model(model)), _inputs(inputs)
    if out is None or plan:
        planned = explaind.plan(opened, samples, **question)
        console.print(printable(planned), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if planned.fits else 1)
    asked = Question.ask(opened, samples, **question)
    try:
        result = answer(asked, out=out)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was finished lies at {out}: continue by the same command", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    closure = explaind.closure_error(result) / (float(abs(result.final).max()) or 1.0)
    console.print(printable(result), markup=False)
    console.print(f"closure error {closure:.1e} of the largest output; wrote {out}")
    raise typer.Exit(0 if closure <= 1e-4 else 1)


@app.command()
def check_plugin(
    rule: Annotated[str, typer.Argument(help="MODULE:RULE, a subclass of explaind.UpdateRule")],
    examples: Annotated[int, typer.Option(min=1, help="drawn trainings per family")] = 100,
) -> None:
    """Run the conformance kit and the symbolic proof on a rule; 0 if it is exact and its proof, if written, holds."""
    from explaind_core.conformance import check_plugin as check
    from explaind_core.rules import UpdateRule

    module, _, attribute = rule.partition(":")
    try:
        found = getattr(_imported(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QuestionError(
            f"the rule cannot be imported: {error}", expected="MODULE:RULE, such as my_package.plugin:MyRule", got=rule
        ) from error
    if not (isinstance(found, UpdateRule) or (isinstance(found, type) and issubclass(found, UpdateRule))):
        raise QuestionError("that is no rule", expected="a subclass of explaind.UpdateRule", got=repr(found))
    verdict = check(found, max_examples=examples, progress=True)
    console.print(str(verdict), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if verdict.holds else 1)


def _imported(module: str) -> Any:
    """A module that the caller named; an installed command does not look into the current folder by itself."""
    sys.path.insert(0, "")
    try:
        return importlib.import_module(module)
    finally:  # what it imports later is still found there, behind everything that is installed
        sys.path.remove("")
        if "" not in sys.path:
            sys.path.append("")


def _model(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        built = getattr(_imported(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise QuestionError(
            f"the model cannot be built: {error}", where="--model", expected="MODULE:CALLABLE", got=name
        ) from error
    if not isinstance(built, nn.Module):
        raise QuestionError("that is no model", where="--model", expected="a torch.nn.Module", got=type(built).__name__)
    return built


def _inputs(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from explaind_core.store import opened

    try:
        with opened(path, follow_links=True):  # a pipe is not waited for
            pass
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise QuestionError(f"the inputs cannot be read: {error}", where=path, expected="a safetensors file") from error
    return tensors["inputs"] if set(tensors) == {"inputs"} else tensors


def _nodes(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _selection(text: str | None, option: str) -> Any:
    """``7``, ``1,5,9``, ``701:751`` or ``a=200:250,b=450:500``, as a question takes them."""
    if text is None:
        return None
    parts = text.split(",")
    if "=" not in text:
        return _range(text, text, option) if len(parts) == 1 else [_range(p, text, option, single=True) for p in parts]
    named: dict[str, Any] = {}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or name in named:
            what = f"the name {name!r} is given twice" if name in named else f"{part!r} has no name"
            raise QuestionError(what, where=option, expected="different names: a=200:250,b=450:500", got=text)
        named[name] = _range(value, text, option)
    return named


def _range(part: str, text: str, option: str, *, single: bool = False) -> int | slice:
    """A number; or ``start:stop`` or ``start:stop:step``, each of which may be left out."""
    ends = part.split(":")
    try:
        if len(ends) == 1:
            return int(part)
        start, stop, step = (int(end) if end.strip() else None for end in [*ends, "", ""][:3])
        if single or len(ends) > 3 or (step is not None and step < 1):
            raise ValueError(part)
    except ValueError as error:
        raise QuestionError(
            f"{part!r} is no whole number" if len(ends) == 1 or single else f"{part!r} is no range",
            where=option,
            expected="a number (7), numbers (1,5,9), a range (701:751, or 1:100:10; its end is left out), "
            "or ranges with names (a=200:250,b=450:500)",
            got=text,
        ) from error
    return slice(start, stop, step)


def main() -> None:
    """Run the command line; errors of this library are printed without a traceback."""
    try:
        app()
    except ExplaindError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from error
