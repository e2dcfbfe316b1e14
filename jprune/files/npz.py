"""NumPy's .npz files that somebody else may have written: read whole, and never unpickled."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """{name: array} of a file that `numpy.savez` or `numpy.savez_compressed` wrote.

    Raises:
      ValueError: there is no such file, or it is truncated, damaged, holds a name twice, or Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the path")
    try:
        with zipfile.ZipFile(path):  # numpy would take other files for a single array
            pass
        with np.load(path, allow_pickle=False) as stored:
            if len(set(stored.files)) != len(stored.files):
                raise ValueError("it holds a name twice")
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, LookupError, EOFError, MemoryError, NotImplementedError, RuntimeError, SyntaxError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        # zipfile and numpy's parser of headers raise all of these for damaged bytes; MemoryError: a shape that is too large
        raise ValueError(f"{path} is damaged or no .npz file ({error}): download or copy it again") from error
    if odd := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
        raise ValueError(f"{path} is damaged or no .npz file ({odd[0]!r} is no array): download or copy it again")
    return arrays
