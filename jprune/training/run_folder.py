"""The folder of a run: claimed once, its phases shown and timed, an interrupted run gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from jprune.files.atomic import write_json
from jprune.files.json_files import read_json
from jprune.files.lock import FolderLock
from jprune.training.progress import display


class Workspace:
    """One folder and what happens in it.

    Attributes:
      out: the folder. quiet: no progress bar.
      seconds: {phase: seconds}, of this call alone where a run was interrupted.
      warnings: what was said by `warn`.
    """

    def __init__(self, out: Path, quiet: bool = False):
        self.out, self.quiet = out, quiet
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._lock = FolderLock(out)

    @contextlib.contextmanager
    def claim(self, options: Mapping[str, Any], resume: bool) -> Iterator[None]:
        """Take the folder for a run with these options, or go on with the run that has it.

        What can be refused is refused before the block, in which the run gets ready; the folder is made behind it. From
        here until `release` no other process can take the folder.

        Raises:
          ValueError: it holds another run, one with other options, or something else; its options are damaged; or
            another process is at work in it.
        """
        mine = json.loads(json.dumps(options))
        self._lock.acquire()
        try:
            self._check(mine, resume)
            yield
            if not (self.out / "options.json").is_file():
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / "options.json", mine)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def _check(self, mine: Mapping[str, Any], resume: bool) -> None:
        file = self.out / "options.json"
        if not file.is_file():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ValueError(f"{self.out} exists and is not a pruning run: choose another --out")
            return
        if not resume:
            raise ValueError(f"{self.out} already holds a run: give --resume to go on with it, or another --out")
        theirs = read_json(file, "choose another --out")
        for k in mine:
            if theirs.get(k) != mine[k]:
                raise ValueError(
                    f"{self.out} was started with {k} = {theirs.get(k)!r}, now it is {mine[k]!r}: "
                    "resume with the same options, or choose another --out"
                )

    def warn(self, text: str) -> None:
        """Say what a user would not expect: at once, in summary.json and in the report."""
        self.warnings.append(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def folder(self, phase: str) -> Path:
        """Where a phase keeps its checkpoints and metrics."""
        return self.out / "phases" / phase.replace(" ", "-")

    def join_metrics(self, phases: Sequence[str]) -> None:
        """metrics.jsonl of the run: the lines of these phases, in order, each with its phase's name."""
        temporary = self.out / "metrics.jsonl.tmp"
        with temporary.open("w") as out:
            for name in phases:
                for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines():
                    out.write(json.dumps({"phase": name, **json.loads(line)}) + "\n")
        os.replace(temporary, self.out / "metrics.jsonl")

    @contextlib.contextmanager
    def progress(self, steps: int) -> Iterator[Progress]:
        """Bars (lines in a log) of the run, one over all its steps."""
        with display(not self.quiet) as progress:
            self._whole = progress.add_task("all of it", total=steps, visible=steps > 1)
            yield progress
            progress.update(self._whole, completed=steps)

    @contextlib.contextmanager
    def phase(self, name: str, progress: Progress) -> Iterator[None]:
        """A phase that is no training: shown, and timed without the trainings inside."""
        task = progress.add_task(name, total=1)
        inside = sum(self.seconds.values())
        start = time.monotonic()
        yield
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] = time.monotonic() - start - nested
        progress.update(task, completed=1)

    @contextlib.contextmanager
    def counted(self, name: str, steps: int, progress: Progress) -> Iterator[Callable[..., None]]:
        """A phase of so many steps: timed; yields what is to be called after each (with their number), to move the bar."""
        before = progress.tasks[self._whole].completed
        start = time.monotonic()
        yield lambda step, *_: progress.update(self._whole, completed=before + step)
        progress.update(self._whole, completed=before + steps)
        self.seconds[name] = time.monotonic() - start
