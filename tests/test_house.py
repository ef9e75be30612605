"""The house holds: what loads, what is public, who may import whom, what a face hands on, how long a file is."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import explaind_core as explaind

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "explaind_core"
FOLDERS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())


# ------------------------------------------------------------------ what loads
def test_importing_the_package_loads_nothing_heavy():
    """What only proofs, the conformance kit, pictures and integrations need."""
    heavy = ("hypothesis", "sympy", "matplotlib", "transformers", "lightning", "plotly", "sklearn", "scipy")
    code = f"import sys, explaind_core; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------ what is public
#: Paths that plugins, scripts and docs import, each with a name that is found there.
PATHS = {
    "explaind_core.operators": ["Diagonal", "Left", "Right", "Rotated", "RankOne", "LinearOperator"],
    "explaind_core.testing": ["check_update_rule", "check_plugin", "record_example", "run_case", "Case", "Trials"],
    "explaind_core.data": ["indexed_loader", "with_ids", "IndexedDataset"],
    "explaind_core.symbolic": ["prove", "Proof", "RecursionStep", "SymbolicTensor"],
    "explaind_core.plugins": ["Registry", "default_registry"],
    "explaind_core.errors": ["ExplaindError", "StoreError", "QuestionError", "ConformanceError"],
    "explaind_core.integrations.huggingface": ["RecorderCallback", "returning_logits"],
    "explaind_core.integrations.lightning": ["RecorderCallback", "NamedBatch", "named"],
}
#: The contract with users' scripts: named once, kept for good.
PUBLIC = [
    "Activation", "Chosen", "Function", "InferredRule", "LinearFilter", "LogProbabilities", "Loss", "Output",
    "Outputs", "PerRow", "Plan", "RecordedStep", "Recorder", "Run", "Sample", "Shared", "StepCoefficients",
    "StoreSize", "UpdateRule", "Verification", "attribute", "attribute_checkpoints", "by_parameter",
    "closure_error", "decompose", "digest", "errors", "fit_inferred", "hookimpl", "import_checkpoints", "importance",
    "kernel_slices", "open_result", "open_run", "operators", "parameter_importance", "plan", "plan_similarity",
    "relative_regularization", "similarity", "spread_residual", "store_size", "symbolic", "testing", "top_samples",
    "verify",
]  # fmt: skip


@pytest.mark.parametrize(("path", "names"), PATHS.items(), ids=PATHS)
def test_an_import_path_stays(path, names):
    if path.startswith("explaind_core.integrations."):
        pytest.importorskip({"huggingface": "transformers", "lightning": "lightning"}[path.rpartition(".")[2]])
    module = importlib.import_module(path)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", sorted({*PUBLIC, *explaind.__all__}))
def test_a_public_name_is_there(name):
    assert getattr(explaind, name) is not None


def test_the_public_names_are_those_of_the_contract():
    """A new one is entered above; testing and symbolic load when they are asked for."""
    assert {*explaind.__all__, "testing", "symbolic"} == set(PUBLIC)
    assert explaind.__all__ == sorted(explaind.__all__)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            explaind.Run,
            ["steps", "parameters", "theta", "hyper", "batch", "gradients", "buffers", "metrics", "rule_name"],
        ),
        (explaind.Verification, ["agreement", "kl", "max_error", "update_error", "nodes_used"]),
        (explaind.Recorder, ["batch", "log", "flush", "stop", "close", "skipped"]),
    ],
)
def test_what_scripts_ask_of_a_public_class_is_there(kind, names):
    known = {*dir(kind), *kind.__annotations__, *re.findall(r"^ +(\w+): ", inspect.getdoc(kind), re.MULTILINE)}
    assert set(names) <= known


def test_the_losses_of_transformers_are_found_under_the_name_that_older_runs_have():
    from explaind_core.training_step import rebuild_loss, transformers_losses

    assert transformers_losses.LOSSES
    for name, loss in transformers_losses.LOSSES.items():
        assert rebuild_loss({"name": f"explaind_core.integrations.losses.{name}"}) is loss
        assert rebuild_loss({"name": f"explaind_core.training_step.transformers_losses.{name}"}) is loss
        assert rebuild_loss({"name": f"elsewhere.{name}"}) is None


# ------------------------------------------------------------------ the import contract
def copied(folder):
    """The packages and the contract in a folder of their own."""
    ignore = shutil.ignore_patterns("__pycache__")
    for path in (PACKAGE, ROOT / "optimizers" / "explaind_optimizers", ROOT / "studies" / "explaind_studies"):
        shutil.copytree(path, folder / path.name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def linted(folder):
    """Exit status and words of lint-imports there."""
    command = Path(sys.executable).parent / "lint-imports"
    if not command.exists():
        pytest.skip("import-linter is not installed")
    paths = os.pathsep.join(map(str, [folder, ROOT / "tools"]))
    done = subprocess.run(
        [command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract", "named"),
    [
        pytest.param(
            "store/size.py", "from explaind_core.run import Run",
            "Folders import from lower stages only",
            "explaind_core.store.size -> explaind_core.run (l.{line})", id="up",
        ),
        pytest.param(
            "store/locations.py", "from explaind_core.store.run_store import RunStore",
            "No circles inside a folder", "explaind_core.store", id="circle",
        ),
        pytest.param(
            "rules/rule.py", "import explaind_optimizers",
            "The core names no optimizer", "explaind_core.rules.rule -> explaind_optimizers (l.{line})", id="optimizer",
        ),
        pytest.param(
            "scores/grams.py", "import sympy",
            "hypothesis and sympy load behind testing and symbolic",
            "explaind_core.scores.grams -> sympy (l.{line})", id="weight",
        ),
        pytest.param(
            "scores/importance.py", "import matplotlib", ".* matplotlib behind plots",
            "explaind_core.scores.importance -> matplotlib (l.{line})", id="pictures",
        ),
    ],
)  # fmt: skip
def test_an_import_against_the_contract_is_named(tmp_path, file, line, contract, named):
    copied(tmp_path)
    changed = tmp_path / "explaind_core" / file
    text = changed.read_text().rstrip("\n")
    changed.write_text(f"{text}\n{line}\n")
    status, words = linted(tmp_path)
    assert status == 1
    assert re.search(rf"{contract}.* BROKEN", words)
    assert named.format(line=text.count("\n") + 2) in words


def test_the_contract_is_kept_and_no_new_folder_escapes_it(tmp_path):
    copied(tmp_path)
    status, words = linted(tmp_path)
    assert status == 0, words
    (tmp_path / "explaind_core" / "attic.py").write_text("")
    status, words = linted(tmp_path)
    assert status == 1
    assert "explaind_core.attic" in words


# ------------------------------------------------------------------ faces
#: Who counts as a user of a face, beside the other folders of the package.
USERS = ("optimizers", "studies", "benchmarks", "tools", "examples")
#: Names that a face hands on though nobody imports them from it, and why.
HANDED_ON = {
    "cli.main": "the command explaind: an entry point in pyproject.toml",
    "strategies.Strategy": "what a further strategy extends",
    "symbolic.Datum": "what a recursion's branches may decide by, for authors of rules",
    "symbolic.Proof": "what prove returns",
    "symbolic.ProvedConfiguration": "what a Proof holds",
    "symbolic.RecursionStep": "what UpdateRule.recursion is given, for authors of rules",
    "symbolic.Standing": "what standing returns",
    "symbolic.SymbolicTensor": "what a RecursionStep holds, for authors of rules",
    "symbolic.prove": "the proof itself, for authors of rules and for tests",
}
#: Modules that are imported past their folder's face, and why.
PAST_THE_FACE = {
    "explaind_core/operators.py: explaind_core.rules.operators": "it is that module under its public name",
}


def imports(path):
    """Every ``from module import name`` of a file, and every ``import module`` as ``(module, None)``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def home(path):
    """The folder of the package that a file is in, or nothing."""
    inside = path.relative_to(ROOT).parts
    return inside[1] if inside[0] == "explaind_core" and len(inside) > 2 else ""


