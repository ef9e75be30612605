"""A study's report: one JSON, one file a table, and a page with pictures, tables and claims beside the paper's."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from explaind_core.training_step import git_commit
from explaind_studies.findings import Claim, Picture, Table, rounded

__all__ = ["Report", "hardware", "keep", "versions"]


def versions() -> dict[str, str]:
    """Of Python and of what the numbers of a study depend on.

    Example:
        >>> sorted(versions())
        ['explaind-core', 'numpy', 'python', 'scikit-learn', 'torch', 'xarray']
    """
    named = {name: version(name) for name in ("explaind-core", "numpy", "scikit-learn", "torch", "xarray")}
    return {"python": platform.python_version(), **named}


def hardware() -> dict[str, Any]:
    """Processor, cores and memory.

    Example:
        >>> hardware()["cores"] >= 1
        True
    """
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found: dict[str, Any] = {"processor": processor, "cores": os.cpu_count()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


@dataclass(frozen=True)
class Report:
    """What a study found.

    Attributes:
        study: its name.
        title: of the page.
        summary: paragraphs of Markdown above everything.
        settings: of the study; ``seed`` among them.
        claims: of the paper, each with whether the run supports it.
        tables: in the order of the page.
        pictures: in the order of the page.
        checks: exactness, which does not depend on the paper: name -> (holds, what was measured).
        parts: part -> seconds, peak_bytes, attempts.
    """

    study: str
    title: str
    summary: Sequence[str]
    settings: Mapping[str, Any]
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    checks: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every check of exactness holds. A claim of the paper that does not reproduce is no error."""
        return all(holds for holds, _ in self.checks.values())

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return float(sum(part["seconds"] for part in self.parts.values()))

    def write(self, folder: Path, command: str) -> Path:
        """Write ``report.json``, ``tables/*.json`` and the page, ``README.md``; pictures are there already.

        Args:
            folder: of the study.
            command: that made it, as somebody else would type it.

        Returns:
            The page.
        """
        for table in self.tables:
            table.write(folder / "tables")
        facts = {
            "study": self.study,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(Path(__file__).parent),
            "settings": dict(self.settings),
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(self.seconds, 1),
            "parts": {name: dict(part) for name, part in self.parts.items()},
            "checks": {name: {"holds": bool(h), "measured": text} for name, (h, text) in self.checks.items()},
            "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in self.claims],
            "tables": [f"tables/{table.name}.json" for table in self.tables],
            "figures": [picture.file for picture in self.pictures],
        }
        (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
        page = folder / "README.md"
        page.write_text(self._page(facts))
        return page

    def _page(self, facts: Mapping[str, Any]) -> str:
        blocks = [f"# {self.title}", f"Made by `{facts['command']}`.", *self.summary]
        if self.claims:
            blocks += ["## The paper's claims, and this run", _claims(self.claims).markdown()]
        for picture in self.pictures:
            blocks.append(f"![{picture.caption}]({picture.file})\n\n*{picture.caption}*")
        for table in self.tables:
            blocks += [f"## {table.title}", table.markdown(), *([table.note] if table.note else [])]
        if self.checks:
            rows = [[name, "holds" if h else "DOES NOT HOLD", text] for name, (h, text) in self.checks.items()]
            blocks += ["## Exactness", Table("", "", ("check", "", "measured"), rows).markdown()]
        blocks += ["## How it was made", *self._how(facts)]
        return "\n\n".join(blocks) + "\n"

    def _how(self, facts: Mapping[str, Any]) -> list[str]:
        machine = facts["hardware"]
        rows = [[k, _words(v)] for k, v in self.settings.items()]
        rows += [["versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())]]
        rows += [["hardware", ", ".join(f"{k} {v}" for k, v in machine.items())]]
        rows += [["made", f"{facts['created'][:10]}, commit {str(facts['git_commit'])[:12]}"]]
        shown: list[list[Any]] = [
            [name, f"{part['seconds']:,.1f}", part.get("threads"), f"{part['peak_bytes'] / 2**30:.2f}"]
            for name, part in self.parts.items()
        ]
        shown.append(["all parts", f"{self.seconds:,.1f}", None, None])
        columns = ("part", "seconds", "threads", "peak memory of the process by then, GiB")
        return [
            Table("", "", ("setting", ""), rows).markdown(),
            Table("", "", columns, shown).markdown(),
        ]


def _words(value: Any) -> str:
    return ", ".join(map(_words, value)) if isinstance(value, list | tuple) else rounded(value)


def _claims(claims: Sequence[Claim]) -> Table:
    rows = [
        [c.where, c.text, c.measure, rounded(c.value) + (f" ({c.note})" if c.note else ""), c.verdict] for c in claims
    ]
    return Table("claims", "", ("where", "the paper says", "measured", "this run", "verdict"), rows)


def keep(folder: Path, target: Path) -> None:
    """Copy a report, its page, tables and PNG figures, and nothing else, to where results are kept.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name) / "study"
        ...     (folder / "figures").mkdir(parents=True)
        ...     _ = (folder / "figures" / "a.png").write_bytes(b""), (folder / "figures" / "a.html").write_bytes(b"")
        ...     _ = Report("s", "S", (), {}).write(folder, "explaind study s")
        ...     keep(folder, Path(name) / "kept")
        ...     sorted(p.name for p in (Path(name) / "kept").rglob("*.*"))
        ['README.md', 'a.png', 'report.json']
    """
    for old in ("tables", "figures"):
        shutil.rmtree(target / old, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ("report.json", "README.md", "tables/*.json", "figures/*.png"):
        for path in sorted(folder.glob(pattern)):
            where = target / path.relative_to(folder)
            where.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, where)
