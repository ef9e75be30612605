"""The picture of the house: which folder imports which, read from the code and written into docs/architecture.md.

    python tools/stages.py                  write the picture, the table and docs/architecture.svg
    python tools/stages.py --check          exit status 1 where they are not what the code says
    python tools/stages.py --numbers ROOT   how deep the imports of a checkout go, and how many do not point down

The rows are the layers of the import contract in pyproject.toml, which ``lint-imports`` holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from house import House
from import_graph import Package, circles, levels, upward

__all__ = ["main", "mermaid", "numbers", "table", "with_stages"]

BEGIN, END = "<!-- made by `make docs`: begin -->", "<!-- made by `make docs`: end -->"
PICTURE = "architecture.svg"


def mermaid(house: House) -> str:
    """The picture as text that GitHub draws."""
    lines = ["flowchart TB"]
    for name in (name for row in house.layers for name in row):
        opening, closing = ("[", "]") if house.is_folder(name) else ("([", "])")
        lines.append(f'    {name}{opening}"{house.shown(name)}"{closing}')
    for row in house.layers:
        lines += [f"    {name} --> {below}" for name in row for below in sorted(house.imports[name])]
    return "\n".join(lines)


def table(house: House) -> str:
    """Every folder and file on its level, with what its own docstring says of it."""
    lines = ["| level | where | modules | what lives there |", "|---|---|---|---|"]
    for level, row in zip(range(len(house.layers), 0, -1), house.layers, strict=True):
        for name in row:
            link = f"[{house.shown(name)}](../explaind_core/{house.shown(name)})"
            lines.append(f"| {level} | {link} | {house.files.get(name, 1)} | {house.purposes[name]} |")
    return "\n".join(lines).replace(":func:", "").replace(":class:", "").replace(":mod:", "")


def with_stages(text: str, house: House) -> str:
    """A page with the picture and the table between the two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/architecture.md needs {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"```mermaid\n{mermaid(house)}\n```\n\n{table(house)}"
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def numbers(root: Path) -> str:
    """How deep the imports of a checkout go.

    An upward import is one of those that must go so that no modules import each other in a circle.
    """
    package = Package(root)
    closed, up = circles(package.modules), upward(package.modules)
    folder, files = package.largest_folder
    lines = [
        f"import levels of folders     {max(levels(package.folders).values())}",
        f"import levels of modules     {max(levels(package.modules).values())}",
        f"circles                      {len(closed)}{_sizes(closed)}",
        f"upward imports               {len(up)}",
        f"files in the largest folder  {files} ({folder})",
    ]
    return "\n".join([*lines, *(f"    {module} -> {imported}" for module, imported in up)])


def _sizes(closed: Sequence[Sequence[str]]) -> str:
    return f" (of {', '.join(str(len(circle)) for circle in closed)} modules)" if closed else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="of a checkout")
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether all is up to date")
    parser.add_argument("--numbers", action="store_true", help="write nothing; print the numbers")
    asked = parser.parse_args(arguments)
    if asked.numbers:
        print(numbers(asked.root))
        return 0
    house, page = House.of(asked.root), asked.root / "docs" / "architecture.md"
    picture, text = page.with_name(PICTURE), page.read_text(encoding="utf-8")
    if asked.check:
        stale = [page.name] if with_stages(text, house) != text else []
        stale += [] if picture.exists() and house.digest in picture.read_text(encoding="utf-8") else [PICTURE]
        for name in stale:
            print(f"docs/{name} is not what the imports say: make docs", file=sys.stderr)
        return 1 if stale else 0
    from stages_picture import draw  # matplotlib, which the other two commands need not load

    page.write_text(with_stages(text, house), encoding="utf-8")
    draw(house, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