def files(*folders):
    """All Python files below."""
    return [p for name in folders for p in sorted((ROOT / name).rglob("*.py")) if ".venv" not in p.parts]


def faces_of(paths):
    """Folder -> the names that files of other folders import from its face."""
    used = {folder: set() for folder in FOLDERS}
    for path in paths:
        for module, name in imports(path):
            parts = module.split(".")
            if module == "explaind_core.plugins":
                parts = ["explaind_core", "rules"]  # which it hands on, all of it
            if parts[0] == "explaind_core" and len(parts) == 2 and parts[1] in used and parts[1] != home(path):
                used[parts[1]].add(name)
    return used


def unused(paths):
    """What faces hand on and nobody imports."""
    used = faces_of(paths)
    found = set()
    for folder in FOLDERS:
        face = importlib.import_module(f"explaind_core.{folder}")
        found |= {f"{folder}.{name}" for name in getattr(face, "__all__", []) if name not in used[folder]}
    return found


def past(paths):
    """Modules of folders that are imported from elsewhere than by their folder's face."""
    found = set()
    for path in paths:
        for module, name in imports(path):
            parts = module.split(".")
            inside = parts[0] == "explaind_core" and len(parts) > 1 and parts[1] in FOLDERS and parts[1] != home(path)
            below = inside and name and (PACKAGE / parts[1] / f"{name}.py").exists()
            handed = below and name in getattr(importlib.import_module(module), "__all__", [])
            if inside and (len(parts) > 2 or (below and not handed)):
                found.add(f"{path.relative_to(ROOT).as_posix()}: {module}")
    return found


def test_a_face_hands_on_what_others_use_and_nothing_else():
    assert unused(files("explaind_core", *USERS)) == set(HANDED_ON)


def test_other_folders_import_from_faces():
    assert past(files("explaind_core", "optimizers", "studies")) == set(PAST_THE_FACE)


# ------------------------------------------------------------------ tests, sizes, pages
#: Folders of tests that are not named after a folder of the package: what they test or hold.
OTHER_TESTS = {"studies", "support", "tools"}


def test_tests_mirror_the_package():
    named = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert named - OTHER_TESTS <= set(FOLDERS)


LONGEST = 400


def test_no_file_is_longer_than_a_few_screens():
    lengths = {
        path.relative_to(ROOT).as_posix(): path.read_text().count("\n")
        for path in files("explaind_core", "optimizers", "studies", "tests", "tools", "benchmarks", "examples")
    }
    assert {path for path, lines in lengths.items() if lines > LONGEST} == set()


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_what_a_page_links_to_is_there(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


def test_every_folder_has_a_paragraph_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [folder for folder in FOLDERS if f"**[{folder}/](../explaind_core/{folder}/)**" not in text] == []
