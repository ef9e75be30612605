"""docs/architecture.svg: the folders as boxes on their levels, and the imports between them as curves.

An import over several levels has a place of its own on each level between, so no curve runs through a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from house import House

__all__ = ["draw"]

_WIDTH, _HEIGHT, _GAP, _LANE = 1.6, 0.46, 0.3, 0.28
_FOLDER, _FILE, _LINE, _INK = "#dbe8f6", "#f3efe4", "#7f97b2", "#1d2733"
#: A box by its name; a place that a curve passes by the import it belongs to, and its level.
Spot = str | tuple[str, str, int]


def draw(house: House, path: Path) -> None:
    """Write the picture; what kind of file, its suffix says."""
    chains = _chains(house)
    places = _places(house, chains)
    left = min(x for x, _ in places.values()) - _WIDTH
    right = max(x for x, _ in places.values()) + _WIDTH / 2 + _GAP
    top = len(house.layers) - 1
    with matplotlib.rc_context({"svg.hashsalt": "stages", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(right - left, (top + 1.2) * 0.86))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for chain in chains:
            axes.add_patch(_curve([places[spot] for spot in chain]))
        for name in house.imports:
            x, y = places[name]
            corner, colour = (x - _WIDTH / 2, y - _HEIGHT / 2), _FOLDER if house.is_folder(name) else _FILE
            style = "round,pad=0,rounding_size=0.08"
            axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, style, facecolor=colour, edgecolor=_LINE, zorder=3))
            axes.text(x, y, house.shown(name), ha="center", va="center", fontsize=12, color=_INK, zorder=4)
        for level in range(top + 1):
            axes.text(left + 0.2, level, str(level + 1), ha="left", va="center", fontsize=11, color=_LINE)
        axes.set_xlim(left, right)
        axes.set_ylim(-0.6, top + 0.6)
        axes.set_axis_off()
        facts = {"Date": None, "Title": "explaind_core by level", "Description": f"imports {house.digest}"}
        figure.savefig(path, metadata=facts if path.suffix == ".svg" else None, facecolor="white")


def _chains(house: House) -> list[list[Spot]]:
    """Every import from its upper box over the levels between to its lower box."""
    levels = {name: level for level, row in enumerate(reversed(house.layers)) for name in row}
    return [
        [name, *((name, below, level) for level in range(levels[name] - 1, levels[below], -1)), below]
        for name, imported in house.imports.items()
        for below in sorted(imported)
    ]


def _places(house: House, chains: Sequence[Sequence[Spot]]) -> Mapping[Spot, tuple[float, float]]:
    """Where everything stands: on its level, near the middle of its neighbours above and below."""
    rows: list[list[Spot]] = [list(row) for row in reversed(house.layers)]
    neighbours: dict[Spot, list[Spot]] = {spot: [] for row in rows for spot in row}
    for chain in chains:
        for spot in chain[1:-1]:
            rows[int(spot[2])].append(spot)
        for above, below in pairwise(chain):
            neighbours.setdefault(above, []).append(below)
            neighbours.setdefault(below, []).append(above)
    across = {spot: x for row in rows for spot, x in _spread(row, dict.fromkeys(row, 0.0)).items()}
    for sweep in range(24):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = {spot: _mean([across[n] for n in neighbours[spot]], across[spot]) for spot in row}
            across |= _spread(sorted(row, key=lambda spot: wanted[spot]), wanted)
    return {spot: (across[spot], float(level)) for level, row in enumerate(rows) for spot in row}


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: Sequence[Spot], wanted: Mapping[Spot, float]) -> dict[Spot, float]:
    """Side by side in this order without touching, on average where they want to be."""
    found: dict[Spot, float] = {}
    at = float("-inf")
    for spot in row:
        half = (_WIDTH if isinstance(spot, str) else _LANE) / 2
        found[spot] = max(wanted[spot], at + half)
        at = found[spot] + half + _GAP
    shift = _mean([wanted[spot] - found[spot] for spot in row], 0.0)
    return {spot: x + shift for spot, x in found.items()}


def _curve(points: Sequence[tuple[float, float]]) -> PathPatch:
    """From the lower edge of the first box to the upper edge of the last, straight down beside what is between."""
    at = (points[0][0], points[0][1] - _HEIGHT / 2)
    corners, codes = [at], [int(Curve.MOVETO)]
    for index, (x, y) in enumerate(points[1:], start=1):
        down = (x, y + _HEIGHT / 2)
        middle = (at[1] + down[1]) / 2
        corners += [(at[0], middle), (x, middle), down]
        codes += [int(Curve.CURVE4)] * 3
        at = down
        if index < len(points) - 1:
            at = (x, y - _HEIGHT / 2)
            corners.append(at)
            codes.append(int(Curve.LINETO))
    return PathPatch(Curve(corners, codes), facecolor="none", edgecolor=_LINE, linewidth=1.3, zorder=1)
