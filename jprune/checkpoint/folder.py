"""A model in a folder: an orbax tree beside a metadata.json that says what ought to be in it.

    folder/variables/       the arrays, written by orbax
    folder/metadata.json    format, version, {leaf path: shape, dtype}, and the caller's own metadata

The folder is written under a temporary name beside its place and renamed when complete: whoever finds it, finds all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from jprune.checkpoint.together import orbax_options, shared_folder
from jprune.files.json_files import Fields, read_json
from jprune.tracing.paths import flatten, path_str
from jprune.version import __version__

FORMAT = "jprune-checkpoint/1"
AGAIN = "copy it again from where it was written"
Placement: TypeAlias = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]


def save(
    folder: str | Path, variables: Any, metadata: dict[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """Write a tree of arrays (dicts, lists, tuples, dataclasses registered with JAX) and JSON metadata to `folder`.

    Under `jax.distributed`, all processes call it with the same folder and their parts of the same arrays; of
    an array that each process has for itself, the first process writes its own.

    Raises ValueError if the folder exists and `overwrite` is False, or if a leaf or the metadata cannot be stored, and
    OSError in every process if another one failed.
    """
    folder = Path(folder).absolute()
    if jax.process_count() == 1 and folder.exists() and not overwrite:  # else the first process alone looks
        raise ValueError(f"{folder} exists: choose another folder, or give overwrite=True to replace it")
    leaves = {}
    for path, leaf in flatten(variables):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"leaf {path!r} is a {type(leaf).__name__}, not an array: convert it or drop it")
        if 0 in leaf.shape:
            raise ValueError(f"leaf {path!r} has shape {tuple(leaf.shape)}: an array without elements cannot be stored")
        leaves[path] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if not leaves:
        raise ValueError(f"nothing to write to {folder}: the tree has no leaves")
    contents = {"format": FORMAT, "version": __version__, "leaves": leaves, "metadata": metadata or {}}
    try:
        text = json.dumps(contents, indent=1)
    except TypeError as error:
        raise ValueError(
            f"the metadata for {folder} is not JSON ({error}): use strings, numbers, lists, dicts"
        ) from error

    with shared_folder(folder, overwrite) as unfinished:
        with ocp.StandardCheckpointer(multiprocessing_options=orbax_options()) as checkpointer:
            checkpointer.save(unfinished / "variables", jax.tree.map(_writable, variables))
        if jax.process_index() == 0:
            (unfinished / "metadata.json").write_text(text)


def load(folder: str | Path, *, like: Any = None, sharding: Placement | None = None) -> tuple[Any, dict[str, Any]]:
    """(variables, metadata) from a folder that `save` wrote; every leaf's shape and dtype is checked.

    like: a tree of arrays or ShapeDtypeStructs whose structure the result takes; without it, tuples come back as lists
        and dataclasses as dicts. sharding: one for all leaves, or a function of (leaf path, ShapeDtypeStruct); without
        it, the default device (of each process its own). Leaves are read straight into their shards.

    Raises ValueError if the folder is missing, damaged, not ours, or does not fit `like`.
    """
    folder = Path(folder).absolute()
    recorded, metadata = _contents(folder)
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    damaged = f"{folder} is damaged: {AGAIN}"

    def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = path_str(path)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"{damaged} (leaf {name!r} is no array there)")
        found = (tuple(leaf.shape), str(leaf.dtype))
        if recorded.get(name) != found:
            raise ValueError(f"{damaged} (leaf {name!r} is {found}, metadata.json says {recorded.get(name)})")
        blank = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        place = sharding if isinstance(sharding, Sharding) else sharding(name, blank)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    with ocp.StandardCheckpointer(multiprocessing_options=orbax_options()) as checkpointer:
        try:
            stored = checkpointer.metadata(folder / "variables").item_metadata.tree
        except Exception as error:  # orbax and tensorstore raise a dozen unrelated types for damaged folders
            raise ValueError(f"{damaged} ({_first_line(error)})") from error
        targets = jax.tree_util.tree_map_with_path(target, stored)
        if missing := recorded.keys() - {p for p, _ in flatten(targets)}:
            raise ValueError(f"{damaged} (leaf {min(missing)!r} is missing)")
        try:
            variables = checkpointer.restore(folder / "variables", targets)
        except Exception as error:
            raise ValueError(f"{damaged} ({_first_line(error)})") from error
    if like is not None:
        variables = _in_the_form_of(like, variables, folder)
    return variables, metadata


def _writable(leaf: Any) -> Any:
    """The leaf, or its numbers where a process of several has it for itself: then the first process writes its own."""
    own = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and jax.process_count() > 1
    return np.asarray(leaf) if own else leaf


def _contents(folder: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, Any]]:
    """({leaf path: (shape, dtype)}, the caller's metadata) as metadata.json says."""
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder}: check the path")
    file = folder / "metadata.json"
    foreign = f"{folder} is not a checkpoint written by jprune.checkpoint.save"
    if not file.is_file():
        raise ValueError(f"{foreign} (it has no metadata.json): give the folder that holds metadata.json")
    contents = Fields(read_json(file, AGAIN))
    if contents.get("format") != FORMAT:
        found = contents.get("format")
        raise ValueError(f"{foreign} (its format is {found!r}, not {FORMAT!r}): load it with what wrote it")
    try:
        leaves = contents.fields("leaves")
        of = {path: leaves.fields(path) for path in leaves}
        recorded = {path: (f.integers("shape", least=1), f.text("dtype")) for path, f in of.items()}
        return recorded, dict(contents.fields("metadata"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {AGAIN}") from error


def _in_the_form_of(like: Any, variables: Any, folder: Path) -> Any:
    found = dict(flatten(variables))
    wanted = flatten(like)
    for path, leaf in wanted:
        if path not in found:
            raise ValueError(f"{folder} has no leaf {path!r}: it belongs to another model")
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise ValueError(
                f"leaf {path!r} has shape {tuple(found[path].shape)} in {folder} and {tuple(leaf.shape)} in `like`: "
                "build the model with the checkpoint's widths"
            )
    if extra := found.keys() - {p for p, _ in wanted}:
        raise ValueError(f"{folder} has the leaf {min(extra)!r}, which `like` has not: it belongs to another model")
    return jax.tree.structure(like).unflatten([found[path] for path, _ in wanted])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
