"""What a study found: claims of the paper with the numbers of this run, and tables beside the paper's values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["CLOSES", "Claim", "Picture", "Table", "rounded"]


#: The largest closure error that holds, as a fraction of the largest output: rounding of float32.
CLOSES = 1e-4


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and whether a run supports it.

    Attributes:
        where: the section or figure that makes it.
        text: the claim.
        measure: what was measured to decide, and the threshold.
        value: what came out, a number or a few words that hold numbers.
        supported: None where the run cannot tell; ``note`` then says why.
    """

    where: str
    text: str
    measure: str
    value: float | int | str | None
    supported: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """In words.

        Example:
            >>> Claim("5.1", "the decoder peaks first", "peaks", "decoder at 310", None).verdict
            'cannot be told'
        """
        return {True: "supported", False: "NOT supported", None: "cannot be told"}[self.supported]


@dataclass(frozen=True)
class Picture:
    """A figure of a study: ``file`` is relative to the study's folder.

    Attributes:
        file: relative to the study's folder.
        caption: below it.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows under named columns; None is an empty cell.

    Attributes:
        name: of its file.
        title: above it.
        columns: their names.
        rows: one cell a column each, of JSON's plain types.
        note: below it.

    Example:
        >>> print(Table("t", "Title", ("model", "KL"), [["CNN", 1.2345e-6], ["other", None]]).markdown())
        | model | KL |
        |---|---|
        | CNN | 1.23e-06 |
        | other | - |
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"{self.name}: a row of {len(wrong[0])} cells under {len(self.columns)} columns")

    def markdown(self) -> str:
        """As Markdown, numbers to three significant digits."""
        lines = [list(self.columns), *([rounded(cell) for cell in row] for row in self.rows)]
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([text[0], "|" + "---|" * len(self.columns), *text[1:]])

    def write(self, folder: Path) -> Path:
        """As JSON, with all digits; NaN and infinities are null."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        plain = asdict(self) | {"rows": [[_plain(cell) for cell in row] for row in self.rows]}
        path.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")
        return path


def _plain(cell: Any) -> Any:
    if hasattr(cell, "item"):
        cell = cell.item()
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def rounded(cell: Any) -> str:
    """A cell as text: three significant digits, whole numbers as they are.

    Example:
        >>> rounded(0.123456), rounded(1218), rounded(None), rounded(float("nan")), rounded("text"), rounded(1.0)
        ('0.123', '1,218', '-', '-', 'text', '1.00')
    """
    cell = _plain(cell)
    if cell is None:
        return "-"
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    if cell == 0 or 1e-3 <= abs(cell) < 1e4:
        return f"{cell:.3g}" if abs(cell) >= 100 or abs(cell) < 0.9995 else f"{cell:.{2 if abs(cell) < 10 else 1}f}"
    return f"{cell:.2e}"
