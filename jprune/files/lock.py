"""One process at a time in the folder of a run: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import warnings
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FAR = 1 << 30  # the byte that Windows locks: far behind the text, which others have to read


class FolderLock:
    """The right to write one folder; the operating system takes it back from a process that was killed.

    The locked file lies beside the folder, so that a folder that does not exist yet can be locked.

    Attributes:
      folder: what is locked. file: what is locked in its place.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        whole = self.folder.resolve()
        self.file = whole.with_name(f".{whole.name}.lock")
        self._held: IO[str] | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock.

        Raises:
          ValueError: another process (it is named), or another run of this one, has it.
        """
        self._made = [p for p in self.file.parents if not p.exists()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while self._held is None:
            opened = self.file.open("a+")
            try:
                if not _locked(opened):
                    opened.seek(0)
                    raise ValueError(
                        f"{self.folder} is in use by {opened.read().strip() or 'another process'}: wait until it has "
                        "ended, or choose another --out"
                    )
            except BaseException:
                opened.close()
                raise
            if fcntl is not None and not _same(opened, self.file):  # its last holder has removed it meanwhile
                opened.close()
                continue
            opened.truncate(0)
            opened.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%F %T}\n")
            opened.flush()
            self._held = opened

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._held is None:
            return
        if fcntl is not None:
            self.file.unlink(missing_ok=True)  # before the lock goes, so that nobody else's file is removed
        self._held.close()
        if fcntl is None:
            with contextlib.suppress(OSError):  # another process has it by now
                self.file.unlink(missing_ok=True)
        self._held = None
        for empty in self._made:  # folders above, made for the lock alone where the run came to nothing
            with contextlib.suppress(OSError):
                empty.rmdir()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def _locked(opened: IO[str]) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            opened.seek(FAR)
            msvcrt.locking(opened.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems know no locks
        warnings.warn(f"cannot lock {opened.name} ({error}): let no other process write this folder", stacklevel=3)
    return True


def _same(opened: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), file.stat())
    except FileNotFoundError:
        return False
