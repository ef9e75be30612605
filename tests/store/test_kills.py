"""kill -9 of recordings and attributions, a few of those that benchmarks/faults.py makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import explaind_core as explaind
from explaind_core.errors import StoreError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and kills by a limit of Linux")


def kills(*arguments: str, timeout: int = 280) -> int:
    """How many processes were killed; nothing may have been lost."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(SCRIPT), *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for count in ("finished work lost", "wrong results", "unclear errors"):
        assert set(re.findall(rf"{count} +(\d+)", done.stdout)) == {"0"}
    return sum(map(int, re.findall(r"^  kills +(\d+)", done.stdout, re.MULTILINE)))


def test_recordings_survive_random_kills():
    assert kills("recording", "--kills", "12", "--steps", "12", "--seeds", "1") == 12


def test_attributions_survive_random_kills():
    assert kills("attribution", "--kills", "6", "--steps", "6") == 6


def test_recordings_and_attributions_survive_kills_at_some_writes():
    assert kills("writes", "--stride", "24") >= 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
def test_recordings_survive_many_random_kills(mode):
    assert kills("recording", "--kills", "60", "--steps", "100", "--modes", mode, timeout=3000) == 60


@pytest.mark.slow
def test_recordings_and_attributions_survive_kills_at_every_write():
    assert kills("writes", "--modes", "steps,parameters,snapshots", timeout=3000) >= 400


# ------------------------------------------------------------------ what a kill at the very beginning leaves
def begin(path, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, explaind.Recorder(path, model, optimizer, torch.nn.MSELoss(), **options)


@pytest.mark.parametrize(
    "left", ["start.safetensors", "start.safetensors.unfinished", "start.safetensors manifest.json.unfinished"]
)
def test_a_folder_in_which_nothing_had_begun_is_begun_anew(tmp_path, left):
    for name in left.split():
        (tmp_path / name).write_bytes(b"half of it")
    begin(tmp_path)[2].close()
    assert len(explaind.open_run(tmp_path).steps) == 0


@pytest.mark.parametrize("mine", ["notes.txt", "steps", "model.safetensors"])
def test_a_folder_with_anything_else_is_not_touched(tmp_path, mine):
    (tmp_path / "start.safetensors").write_bytes(b"half of it")
    (tmp_path / mine).mkdir()
    with pytest.raises(StoreError, match="there is something at this path already"):
        begin(tmp_path)
    assert (tmp_path / "start.safetensors").read_bytes() == b"half of it"


def test_a_run_without_a_step_is_restored_to_its_beginning(tmp_path):
    """The optimizer, too, where it had been used before."""
    model, optimizer, _ = begin(tmp_path / "other")
    with torch.no_grad():
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 2.0)
    explaind.Recorder(tmp_path / "run", model, optimizer, torch.nn.MSELoss()).stop()
    other, fresh, _ = begin(tmp_path / "third")
    with torch.no_grad():
        other.weight.zero_()
    assert explaind.open_run(tmp_path / "run", model=other).restore(other, fresh) == 0
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(fresh.state[other.bias]["momentum_buffer"], torch.full((2,), 2.0))
    explaind.Recorder(tmp_path / "run", other, fresh, resume=True).close()
