"""Files and folders that are written whole or not at all: under a temporary name first, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a disk or a file system refuses; libraries that write report it as text in types of their own.
CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make what fails to be written inside an OSError with the name of `path`, whatever type the library raised.

    orbax logs such errors too, with all its threads' tracebacks; it is silent here, since the error is raised.
    """
    with silent_orbax():
        try:
            yield
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        except Exception as error:
            if (code := next((c for c in CAUSES if os.strerror(c) in str(error)), None)) is None:
                raise
            raise OSError(code, os.strerror(code), os.fspath(path)) from error


@contextlib.contextmanager
def silent_orbax() -> Iterator[None]:
    """Leave out of the log the tracebacks of errors that orbax raises as well."""

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def ignore_leftovers() -> None:
    """For a program's entry: of one write that fails orbax leaves others behind. Their threads find its event loop closed,
    and asyncio prints what became of its tasks and futures, for each of them and after the error itself."""
    own = sys.unraisablehook

    def hook(left: Any) -> None:
        if not (isinstance(left.exc_value, RuntimeError) and str(left.exc_value) == "Event loop is closed"):
            own(left)

    def wanted(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not ("exception was never retrieved" in said and ("orbax" in said or "OCDBT" in said))

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(wanted)


def write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 1) -> None:
    """JSON in UTF-8; whatever stood at `path` stays until the new file is complete, and also if writing fails."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=indent) + "\n")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write, which takes the name `path` when the block ends; what stood there stays if an error ends it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with writing(target):
            yield temporary
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends without an error.

    Raises:
      ValueError: the folder exists and `overwrite` is False.
    """
    target = Path(folder).absolute()
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or give overwrite=True to replace it")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(target):
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
