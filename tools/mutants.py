"""Mutation testing of one module: cosmic-ray changes it in small ways, one at a time; what does no test notice?

    python tools/mutants.py MODULE [TESTS ...] [--sample N] [--seed S]

Everything is done in a copy of the checkout, whose tests run once for every mutation: some seconds each, so hours for
a large module. ``--sample`` draws some of the mutations. What stands in annotations is never run, and not mutated.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["copied", "main", "nearest", "report", "spans_of_annotations"]

ROOT = Path(__file__).parents[1]
#: Where a copy imports from, before anything that is installed.
PATHS = (".", "optimizers", "studies", "tests", "tools")
Position = tuple[int, int]
#: Of the copy: a failure is enough, whichever example shows it, and each run begins afresh.
CONFTEST = """
from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("mutants")
"""


def nearest(module: Path) -> list[str]:
    """The tests of a module of ``explaind_core`` where none are named: those of its folder, and its own examples.

    Example:
        >>> nearest(Path("explaind_core/rules/secant.py"))
        ['tests/rules', 'explaind_core/rules/secant.py']
    """
    return [f"tests/{module.parent.name}", module.as_posix()]


def spans_of_annotations(source: str) -> list[tuple[Position, Position]]:
    """Where annotations stand: (line, column) of their begin and end.

    ``from __future__ import annotations`` is taken for granted, so that none of them is run.

    Example:
        >>> spans_of_annotations("def f(x: int | None) -> int: ...")
        [((1, 9), (1, 19)), ((1, 24), (1, 27))]
    """

    def found() -> Iterator[ast.expr | None]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.returns
            elif isinstance(node, ast.arg | ast.AnnAssign):
                yield node.annotation

    spans = [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)) for node in found() if node
    ]
    return sorted(spans)


def report(outcomes: Sequence[tuple[str, str]]) -> str:
    r"""What became of the mutations.

    Args:
        outcomes: of every mutation ``"killed"``, ``"survived"``, ``"incompetent"`` (it did not run) or ``"skipped"``,
            and its diff.

    Example:
        >>> print(report([("killed", ""), ("survived", "- a < b\n+ a <= b"), ("skipped", "")]))
        - a < b
        + a <= b
        <BLANKLINE>
        2 mutations: 1 killed, 1 survived (50.0 % noticed); 1 not tried
    """
    counts = Counter(outcome for outcome, _ in outcomes)
    tried = len(outcomes) - counts["skipped"]
    noticed = tried - counts["survived"]
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("killed", "survived", "incompetent") if counts[kind])
    share = f" ({noticed / tried:.1%} noticed)".replace("%", " %") if tried else ""
    last = f"{tried} mutations: {kinds or 'none'}{share}; {counts['skipped']} not tried"
    return "\n\n".join([*(diff.strip("\n") for outcome, diff in outcomes if outcome == "survived"), last])


def copied(folder: Path) -> Path:
    """The checkout as it stands, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "conftest.py").write_text(CONFTEST)
    return folder


def _configuration(module: Path, tests: Sequence[str], timeout: float) -> str:
    """cosmic-ray's, of a session."""
    command = shlex.join([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests])
    lines = ["[cosmic-ray]", f"module-path = {json.dumps(module.as_posix())}", f"timeout = {timeout:.1f}"]
    lines += ["excluded-modules = []", f"test-command = {json.dumps(command)}", "[cosmic-ray.distributor]"]
    return "\n".join([*lines, 'name = "local"', ""])


def _leave_out(session: Path, source: str, sample: int | None, seed: int) -> int:
    """Mark what is not to be tried; how many mutations are left."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    spans = spans_of_annotations(source)

    def runs(item: Any) -> bool:
        start = tuple(item.mutations[0].start_pos)
        return not any(first <= start < last for first, last in spans)

    with use_db(str(session)) as database:
        items = sorted(database.work_items, key=lambda item: (item.mutations[0].start_pos, str(item.mutations)))
        wanted = [item.job_id for item in items if runs(item)]
        if sample is not None and sample < len(wanted):
            wanted = random.Random(seed).sample(wanted, sample)
        left_out = [item.job_id for item in items if item.job_id not in set(wanted)]
        database.set_multiple_results(left_out, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return len(wanted)


def _outcomes(session: Path) -> list[tuple[str, str]]:
    from cosmic_ray.work_db import use_db

    with use_db(str(session)) as database:
        results = [result for _, result in database.results]
    return [
        (result.test_outcome.value if result.test_outcome else result.worker_outcome.value, result.diff or "")
        for result in results
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Mutate a module, run tests, print what survived.

    Args:
        arguments: of the command line.

    Returns:
        The exit status: 0 where the mutations were tried, 2 where the tests fail without any.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path, help="such as explaind_core/rules/secant.py")
    parser.add_argument("tests", nargs="*", help="what pytest runs; by default the tests of the module's folder")
    parser.add_argument("--sample", type=int, help="so many mutations, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    asked = parser.parse_args(arguments)
    tests = asked.tests or nearest(asked.module)
    with tempfile.TemporaryDirectory(prefix="explaind-mutants-") as name:
        folder = copied(Path(name) / "checkout")
        path = os.pathsep.join(str(folder / part) for part in PATHS)
        # A mutation in the same second, of the same length, would be taken for what was compiled before.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        config, session = Path(name) / "session.toml", Path(name) / "session.sqlite"

        def run(command: str, *more: object) -> int:
            program = [Path(sys.executable).with_name("cosmic-ray"), command, *more]
            return subprocess.run([*map(str, program)], cwd=folder, env=environment, check=False).returncode

        config.write_text(_configuration(asked.module, tests, 600))
        began = time.monotonic()
        if run("baseline", config):
            print("the tests fail without any mutation")
            return 2
        once = time.monotonic() - began
        config.write_text(_configuration(asked.module, tests, 5 * once + 10))
        if run("init", config, session):
            return 2
        count = _leave_out(session, (folder / asked.module).read_text(), asked.sample, asked.seed)
        print(f"{count} mutations of {asked.module}, {once:.0f} s each at most", flush=True)
        if run("exec", config, session):
            return 2
        print(report(_outcomes(session)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
