"""Who imports whom in a package, read from its text: nothing is run, and every checkout of any age can be read.

A name that a folder's ``__init__`` hands on is followed to the module that makes it: ``from explaind_core.store import
RunStore`` is an import of ``explaind_core.store.run_store``. Imports inside functions and those for types alone count
as all others do. What imports the package's own ``__init__``, the public names, is not drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["Graph", "ImportLine", "Package", "circles", "levels", "reduced", "upward"]

#: Node -> the nodes that it imports.
Graph = Mapping[str, Set[str]]


@dataclass(frozen=True)
class ImportLine:
    """One imported name.

    Attributes:
        module: the module that is named, ``explaind_core.store``.
        name: what is taken from it; None for the module itself, ``*`` for all that it hands on.
        known_as: under which name the importing module has it.
        line: where it is written, from 1.
    """

    module: str
    name: str | None
    known_as: str
    line: int


@dataclass(frozen=True)
class Package:
    """The modules of a package, and what each of them imports.

    Attributes:
        root: the folder that the package lies in.
        name: of the package.
    """

    root: Path
    name: str = "explaind_core"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every module and its file; a folder's name is that of its ``__init__``."""
        found = {}
        for path in sorted((self.root / self.name).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    @cached_property
    def lines(self) -> dict[str, list[ImportLine]]:
        """What is written: the imports of every module from this package."""
        return {module: list(self._written(path)) for module, path in self.files.items()}

    def _written(self, path: Path) -> Iterable[ImportLine]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.files:
                        yield ImportLine(alias.name, None, alias.asname or alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.module in self.files:
                for alias in node.names:
                    yield ImportLine(node.module, alias.name, alias.asname or alias.name, node.lineno)

    def is_face(self, module: str) -> bool:
        """Whether a module is a folder's ``__init__``."""
        return self.files[module].name == "__init__.py"

    def makers(self, module: str, name: str | None) -> set[str]:
        """The modules that make a name; all of those behind a face for ``*``."""
        below = f"{module}.{name}"
        if name is None or not self.is_face(module):
            return {below} if below in self.files else {module}
        if name == "*":
            return {maker for line in self.lines[module] for maker in self.makers(line.module, line.name)}
        for line in self.lines[module]:  # handed on, even where a module has the same name
            if line.known_as == name and (line.module, line.name) != (module, name):
                return self.makers(line.module, line.name)
        return {below} if below in self.files else {module}

    @cached_property
    def modules(self) -> dict[str, set[str]]:
        """Module -> the modules that it imports; faces, which only hand on, are left out but for the package's own."""
        graph: dict[str, set[str]] = {}
        for module, lines in self.lines.items():
            found = {maker for line in lines for maker in self.makers(line.module, line.name)}
            if module == self.name or not self.is_face(module):
                graph[module] = {m for m in found - {module, self.name} if not self.is_face(m)}
        return graph

    def folder(self, module: str) -> str:
        """The folder, or the file beside the folders, that a module is in: ``store``, ``errors``."""
        parts = module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    @cached_property
    def folders(self) -> dict[str, set[str]]:
        """Folder or file beside the folders -> those that it imports."""
        graph: dict[str, set[str]] = {self.folder(module): set() for module in self.files}
        for module, imported in self.modules.items():
            graph[self.folder(module)] |= {self.folder(m) for m in imported} - {self.folder(module)}
        return graph

    @property
    def largest_folder(self) -> tuple[str, int]:
        """The folder with the most files, and how many they are."""
        counts: dict[str, int] = {}
        for path in self.files.values():
            folder = path.parent.relative_to(self.root).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
        folder = max(counts, key=lambda name: counts[name])
        return folder, counts[folder]


def _reached(graph: Graph) -> dict[str, set[str]]:
    """Node -> all nodes that imports lead to from it."""
    found = {}
    for node in graph:
        seen: set[str] = set()
        waiting = list(graph[node])
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += graph[at]
        found[node] = seen
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that import each other, directly or around.

    Example:
        >>> circles({"a": {"b"}, "b": {"a", "c"}, "c": set()})
        [['a', 'b']]
    """
    reached = _reached(graph)
    found = {tuple(sorted(m for m in reached[n] if n in reached[m])) for n in graph if n in reached[n]}
    return [list(circle) for circle in sorted(found)]


def levels(graph: Graph) -> dict[str, int]:
    """Node -> its level: 1 where nothing is imported, else one above the highest import. A circle is one node.

    Example:
        >>> levels({"a": {"b", "c"}, "b": {"c"}, "c": set()})
        {'a': 3, 'b': 2, 'c': 1}
    """
    reached = _reached(graph)
    found: dict[str, int] = {}
    for node in sorted(graph, key=lambda n: len(reached[n] | {n})):  # what is below reaches less
        below = {m for m in reached[node] if node not in reached[m]}
        found[node] = 1 + max((found[m] for m in below), default=0)
    return {node: found[node] for node in graph}


def upward(graph: Graph) -> list[tuple[str, str]]:
    """Imports that close circles: without them, all imports point down. No smaller set is known, by a greedy search.

    Example:
        >>> upward({"a": {"b", "c"}, "b": {"c"}, "c": {"a"}})
        [('c', 'a')]
    """
    open_graph, found = {node: set(imported) for node, imported in graph.items()}, []
    while closed := circles(open_graph):
        inside = [(n, m) for circle in closed for n in circle for m in sorted(open_graph[n] & set(circle))]

        def left(edge: tuple[str, str]) -> int:
            """How many nodes lie in circles when this import is gone."""
            tried = {n: m - {edge[1]} if n == edge[0] else m for n, m in open_graph.items()}
            return sum(map(len, circles(tried)))

        node, imported = min(inside, key=left)
        open_graph[node].discard(imported)
        found.append((node, imported))
    return found


def reduced(graph: Graph) -> dict[str, set[str]]:
    """The same order with the fewest imports: none that another path of imports implies. For graphs without circles.

    Example:
        >>> reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()})
        {'a': {'b'}, 'b': {'c'}, 'c': set()}
    """
    reached = _reached(graph)
    return {n: {m for m in imported if not any(m in reached[o] for o in imported)} for n, imported in graph.items()}
