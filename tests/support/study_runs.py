"""Studies run without a word."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from explaind_studies.catalogue import run_study


def run_quietly(name, folder, setting, **options):
    console = Console(file=StringIO(), width=300)
    return run_study(
        name, folder, setting, command=f"explaind study {name}", console=console, progress=False, **options
    )
