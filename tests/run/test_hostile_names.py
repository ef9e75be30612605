"""A manifest that names code, sealed as its writer would seal it: nothing is imported or made on its word alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import explaind_core as explaind
from explaind_core import errors
from explaind_core.cli import app as cli
from explaind_core.naming import qualified_name
from explaind_core.rules import default_registry, handed_over, import_installed
from explaind_core.run import optimizer_classes
from explaind_core.testing import record_example
from explaind_core.training_step import ForwardState, rebuild_loss

pytestmark = pytest.mark.timeout(240)
INPUTS = torch.ones(2, 4, dtype=torch.float64)
SGD, ADAMW = "explaind_optimizers.sgd.SGDRule", "explaind_optimizers.adam.AdamWRule"
INFERRED = "explaind_core.rules.inferred.InferredRule"


class Trap(torch.optim.SGD):
    """It is loaded, no rule names it, and making one leaves a trace."""

    made: Path

    def __init__(self, params, lr=1e-3, weight_decay=0.0, *, maximize=False):
        Trap.made.write_text("made")
        super().__init__(params, lr, weight_decay=weight_decay, maximize=maximize)


@pytest.fixture
def trace(tmp_path):
    Trap.made = tmp_path / "trace"
    return Trap.made


@pytest.fixture
def run():
    return record_example(steps=3)


def rewritten(run, rule="explaind_optimizers.adam.AdamWRule", **changes):
    """Another manifest, with a checksum that is right."""
    manifest = run.store.read_json("manifest.json")
    changes["rule"] = {**manifest["rule"], "name": rule, **changes.pop("rule_entries", {})}
    run.store.write_json("manifest.json", {**manifest, **changes})


def of_first_step(run, change):
    """Another header of step 1, sealed."""
    path = run.store.step_path(1)
    stored = run.store.read_tensors(path, what="step 1")
    change(stored.header)
    run.store.write_tensors(path, stored.header, stored.tensors)


QUESTIONS = {
    "verify": lambda run: explaind.verify(run, INPUTS, nodes=2, progress=False),
    "attribute": lambda run: explaind.attribute(run, INPUTS, progress=False),
    "similarity": lambda run: explaind.similarity(run, INPUTS, nodes=1, progress=False),
    "parameter_importance": lambda run: explaind.parameter_importance(run, INPUTS, progress=False),
    "plan": lambda run: explaind.plan(run, INPUTS),
    "decompose": lambda run: list(explaind.decompose(run)),
    "restore": lambda run: run.restore(run.model, torch.optim.AdamW(run.model.parameters()), 2),
    "fit": explaind.InferredRule.fit,
    "description": lambda run: (str(run.description), run.batch(1), run.metrics, run.theta(2)),
}
READING = ("description",)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("rule", [SGD, ADAMW, INFERRED, "nowhere.Rule"])
def test_a_loaded_class_that_no_rule_names_is_not_made(run, trace, rule, question):
    inferred = {"inferred": True, "settings": {"momentum": 0.5}} if rule == INFERRED else {}
    rewritten(run, rule, optimizer=qualified_name(Trap), rule_entries=inferred)
    opened = explaind.open_run(run.path, model=run.model)
    if question in READING:
        QUESTIONS[question](opened)
    else:
        with pytest.raises(errors.StoreError, match="is not known here"):
            QUESTIONS[question](opened)
    assert not trace.exists()


def test_a_class_is_made_where_the_program_vouches_for_it(run, trace):
    """By its name, in a maker or in a rule; by any rule that was given, where it is loaded."""

    class Naming(explaind.UpdateRule):
        optimizers = (qualified_name(Trap),)
        options = frozenset({"lr", "weight_decay"})

        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=step.hyper["lr"])

    class Another(Naming):
        optimizers = ("somewhere.Else",)

    rewritten(run, optimizer=qualified_name(Trap))

    def made(**given):
        trace.unlink(missing_ok=True)
        said = ""
        try:  # what becomes of a run that was recorded with something else is of no account here
            list(explaind.decompose(explaind.open_run(run.path, model=run.model, **given)))
        except errors.ExplaindError as error:
            said = str(error)
        return trace.exists(), said

    assert made(rule=Another())[0] is False
    happened, said = made(rule=Naming())  # AdamW's group has an option more
    assert not happened
    assert "that Naming does not declare" in said
    Naming.options = frozenset({"lr", "weight_decay", "maximize"})
    assert made(rule=Naming())[0]
    assert made(rule=explaind.InferredRule(force=True))[0]
    assert made(make_optimizer=Trap)[0]


def test_options_are_given_to_a_constructor_only_where_its_rule_declares_them(run):
    """AdamW's rule has ``capturable`` at False alone."""
    assert explaind.verify(run, INPUTS, nodes=2, progress=False).update_error < 1e-12  # False is inside
    of_first_step(run, lambda header: header["groups"][0].update(capturable=True))
    with pytest.raises(errors.StoreError, match=r"option of torch.optim.adamw.AdamW[\s\S]*capturable in \[False\]"):
        explaind.verify(explaind.open_run(run.path, model=run.model), INPUTS, nodes=2, progress=False)


