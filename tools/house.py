"""The folders of explaind_core on their levels: the import contract's layers, and the imports that the code makes."""

from __future__ import annotations

import ast
import hashlib
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from import_graph import Package, reduced

__all__ = ["House"]


@dataclass(frozen=True)
class House:
    """Folders on their levels.

    Attributes:
        layers: names of folders and of files beside them, level by level, from the top.
        imports: name -> the names that it imports, without those that another path implies.
        purposes: name -> the first sentence of its docstring.
        files: folder -> how many modules it has; a face is none.
    """

    layers: Sequence[Sequence[str]]
    imports: Mapping[str, Set[str]]
    purposes: Mapping[str, str]
    files: Mapping[str, int]

    def __post_init__(self) -> None:
        placed = sorted(name for row in self.layers for name in row)
        if placed != sorted(self.imports):
            raise ValueError(f"pyproject.toml places {placed}, the package has {sorted(self.imports)}")

    @classmethod
    def of(cls, root: Path) -> House:
        """The house that lies in a folder: its imports, its contract."""
        package = Package(root)
        contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        (stages,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
        folders = {name: imported for name, imported in package.folders.items() if name != "__init__"}
        modules = [m for m in package.files if m != package.name and not package.is_face(m)]
        return cls(
            layers=[[name.strip() for name in row.split("|")] for row in stages],
            imports=reduced(folders),
            purposes={name: _purpose(package.files[f"{package.name}.{name}"]) for name in folders},
            files={
                name: sum(package.folder(m) == name for m in modules)
                for name in folders
                if package.is_face(f"{package.name}.{name}")
            },
        )

    def shown(self, name: str) -> str:
        """A folder's name ends with a slash, a file's with its suffix."""
        return name + ("/" if self.is_folder(name) else ".py")

    def is_folder(self, name: str) -> bool:
        """Whether a name is that of a folder."""
        return name in self.files

    @property
    def digest(self) -> str:
        """What the picture shows, as a short hash."""
        drawn = [[[name, sorted(self.imports[name])] for name in row] for row in self.layers]
        return hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]


def _purpose(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
