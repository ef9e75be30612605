"""The command line, called in a folder with a run, its inputs and a module that builds its model."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file

from explaind_core.cli import app as cli
from explaind_core.testing import record_example

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.a(left) * self.b(right)

number = 7
def wrong():
    return number
"""


example_run = lru_cache(record_example)
INPUTS = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

QUESTION = ("--model", "tiny_architecture:build", "--inputs", "inputs.safetensors")


@contextmanager
def command_line(folder, monkeypatch, capsys):
    """What runs ``explaind ...`` there, and returns its status and what it printed; ``run`` is the recorded run."""
    (folder / "tiny_architecture.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as for an installed command
    monkeypatch.chdir(folder)
    example = example_run(3)
    (folder / "run").symlink_to(example.path)
    save_file({"inputs": INPUTS}, folder / "inputs.safetensors")
    monkeypatch.setattr(cli.console, "width", 200)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explaind", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        text = capsys.readouterr()
        return exit_.value.code, text.out, text.err

    call.run = example
    yield call
    sys.modules.pop("tiny_architecture", None)
