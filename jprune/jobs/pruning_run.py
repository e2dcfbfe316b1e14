"""What runs that prune share: an amount and a method's settings are checked, then all phases in a folder of their own."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any, Protocol

from jprune.methods.contract import Amount, Method
from jprune.training.run_folder import RunFolder


class Asked(Protocol):
    """A job's options, a frozen dataclass."""

    @property
    def chosen(self) -> Method: ...
    @property
    def amount(self) -> Amount | None: ...


class PruningRun(RunFolder, abc.ABC):
    """One run in its folder; calling it goes through all phases.

    Attributes:
      method, settings: what is removed, and how.
      said: options and settings as plain data.
    """

    def __init__(self, options: Asked, out: Path, settings: Any = None, resume: bool = False, quiet: bool = False):
        """Get ready, and refuse what cannot be done.

        Args:
          options: what is asked for.
          out: the folder.
          settings: of the method, an instance of its `config`; None: the usual ones.
          resume: go on with the run in `out`.
          quiet: show no progress.

        Raises:
          ValueError: settings of another method, an amount out of reach, or what `claim` refuses.
        """
        super().__init__(out, quiet)
        self.method = options.chosen
        self.settings = self.method.config() if settings is None else settings
        if not isinstance(self.settings, self.method.config):
            expected = self.method.config.__name__
            raise ValueError(f"the settings of {self.method.name!r} are a {expected}, not {settings}")
        assert dataclasses.is_dataclass(options) and not isinstance(options, type)
        self.said = {**dataclasses.asdict(options), **dataclasses.asdict(self.settings)}
        self.prepare(resume)

    @abc.abstractmethod
    def prepare(self, resume: bool) -> None:
        """Claim the folder, read what is needed, and have the method check its task."""

    @abc.abstractmethod
    def work(self) -> dict[str, Any]:
        """All phases; returns what summary.json says."""

    def __call__(self) -> dict[str, Any]:
        """All phases; returns what summary.json says."""
        try:
            return self.work()
        finally:
            self.release()
