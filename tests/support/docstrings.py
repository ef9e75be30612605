"""The entries of a docstring's Args, Attributes and Raises, beside the names that the code has.

Read from the syntax tree alone: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

ARGUMENTS, ERRORS = ("Args:", "Attributes:"), "Raises:"
_NAMES = r"\*{0,2}\w+(?:(?:, | and )\*{0,2}\w+)*"
_ENTRY = re.compile(rf"({_NAMES}): ?(.*)")
_SECOND = re.compile(rf"[.;,)?] ({_NAMES}): ")


@dataclass
class Entry:
    """One entry of a section.

    Attributes:
        line: its first line in the file.
        names: of the arguments that it speaks of.
        text: all that it says.
    """

    line: int
    names: list[str]
    text: str


@dataclass
class Described:
    """One class or function that has a docstring.

    Attributes:
        path: its file.
        node: its definition.
        names: its arguments, fields and attributes, those of the classes it extends included.
        foreign: it extends a class of another package, or unpacks arguments, whose names are not known.
        sections: header -> entries.
    """

    path: Path
    node: Documented
    names: set[str]
    foreign: bool
    sections: dict[str, list[Entry]] = field(default_factory=dict)

    def crowded(self) -> list[str]:
        """Entries that hold a second one: ``first: what it is. second: what it is.``"""
        return [
            f"{self.path}:{entry.line}: {self.node.name}: {', '.join(found)} has no entry of its own"
            for header, entries in self.sections.items()
            for entry in entries
            if (
                found := sorted(
                    filter(_is_error if header == ERRORS else self.names.__contains__, second_names(entry.text))
                )
            )
        ]

    def stale(self) -> list[str]:
        """Names that the code does not have."""
        if self.foreign:
            return []
        return [
            f"{self.path}:{entry.line}: {self.node.name} has no {name}"
            for header in ARGUMENTS
            for entry in self.sections.get(header, ())
            for name in entry.names
            if name not in self.names
        ]


def second_names(text: str) -> set[str]:
    """The names that look like the beginning of another entry in an entry's text."""
    return {name for match in _SECOND.finditer(text) for name in _split(match[1])}


def described(root: Path) -> Iterator[Described]:
    """Every class and function under ``root`` that has a docstring."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    classes: dict[str, list[ast.ClassDef]] = {}
    for node in (node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        classes.setdefault(node.name, []).append(node)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Documented) and ast.get_docstring(node) is not None:
                names, foreign = _names(node, classes)
                yield Described(path, node, names, foreign, _sections(node))


def _is_error(name: str) -> bool:
    return name.endswith(("Error", "Warning"))


def _split(names: str) -> list[str]:
    return [name.lstrip("*") for name in re.split(", | and ", names)]


def _names(node: Documented, classes: dict[str, list[ast.ClassDef]]) -> tuple[set[str], bool]:
    """The arguments of a function, or the fields and attributes of a class; and whether there may be more."""
    if not isinstance(node, ast.ClassDef):
        a = node.args
        unpacked = bool(a.kwarg and a.kwarg.annotation and "Unpack[" in ast.unparse(a.kwarg.annotation))
        return {arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if arg}, unpacked
    names: set[str] = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign | ast.Assign):
            targets = [part.target] if isinstance(part, ast.AnnAssign) else part.targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(part, ast.FunctionDef):
            names |= {part.name} | (_names(part, classes)[0] if part.name == "__init__" else set())
            names |= {
                n.attr
                for n in ast.walk(part)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
            }
    foreign = False
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        written = ast.unparse(name).rpartition(".")[2]
        named = [found for found in classes.get(written, ()) if found is not node]
        for found in named:  # all of that name: which of them is meant, its imports would say
            more, beyond = _names(found, classes)
            names, foreign = names | more, foreign or beyond
        if named:
            continue
        if written not in ("ABC", "Generic", "Protocol", "NamedTuple", "object", "Exception"):
            foreign = True
    return names, foreign


def _sections(node: Documented) -> dict[str, list[Entry]]:
    literal = node.body[0]
    assert isinstance(literal, ast.Expr)
    assert isinstance(literal.value, ast.Constant)
    lines, indent = str(literal.value.value).splitlines(), node.col_offset + 4
    sections: dict[str, list[Entry]] = {}
    entries: list[Entry] | None = None
    for number, line in enumerate(lines, literal.lineno):
        text, depth = line.strip(), len(line) - len(line.lstrip())
        if number == literal.lineno or not text:
            continue
        if depth <= indent:
            entries = sections.setdefault(text, []) if text in (*ARGUMENTS, ERRORS) else None
        elif entries is not None:
            if depth == indent + 4 and (match := _ENTRY.fullmatch(text)):
                entries.append(Entry(number, _split(match[1]), match[2]))
            elif entries:
                entries[-1].text += " " + text
    return sections
