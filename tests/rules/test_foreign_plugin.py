"""A plugin of somebody else: installed by pip into a clean environment, found, checked, and used on a recorded run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "explaind-qhm"

RECORD_AND_EXPLAIN = """
import json, torch, explaind_core as explaind
from explaind_core.testing import record_example
from explaind_qhm import QHM
run = record_example(steps=6, make_optimizer=lambda p: QHM(p, lr=0.2, nu=0.6, weight_decay=0.1))
inputs = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
check = explaind.verify(run, inputs, nodes=8, progress=False)
result = explaind.attribute(run, inputs, keep=("step", "layer"), progress=False)
print(json.dumps({
    "package": run.manifest["rule"]["package"], "update_error": check.update_error,
    "closure": explaind.closure_error(result), "regularization": float(abs(result.regularization).sum()),
}))
"""


def run(command, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, cwd=EXAMPLE, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source(tmp_path):
    """A copy of the example, so that building it leaves nothing behind."""
    return shutil.copytree(EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))


def uses(python, bin_folder, tmp_path):
    """What a user of the plugin does with it."""
    listed = run([bin_folder / "explaind", "optimizers"], COLUMNS="200")
    assert "explaind_qhm.plugin.QHMRule" in listed
    assert "explaind-qhm 0.1.0" in listed
    verdict = run([bin_folder / "explaind", "check-plugin", "explaind_qhm.plugin:QHMRule", "--examples", "20"])
    assert "exact" in verdict
    assert "proved" in verdict
    found = json.loads(run([python, "-c", RECORD_AND_EXPLAIN]).splitlines()[-1])
    assert found["package"] == "explaind-qhm"
    assert found["update_error"] < 1e-14
    assert found["closure"] < 1e-12
    assert found["regularization"] > 0
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "its-tests")
    run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests])


def test_the_example_is_installed_by_pip_and_used(tmp_path):
    """The environment is new; only what this library needs anyway is shown to it, to keep the test short."""
    assert importlib.util.find_spec("explaind_qhm") is None, "installed here already: the test would prove nothing"
    venv.create(tmp_path / "env", with_pip=False)
    bin_folder = tmp_path / "env" / "bin"
    python = bin_folder / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    here = sorted({p for p in sys.path if p.endswith("site-packages")})
    editable = [str(ROOT), str(ROOT / "optimizers"), str(ROOT / "studies")]
    (site / "parent.pth").write_text("\n".join([*here, *editable]) + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run([*pip, "--no-build-isolation", source(tmp_path)])
    (bin_folder / "explaind").write_text(f"#!{python}\nfrom explaind_core.cli import main\nmain()\n")
    (bin_folder / "explaind").chmod(0o755)
    uses(python, bin_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_is_installed_by_pip_with_all_that_it_needs(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / "bin"
    pip = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    library = shutil.copytree(
        ROOT, tmp_path / "library", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache")
    )
    run([*pip, "--constraint", ROOT / "constraints.txt", library, source(tmp_path), "pytest"])
    uses(bin_folder / "python", bin_folder, tmp_path)