def test_an_option_that_the_rule_does_not_declare_at_all_is_refused():
    class Quiet(explaind.UpdateRule):
        optimizers = ("torch.optim.sgd.SGD",)
        options = frozenset({"lr", "momentum"})

        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=step.hyper["lr"])

    check, rule = optimizer_classes.check_arguments, Quiet()
    check(torch.optim.SGD, rule, {"params": [], "lr": 1.0, "initial_lr": 1.0}, explaining=True, where="")
    with pytest.raises(errors.StoreError, match=r"Quiet does not declare[\s\S]*got: +nesterov=True"):
        check(torch.optim.SGD, rule, {"lr": 1.0, "nesterov": True}, explaining=False, where="")


def test_another_rule_is_told_before_the_optimizer_is_made(run, monkeypatch):
    def never(*_):
        raise AssertionError("it was made")

    rewritten(run, SGD)  # of AdamW
    opened = explaind.open_run(run.path, model=run.model)
    monkeypatch.setattr(optimizer_classes, "handed_over", lambda _: None)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", never)
    with pytest.raises(errors.RuleNotFoundError, match=r"recorded with another rule[\s\S]*AdamWRule"):
        explaind.verify(opened, INPUTS, nodes=2, progress=False)


@pytest.mark.parametrize("name", ["os.system", "antigravity.Optimizer", "torch.optim.sgd.sgd", "torch.optim.SGD.step"])
def test_a_name_that_is_no_optimizer_is_no_optimizer(name):
    with pytest.raises(errors.StoreError, match="is not installed here"):
        optimizer_classes.found_class(name.replace("antigravity", "no_such_package"), where="")
    assert handed_over(name) is None


# ------------------------------------------------------------------ what lies in the current folder
TRAPS = {"sophia": "SophiaG", "lion_pytorch/lion_pytorch": "Lion", "pytorch_optimizer/optimizer/lamb": "Lamb"}
CALLED = """
import sys
import explaind_core as explaind, torch
from explaind_core.plugins import default_registry
from torch import nn
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
try:
    explaind.verify(explaind.open_run(sys.argv[1], model=model), torch.ones(2, 4).double(), nodes=2, progress=False)
except explaind.errors.ExplaindError as error:
    print(type(error).__name__, error)
print([r.plugin for r in default_registry().rules() if "vil" in r.plugin])
"""
#: Leaves a trace where it is imported, and again where its class is made.
PLANTED = """
import pathlib, torch
pathlib.Path({trace!r}).write_text("imported")
class {name}(torch.optim.AdamW):
    pass
"""


