"""What all experiments share: rows are run for every seed, taken up again, summed up, judged, written and drawn.

An experiment is a `Study`: settings, rows, and what is demanded of them. `study.main()` is its command line: `--config`
chooses a setting, every field of the setting is a flag, and

    --seeds 0 1 2        seeds to run
    --rows NAME ...      these rows only: their numbers are printed and written, nothing is judged or drawn
    --out FILE           the results file; its figure lies beside it
    --work FOLDER        keep finished rows, and the checkpoints of every training, here
    --redraw             run nothing: sum up, judge and draw again what the results file holds of every seed

A row that has ended is on the disk; the same command goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import tyro
from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from rich.progress import Progress

from experiments import record
from jprune.files.json_files import read_json
from jprune.training.progress import display
from jprune.training.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"

S = TypeVar("S")
C = TypeVar("C")
Key = tuple[str, ...]  # where a row's numbers stand in the results


class Run(NamedTuple):
    """One seed's turn.

    Attributes:
      seed: of everything random.
      work: folder for checkpoints, None: they are not kept.
      progress: to draw bars on.
    """

    seed: int
    work: Path | None
    progress: Progress


class Demand(NamedTuple):
    """What a number must be: at most, or at least, a bound."""

    value: float
    sign: str
    bound: float

    @property
    def holds(self) -> bool:
        """False too for a number that is none."""
        return self.value <= self.bound if self.sign == "<=" else self.value >= self.bound


def at_most(value: float, bound: float) -> Demand:
    """value <= bound."""
    return Demand(float(value), "<=", float(bound))


def at_least(value: float, bound: float) -> Demand:
    """value >= bound."""
    return Demand(float(value), ">=", float(bound))


@dataclasses.dataclass(frozen=True)
class Study(Generic[S, C]):
    """An experiment.

    Attributes:
      name: of its module; its files are NAME-CONFIG, with "-" for "_".
      about: what `--help` says first, the module's own text.
      settings: {config: setting}, frozen dataclasses of one type; the first is the default, whose results are judged.
      seeds: by default.
      begin: (setting, run) -> what the rows of one seed share.
      rows: setting -> {keys: row}; a row gets what `begin` gave and returns numbers, or dicts and lists of them.
      demands: results file -> {sentence: demand}.
      tables: results file -> what is printed.
      draw: results file -> its figure; None: it has none.
      once: {key: setting -> plain data}: what is found once and stands beside the results.
    """

    name: str
    about: str | None
    settings: Mapping[str, S]
    begin: Callable[[S, Run], C]
    rows: Callable[[S], Mapping[Key, Callable[[C], Any]]]
    demands: Callable[[Mapping[str, Any]], Mapping[str, Demand]]
    tables: Callable[[Mapping[str, Any]], Sequence[RenderableType]]
    draw: Callable[[Mapping[str, Any]], Figure] | None = None
    once: Mapping[str, Callable[[S], Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    def file(self, config: str) -> Path:
        """Where the results of a configuration are committed."""
        return RESULTS / f"{self.name.replace('_', '-')}-{config}.json"

    def options(self, args: Sequence[str]) -> Options[S]:
        """What the command line says."""
        choose = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        choose.add_argument("--config", choices=list(self.settings), default=next(iter(self.settings)))
        config = choose.parse_known_args(list(args))[0].config
        setting, prog = self.settings[config], f"python -m experiments.{self.name}"
        kind: Any = Options[type(setting)]
        default = Options(setting, config, self.seeds)
        return tyro.cli(
            kind,
            args=list(args),
            default=default,
            prog=prog,
            description=self.about,
            config=(tyro.conf.AvoidSubcommands,),
        )

    def main(self, args: Sequence[str] | None = None) -> dict[str, Any]:
        """The command line; returns what the results file holds."""
        o = self.options(sys.argv[1:] if args is None else args)
        config = o.config
        out = o.out or self.file(config)
        console = Console(width=None if Console().is_terminal else 130)
        if o.redraw:
            old = read_json(out)
            record.write(out, stored := self.summed(old, judge=bool(old["checks"])))
        else:
            stored = self.run(config, o.setting, o.seeds, out, o.work, o.rows)
        picture = (FIGURES if out.parent == RESULTS else out.parent) / f"{out.stem}.png"
        if o.rows:  # tables and figures are of all rows
            console.print_json(data=stored["results"])
        else:
            self.report(console, stored, picture)
        console.print(f"written to {out}")
        return stored

    def run(
        self,
        config: str,
        setting: S,
        seeds: Sequence[int],
        out: Path,
        work: Path | None = None,
        only: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Every row of every seed that is not in the work folder yet, summed up and written to `out`.

        Raises:
          ValueError: no such row; or the work folder holds rows of another setting, or is in use.
        """
        rows = {k: row for k, row in self.rows(setting).items() if not only or k[-1] in only}
        if unknown := set(only) - {k[-1] for k in rows}:
            raise ValueError(f"no rows {sorted(unknown)}; there are {sorted({k[-1] for k in self.rows(setting)})}")
        folder = work or out.with_name(f"{out.stem}.unfinished")
        workspace, said = RunFolder(folder), {"config": config, **record.plain(setting)}
        with workspace.claim({"study": self.name, "setting": said}, resume=True):
            pass
        try:
            with display(True, Console(stderr=True)) as progress:
                task = progress.add_task(self.name, total=len(rows) * len(seeds))
                done = {}
                for s in seeds:
                    turn = Run(s, None if work is None else work / f"seed{s}", progress)
                    done[str(s)] = self._seed(setting, rows, turn, folder / f"seed{s}.json", task)
            beside = {key: find(setting) for key, find in self.once.items()}
        except BaseException:
            if work is None and not any(folder.glob("seed*.json")):  # nothing to go on with
                shutil.rmtree(folder)
            raise
        finally:
            workspace.release()
        command = f"python -m experiments.{self.name} --config {config} --seeds {' '.join(map(str, seeds))}"
        usual = record.plain(self.settings[config])
        for name, value in said.items():
            if isinstance(value, str | int | float) and name in usual and value != usual[name]:
                command += f" --{name.replace('_', '-')} {value}"
        command += f" --rows {' '.join(map(shlex.quote, only))}" if only else ""
        head = {"command": command, "machine": record.machine(), "setting": said, "checks": {}}
        whole = json.loads(json.dumps({**head, **beside, "results": {}, "seeds": done}))
        stored = self.summed(whole, judge=not only and config == next(iter(self.settings)))
        record.write(out, stored)
        if work is None:
            shutil.rmtree(folder)
        return stored

    def _seed(
        self, setting: S, rows: Mapping[Key, Callable[[C], Any]], turn: Run, file: Path, task: Any
    ) -> dict[str, Any]:
        done: dict[str, Any] = read_json(file) if file.is_file() else {}
        out: dict[str, Any] = {}
        shared: list[C] = []
        for keys, row in rows.items():
            if (found := _get(done, keys)) is None:
                shared = shared or [self.begin(setting, turn)]
                found = row(shared[0])
                try:
                    found = json.loads(json.dumps(found, allow_nan=False))
                except ValueError as error:
                    raise ValueError(f"row {', '.join(keys)} of seed {turn.seed}: {error} in {found}") from error
                _put(done, keys, found)
                record.write(file, done)
            _put(out, keys, found)
            turn.progress.advance(task)
        return out

    def summed(self, stored: Mapping[str, Any], judge: bool) -> dict[str, Any]:
        """The results file with results and verdicts computed anew from what it holds of every seed."""
        out = {**stored, "results": record.over_seeds(list(stored["seeds"].values()))}
        return {**out, "checks": {what: d.holds for what, d in self.demands(out).items()} if judge else {}}

    def report(self, console: Console, stored: Mapping[str, Any], picture: Path) -> None:
        """Tables, demands with their numbers, figure."""
        for table in self.tables(stored):
            console.print(table)
        for what, d in self.demands(stored).items() if stored["checks"] else ():
            verdict = "[green]yes[/]" if d.holds else "[red]NO [/]"
            console.print(f"{verdict} {what} ({d.value:.4g} {d.sign} {d.bound:.4g})")
        if self.draw is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            temporary = picture.with_name(f".{picture.name}.{os.getpid()}.tmp")
            self.draw(stored).savefig(temporary, dpi=110, format="png")
            temporary.replace(picture)
            console.print(f"drawn to {picture}")


@dataclasses.dataclass(frozen=True)
class Options(Generic[S]):
    """What every experiment can be told.

    Attributes:
      setting: the configuration's, field by field.
      config: which setting, and by its name which results file.
      seeds: to run.
      rows: only these, by name; all if none. Nothing is judged or drawn then.
      out: the results file, instead of the committed one.
      work: keep finished rows and the checkpoints of every training here, and go on from them.
      redraw: run nothing, but sum up, judge and draw what the results file holds of every seed.
    """

    setting: Annotated[S, tyro.conf.arg(name="")]
    config: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...] = ()
    out: Path | None = None
    work: Path | None = None
    redraw: bool = False


def _get(tree: Any, keys: Key) -> Any:
    for k in keys:
        tree = None if tree is None else tree.get(k)
    return tree


def _put(tree: dict[str, Any], keys: Key, value: Any) -> None:
    for k in keys[:-1]:
        tree = tree.setdefault(k, {})
    tree[keys[-1]] = value
