"""The progress bar of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich import progress as rich_progress
from rich.console import Console

Update: TypeAlias = Callable[[int, str], None]


@contextlib.contextmanager
def bar(show: bool | rich_progress.Progress, total: int, title: str) -> Iterator[Update]:
    """update(steps done, text) on a new bar or a task of the caller's; silent if not `show` or nobody watches."""
    if isinstance(show, rich_progress.Progress):
        task = show.add_task(title, total=total)
        yield lambda done, text: show.update(task, completed=done, description=f"{title} {text}")
        return
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda done, text: None
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, text: progress.update(task, completed=done, description=f"{title} {text}")
