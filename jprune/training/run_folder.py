"""The folder of a run: claimed once, its phases shown and timed, an interrupted run gone on with, its results written."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from jprune.files.atomic import replacing, write_json
from jprune.files.json_files import read_json
from jprune.files.lock import FolderLock
from jprune.training.progress import display


class RunFolder:
    """One folder and what happens in it; without a folder work is shown and timed all the same, and nothing is kept.

    Attributes:
      out: the folder, or None.
      quiet: no progress is shown.
      bars: where progress is drawn.
      seconds: {phase: seconds}, of this call alone where a run was interrupted.
      warnings: what was said by `warn`.
      trained: names of the phases that trained, in order.
      kept: what one phase measured and a later one needs again.
    """

    def __init__(self, out: Path | None = None, quiet: bool = True):
        self.out, self.quiet = out, quiet
        self.bars: Progress = display(False)
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.trained: list[str] = []
        self.kept: dict[str, Any] = {}
        self._lock = None if out is None else FolderLock(out)
        self._whole: Any = None

    # -- the folder -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, options: Mapping[str, Any], resume: bool = False, replaces: str | None = None) -> Iterator[None]:
        """Take the folder for a run with these options, or go on with the run that has it.

        What can be refused is refused before the block, in which the run gets ready; the folder is made behind it. From
        here until `release` no other process can take the folder.

        Args:
          options: plain data that decides the outcome.
          resume: go on with a run of the same options.
          replaces: a file's name: a folder that holds it is the result of a run of the same kind and may be replaced.

        Raises:
          ValueError: it holds another run, one with other options, or something else; its options are damaged; or
            another process is at work in it.
        """
        if self.out is None or self._lock is None:
            yield
            return
        mine = json.loads(json.dumps(options))
        self._lock.acquire()
        try:
            if replaces is None:
                self._check(self.out, mine, resume)
            elif self.out.exists() and not (self.out / replaces).is_file():
                raise ValueError(f"{self.out} exists and holds no {replaces} of such a run: choose another --out")
            yield
            if replaces is None and not (self.out / "options.json").is_file():
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / "options.json", mine)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.release()

    def _check(self, out: Path, mine: Mapping[str, Any], resume: bool) -> None:
        file = out / "options.json"
        if not file.is_file():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ValueError(f"{out} exists and is not a pruning run: choose another --out")
            return
        if not resume:
            raise ValueError(f"{out} already holds a run: give --resume to go on with it, or another --out")
        theirs = read_json(file, "choose another --out")
        for k in {**mine, **theirs}:
            if theirs.get(k) != mine.get(k):
                raise ValueError(
                    f"{out} was started with {k} = {theirs.get(k)!r}, now it is {mine.get(k)!r}: "
                    "resume with the same options, or choose another --out"
                )

    def folder(self, phase: str) -> Path | None:
        """Where a phase keeps its checkpoints and metrics."""
        return None if self.out is None else self.out / "phases" / phase.replace(" ", "-")

    def join_metrics(self) -> None:
        """metrics.jsonl of the run: the lines of all phases that trained, in order, each with its phase's name."""
        assert self.out is not None
        with replacing(self.out / "metrics.jsonl") as unfinished, unfinished.open("w") as out:
            for name in self.trained:
                folder = self.folder(name)
                assert folder is not None
                for line in (folder / "metrics.jsonl").read_text().splitlines():
                    out.write(json.dumps({"phase": name, **json.loads(line)}) + "\n")

    def histories(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(phase, its epochs) of all phases that trained."""
        out = []
        for name in self.trained:
            folder = self.folder(name)
            assert folder is not None
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            out.append((name, [line for line in lines if line["kind"] == "epoch"]))
        return out

    # -- what is shown --------------------------------------------------------------------------------------------

    def warn(self, text: str) -> None:
        """Say what a user would not expect: at once, in summary.json and in the report."""
        self.warnings.append(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def shown(self, steps: int = 1) -> Iterator[None]:
        """Bars (lines in a log) of the run, one over all its steps of training."""
        with display(not self.quiet) as bars:
            self.bars, outside = bars, self.bars
            self._whole = bars.add_task("all of it", total=steps, visible=steps > 1)
            try:
                yield
            finally:
                bars.update(self._whole, completed=steps)
                self.bars, self._whole = outside, None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that is no training: shown, and timed without the trainings inside."""
        task = self.bars.add_task(name, total=1)
        inside = sum(self.seconds.values())
        start = time.monotonic()
        yield
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] = time.monotonic() - start - nested
        self.bars.update(task, completed=1)

    @contextlib.contextmanager
    def counted(self, name: str, steps: int, parts: Sequence[str] | None = None) -> Iterator[Callable[..., None]]:
        """A phase of so many steps of training: timed; yields what is to be called after each with its number.

        `parts`: the folders of its metrics, where it has several; else it has one of its own name.
        """
        before = 0 if self._whole is None else self.bars.tasks[self._whole].completed
        start = time.monotonic()

        def moved(step: int, *_: Any) -> None:
            if self._whole is not None:
                self.bars.update(self._whole, completed=before + step)

        yield moved
        moved(steps)
        self.seconds[name] = time.monotonic() - start
        self.trained += [name] if parts is None else parts