@pytest.fixture
def hostile(tmp_path):
    """A folder with packages of the names that rules list, a plugin in the place of ours, and one of its own."""
    trace, folder = tmp_path / "trace", tmp_path / "hostile"
    for path, name in {**TRAPS, "explaind_optimizers/plugin": "Rule", "evil": "Rule"}.items():
        file = folder / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PLANTED.format(trace=str(trace), name=name))
        for parent in [p for p in file.parents if folder in p.parents]:
            (parent / "__init__.py").write_text(PLANTED.format(trace=str(trace), name=name))
    metadata = folder / "evil-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[explaind]\nevil = evil\n")
    (folder / "tiny.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()\n"
    )
    save_file({"inputs": INPUTS}, folder / "inputs.safetensors")
    return folder, trace


def called(folder, *command):
    """A process of its own in that folder, which Python puts in front of everything else."""
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize("path", TRAPS)
def test_nothing_is_imported_from_the_current_folder(run, hostile, path):
    folder, trace = hostile
    rule = next(
        r.rule for r in default_registry().rules()
        for name in r.rule.optimizers if name == f"{path.replace('/', '.')}.{TRAPS[path]}"
    )  # fmt: skip
    rewritten(run, qualified_name(type(rule)), optimizer=f"{path.replace('/', '.')}.{TRAPS[path]}")
    done = called(folder, "-c", CALLED, str(run.path))
    assert done.returncode == 0, done.stderr
    assert "is not installed here" in done.stdout or "pytorch_optimizer" in path
    assert done.stdout.splitlines()[-1] == "[]"
    assert not trace.exists()


@pytest.mark.parametrize("command", ["verify", "attribute", "check", "optimizers"])
def test_no_command_imports_anything_else_than_what_it_was_told_to(run, hostile, command):
    folder, trace = hostile
    rewritten(run, "explaind_optimizers.sophia.SophiaRule", optimizer="sophia.SophiaG")
    shell = "import sys; sys.path.remove(''); from explaind_core.cli import main; main()"  # as an installed command
    arguments = {
        "verify": ["--model", "tiny:build", "--inputs", "inputs.safetensors"],
        "attribute": ["--model", "tiny:build", "--inputs", "inputs.safetensors", "--out", str(folder / "result.zarr")],
    }.get(command, [])
    done = called(folder, "-c", shell, command, *([] if command == "optimizers" else [str(run.path)]), *arguments)
    assert not trace.exists(), done.stderr
    if arguments:
        assert done.returncode == 2
        assert "SophiaG" in done.stderr


