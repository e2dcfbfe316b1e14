"""Files and folders that are written whole or not at all: under a temporary name first, renamed when complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 1) -> None:
    """JSON in UTF-8; whatever stood at `path` stays until the new file is complete, and also if writing fails."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=indent) + "\n")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends without an error.

    Raises:
      ValueError: the folder exists and `overwrite` is False.
    """
    target = Path(folder).absolute()
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or give overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        if target.exists():  # a full folder cannot be replaced in one move; the old one steps aside for an instant
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            os.replace(target, old)
            os.replace(unfinished, target)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
