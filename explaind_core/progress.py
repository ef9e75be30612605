"""Progress bars with the remaining time, for work that takes longer than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["bar", "counted", "track"]

T = TypeVar("T")


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress display: description, bar, count, elapsed and remaining time.

    Yields:
        The display; tasks are added to it with a ``note``.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as progress:
        yield progress


@contextmanager
def counted(total: int, description: str, *, enabled: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar that is advanced by calling what is yielded with a number of items.

    Args:
        total: how many items there are.
        description: what is being done.
        enabled: show it at all.

    Yields:
        A function to call with a number of items that are done.

    Example:
        >>> with counted(2, "counting", enabled=False) as advance:
        ...     advance(2)
    """
    if not enabled:
        yield lambda _: None
        return
    with bar() as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda count: progress.advance(task, count)


def track(items: Iterable[T], total: int, description: str, *, enabled: bool) -> Iterator[T]:
    """Items, behind a progress bar.

    Args:
        items: any number of things.
        total: how many.
        description: what is being done with them.
        enabled: show the bar at all.

    Yields:
        Each item.

    Example:
        >>> list(track([1, 2], total=2, description="counting", enabled=False))
        [1, 2]
    """
    if not enabled:
        yield from items
        return
    with bar() as progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)