def test_what_was_installed_from_the_current_folder_is_found(tmp_path, monkeypatch):
    """An editable installation names the folder in a file of the environment; being there alone does not."""
    from explaind_core.rules import installed

    (tmp_path / "site").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "lies_here_only.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "here"), *(p for p in sys.path if p)])
    monkeypatch.setattr(installed.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    with pytest.raises(ImportError):
        import_installed("lies_here_only")
    (tmp_path / "site" / "mine.pth").write_text(f"{tmp_path / 'here'}\n")
    assert import_installed("lies_here_only").__name__ == "lies_here_only"
    assert sys.path[0] == ""
    del sys.modules["lies_here_only"]


def test_a_module_that_the_caller_names_comes_first_and_what_is_installed_before_the_folder_later(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "named_by_the_caller.py").write_text("value = 3\n")
    assert cli._imported("named_by_the_caller").value == 3
    assert sys.path.index("") == len(sys.path) - 1
    del sys.modules["named_by_the_caller"]


# ------------------------------------------------------------------ losses, dtypes, devices, settings
@pytest.mark.parametrize(
    "settings", [{"weight": []}, {"reduction": {"a": 1}}, {"command": "rm"}, {"ignore_index": [1]}]
)
def test_settings_of_a_loss_are_plain_and_its_own(settings):
    said = {"name": "torch.nn.modules.loss.CrossEntropyLoss", "settings": settings}
    with pytest.raises(errors.StoreError, match="the recorded loss cannot be built again"):
        rebuild_loss(said)
    assert rebuild_loss({**said, "settings": {"ignore_index": 1}}).ignore_index == 1


@pytest.mark.parametrize("name", ["os.system", "torch.nn.modules.loss.torch", "torch.nn.modules.loss.Tensor"])
def test_no_penalty_is_made_from_a_name(run, name):
    rewritten(run, penalty={"name": name, "settings": {}}, loss={"name": name, "settings": {}})
    opened = explaind.open_run(run.path, model=run.model)
    assert (opened.penalty, opened.loss) == (None, None)


FORWARD = {"training": True, "exceptions": [], "autocast": None, "device_type": "cpu", "rng": [], "scale": 1.0}


@pytest.mark.parametrize("name", ["torch.load", "load", "torch.nn", "float32", "torch.int64", "torch.bfloat16 ", 7, []])
def test_only_dtypes_of_autocast_are_dtypes_of_autocast(name):
    for good in ("torch.bfloat16", "torch.float16"):
        with ForwardState.stored({**FORWARD, "autocast": good}, {}).cast():
            assert str(torch.get_autocast_dtype("cpu")) == good
    with pytest.raises(errors.StoreError, match="names a dtype that is none"):
        ForwardState.stored({**FORWARD, "autocast": name}, {})
    with pytest.raises(errors.StoreError, match="names a dtype that is none"):
        ForwardState(training=True, autocast=name).cast()


@pytest.mark.parametrize("name", ["os", "torch", "nn", "cpu:x", "meta", "__class__", 7])
def test_only_devices_are_devices(name):
    ForwardState.stored({**FORWARD, "rng": ["cuda:0"]}, {"cuda:0": torch.zeros(1)})
    with pytest.raises(errors.StoreError, match="names a device that is none"):
        ForwardState.stored({**FORWARD, "device_type": name}, {})
    with pytest.raises(errors.StoreError, match="names a device that is none"):
        ForwardState.stored({**FORWARD, "rng": [name]}, {name: torch.zeros(1)})


def test_a_header_that_names_no_dtype_is_told_by_the_run(run):
    of_first_step(run, lambda header: header["batches"][0].update(forward={**FORWARD, "autocast": "torch.load"}))
    with pytest.raises(errors.StoreError, match=r"autocast is 'torch.load' where"):
        explaind.open_run(run.path, model=run.model).batch(1)


def test_no_attribute_of_the_model_is_touched_by_a_name():
    class Model(torch.nn.Linear):
        @property
        def touched(self):
            raise AssertionError("it was touched")

    model = Model(1, 1)
    with (
        pytest.raises(errors.StoreError, match="lacks a module"),
        ForwardState(training=True, exceptions=("touched",)).applied(model),
    ):
        pass


@pytest.mark.parametrize(
    "settings",
    [{"momentum": "0.5"}, {"momentum": 1.0}, {"force": "yes"}, {"nesterov": 1}, {"preconditioner": "os.system"},
     {"decay": []}, {"bound": None}, {"bound": 0.0}, {"command": "rm"}, {"closed_by_secant": False}],
)  # fmt: skip
def test_settings_of_an_inferred_rule_are_its_own(run, settings):
    rewritten(run, INFERRED, rule_entries={"inferred": True, "settings": settings})
    with pytest.raises(errors.StoreError, match="settings of the run's inferred rule cannot be read"):
        explaind.open_run(run.path, model=run.model)


def test_good_settings_of_an_inferred_rule_are_taken(run):
    settings = {"momentum": 0.99, "force": True, "nesterov": True, "bound": 1}
    rewritten(run, INFERRED, rule_entries={"inferred": True, "settings": settings})
    opened = explaind.open_run(run.path, model=run.model)
    assert json.loads(json.dumps(opened.rule.settings())) == opened.rule.settings() | settings
    assert os.path.isdir(opened.path)
