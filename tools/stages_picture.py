"""docs/architecture.svg: the folders as boxes on their levels, and the imports between them as curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

if TYPE_CHECKING:
    from stages import House

__all__ = ["draw"]

_ROW, _WIDTH, _HEIGHT = 1.0, 1.72, 0.5
_FOLDER, _FILE, _LINE, _INK = "#dbe8f6", "#f3efe4", "#8aa0b8", "#1d2733"


def draw(house: House, path: Path) -> None:
    """Write the picture; what kind of file, its suffix says."""
    places = _places(house)
    width = max(x for x, _ in places.values()) - min(x for x, _ in places.values()) + 2 * _WIDTH
    with matplotlib.rc_context({"svg.hashsalt": "stages", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width * 1.05, (len(house.layers) + 0.6) * 0.86))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for name, imported in house.imports.items():
            for below in sorted(imported):
                axes.add_patch(_curve(places[name], places[below]))
        for name, (x, y) in places.items():
            corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
            colour = _FOLDER if house.is_folder(name) else _FILE
            style = "round,pad=0,rounding_size=0.08"
            axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, style, facecolor=colour, edgecolor=_LINE, zorder=3))
            axes.text(x, y, house.shown(name), ha="center", va="center", fontsize=12, color=_INK, zorder=4)
        left = min(x for x, _ in places.values()) - _WIDTH
        for level in range(1, len(house.layers) + 1):
            axes.text(left + 0.25, (level - 1) * _ROW, str(level), ha="left", va="center", fontsize=11, color=_LINE)
        axes.set_xlim(left, left + width)
        axes.set_ylim(-0.7, (len(house.layers) - 1) * _ROW + 0.6)
        axes.set_axis_off()
        facts = {"Date": None, "Title": "explaind_core by level", "Description": f"imports {house.digest}"}
        figure.savefig(path, metadata=facts if path.suffix == ".svg" else None, facecolor="white")


def _places(house: House) -> Mapping[str, tuple[float, float]]:
    """Where every box stands: on its level's row, close to the middle of what it imports."""
    places: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(reversed(house.layers)):
        wanted = {}
        for index, name in enumerate(row):
            below = [places[other][0] for other in house.imports[name]]
            wanted[name] = sum(below) / len(below) if below else 2.3 * (index - (len(row) - 1) / 2)
        order = sorted(row, key=lambda name: wanted[name])
        middle = sum(wanted.values()) / len(wanted)
        for index, name in enumerate(order):
            places[name] = (middle + 2.3 * (index - (len(row) - 1) / 2), level * _ROW)
    return places


def _curve(above: tuple[float, float], below: tuple[float, float]) -> PathPatch:
    (x, y), (u, v) = (above[0], above[1] - _HEIGHT / 2), (below[0], below[1] + _HEIGHT / 2)
    bend = 0.55 * (y - v)
    curve = Curve([(x, y), (x, y - bend), (u, v + bend), (u, v)], [Curve.MOVETO, *[Curve.CURVE4] * 3])
    return PathPatch(curve, facecolor="none", edgecolor=_LINE, linewidth=1.3, zorder=1)
