"""Checkpoints of a run: the whole training state, and the recipe it belongs to, so that a killed run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jprune.files.atomic import silent_orbax, writing
from jprune.tracing.paths import flatten
from jprune.training.state import TrainState


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits that tell trees apart by the paths, types and shapes of their leaves."""
    leaves = ";".join(f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(tree))
    return hashlib.sha256(leaves.encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one run under `folder`; orbax renames each into place when it is complete."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self.recipe = json.loads(json.dumps(recipe))  # as it will be read back: tuples become lists
        self._open = contextlib.ExitStack()
        self._open.enter_context(silent_orbax())
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The last complete step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, sums: dict[str, float]) -> None:
        """Start writing the state at `step`; returns as soon as the state may change again."""
        run = {"recipe": self.recipe, "hash": _digest(self.recipe), "sums": sums}
        with writing(self.folder):  # or the one before, which fails in the background
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(_stored(state)), run=ocp.args.JsonSave(run))
            )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state and the epoch's sums at `step`; ValueError if it is damaged or belongs to another recipe."""
        run = self._read(step, run=ocp.args.JsonRestore())["run"]
        if run["hash"] != _digest(self.recipe):
            old, new = run["recipe"], self.recipe
            changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
            raise ValueError(
                f"{self.folder} holds a run with another recipe ({'; '.join(changed)}): "
                "resume with the same recipe, or choose another folder"
            )
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _stored(like))
        state = self._read(step, state=ocp.args.StandardRestore(target))["state"]
        state = jax.tree.map(lambda x, old: x if old.size else old, state, like._asdict())
        return type(like)(**state), run["sums"]

    def close(self) -> None:
        """Wait for the last checkpoint to be complete."""
        with self._open, writing(self.folder):
            self._manager.close()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise a dozen unrelated types for damaged folders
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"cannot read checkpoint {self.folder / str(step)} ({cause}): it is damaged or belongs to "
                "another optimiser; delete it to resume from the one before, or start in another folder"
            ) from error


def _stored(state: TrainState) -> dict[str, Any]:
    """The state with a number in place of every empty array (a layer without channels), which orbax cannot write."""
    return jax.tree.map(lambda x: x if x.size else jnp.zeros((), x.dtype, device=x.sharding), state._asdict())


def _digest(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
