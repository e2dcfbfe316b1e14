"""One folder written by all processes of a `jax.distributed` program: the first makes and renames it, all fill it.

What one process cannot do, no process waits for: each says at the end of a step how it went, and all of them raise.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from orbax.checkpoint import multihost, options

from jprune.files.atomic import whole_folder

SECONDS = 1200  # that a process waits for the others, as orbax does
_steps = itertools.count()  # all processes take the same steps in the same order


@contextlib.contextmanager
def shared_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """`whole_folder` for all processes together; each is given the same folder, on a file system that they share.

    Raises:
      ValueError: the folder exists and `overwrite` is False.
      OSError: another process failed, or did not come within SECONDS.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            yield stack.enter_context(whole_folder(folder, overwrite))
            return
        with _step() as told:
            if jax.process_index() == 0:
                told.append(str(stack.enter_context(whole_folder(folder, overwrite))))
        with _step():
            yield Path(told[0])
        with _step():
            stack.close()


def orbax_options() -> options.MultiprocessingOptions:
    """With which orbax waits for other processes no longer than its timeout: by default it has none."""
    if jax.process_count() == 1:
        return options.MultiprocessingOptions()
    return options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


@contextlib.contextmanager
def _step() -> Iterator[list[str]]:
    """What is done inside is done when all processes have done it. The list: what the first process puts into it, for all.

    Raises:
      OSError: another process raised an error inside, or did not come within SECONDS.
    """
    client, me, key = multihost.get_jax_distributed_client(), jax.process_index(), f"jprune/step/{next(_steps)}"
    told: list[str] = []
    try:
        yield told
    except BaseException as error:
        client.key_value_set(f"{key}/{me}", f"- {type(error).__name__}: {error}")
        raise
    client.key_value_set(f"{key}/{me}", "+ " + "".join(told))
    for process in range(jax.process_count()):
        try:
            said = client.blocking_key_value_get(f"{key}/{process}", 1000 * SECONDS)
        except Exception as error:  # the client's own type, for a time that is over and for a connection that is gone
            raise OSError(f"process {process} did not come within {SECONDS} seconds ({error})") from error
        if said.startswith("-"):
            raise OSError(f"process {process} failed: {said[2:]}")
        if process == 0:
            told[:] = [said[2:]]
