"""How far long work has come: bars on a terminal, lines in a file."""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from rich import progress as rich_progress
from rich.console import Console

Update: TypeAlias = Callable[[int, str], None]

T = TypeVar("T")

EVERY = 5.0  # seconds between two lines of a log


class Lines(rich_progress.Progress):
    """Progress for an output that is not a terminal: every few seconds one line with all unfinished tasks, flushed.

    A thread writes the lines, so that a long step without updates (a compilation, a large file) is seen to go on as well.
    """

    def __init__(self, console: Console, every: float = EVERY, announce: bool = False):
        """`every`: seconds between lines; `announce`: also a line for every task that begins."""
        super().__init__(console=console, disable=True)  # no bars; the tasks are kept all the same
        self._every, self._announce = every, announce
        self._began, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)

    def start(self) -> None:
        """Begin to write lines."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more lines."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def add_task(self, description: str, *args: Any, **more: Any) -> rich_progress.TaskID:
        """As rich's."""
        task = super().add_task(description, *args, **more)
        if self._announce and self.tasks[-1].visible:
            self._say(description)
        return task

    def track(
        self,
        sequence: Iterable[T],
        total: float | None = None,
        completed: int = 0,
        task_id: rich_progress.TaskID | None = None,
        description: str = "Working...",
        update_period: float = 0.1,
    ) -> Iterator[T]:
        """As rich's, whose own counts in a thread that ends where there is no live display."""
        del update_period
        total = total if total is not None else operator.length_hint(sequence) or None
        task = self.add_task(description, total=total, completed=completed) if task_id is None else task_id
        for value in sequence:
            yield value
            self.advance(task)

    def _write_lines(self) -> None:
        while not self._over.wait(self._every):
            running = [t for t in self.tasks if t.visible and not t.finished]
            if running:
                self._say("; ".join(map(_state, running)))

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.0f} s] {text}", file=self.console.file, flush=True)


def _state(task: rich_progress.Task) -> str:
    if task.total is None or task.total <= 1:
        return task.description.strip()
    left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
    return f"{task.description.strip()}: {task.completed:g} of {task.total:g}{left}"


def display(show: bool = True, console: Console | None = None, announce: bool = True) -> rich_progress.Progress:
    """Bars on a terminal, lines elsewhere, nothing at all if not `show`; to be entered with `with`.

    Args:
      show: False: nothing is written.
      console: where; by default standard output.
      announce: in a log, a line for every task that begins.
    """
    console = console or Console()
    if show and not console.is_terminal and not console.is_jupyter:
        return Lines(console, announce=announce)
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    return rich_progress.Progress(*columns, console=console, disable=not show)


@contextlib.contextmanager
def bar(show: bool | rich_progress.Progress, total: int, title: str) -> Iterator[Update]:
    """update(steps done, text) on a new bar (or lines in a log) or a task of the caller's; silent if not `show`."""
    with contextlib.ExitStack() as stack:
        if isinstance(show, rich_progress.Progress):
            progress = show
        elif show:
            progress = stack.enter_context(display(True, Console(stderr=True), announce=False))
        else:
            yield lambda done, text: None
            return
        task = progress.add_task(title, total=total)
        yield lambda done, text: progress.update(task, completed=done, description=f"{title} {text}")
