"""safetensors files of a Hugging Face folder: read one tensor at a time without copying, written in shards.

A tensor that was read is a view of the file mapped into memory; only what is used of it is ever loaded, so that a model
larger than half the memory can be read, and each device of a mesh can be given its own part.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jprune.checkpoint.tensors import Entry, read_header
from jprune.files.atomic import write_json
from jprune.files.json_files import Fields, read_json, said_of

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a folder by name; `files["lm_head.weight"]` is a read-only view of the mapped file.

    Raises:
      ValueError: no weights, a truncated or foreign file, an index that names a tensor its shard does not
        have, a tensor in two files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._found: dict[str, tuple[mmap.mmap, Entry, Path]] = {}
        whole, index = self.folder / WEIGHTS, self.folder / INDEX
        if whole.is_file():
            self._open(whole)
        elif index.is_file():
            with said_of(index):
                where = Fields(read_json(index)).fields("weight_map")
                shards = {name: where.text(name) for name in where}
                if not shards:
                    raise ValueError("weight_map is empty: download it again")
                if odd := [file for file in shards.values() if Path(file).name != file]:
                    raise ValueError(f"weight_map has the file {odd[0]!r}: all files lie beside the index, correct it")
            for file in sorted(set(shards.values())):
                if not (self.folder / file).is_file():
                    raise ValueError(f"{self.folder / file} is missing, though {INDEX} names it: download it")
                self._open(self.folder / file)
            for name, file in shards.items():
                if name not in self._found or self._found[name][2].name != file:
                    raise ValueError(f"{self.folder / file} has no tensor {name!r}, which {INDEX} says it has")
        else:
            raise ValueError(f"{self.folder} has neither {WEIGHTS} nor {INDEX}: give the folder of a safetensors model")

    def _open(self, path: Path) -> None:
        header = read_header(path)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in header.items():
            if name in self._found:
                raise ValueError(f"{path} and {self._found[name][2]} both have a tensor {name!r}: download them again")
            self._found[name] = (data, entry, path)

    def dtype(self, name: str) -> np.dtype:
        """Its dtype; raises ValueError for types that are not plain floating point (quantised weights)."""
        kind = self._found[name][1].dtype
        if kind not in DTYPES:
            raise ValueError(
                f"tensor {name!r} has dtype {kind}; only {', '.join(DTYPES)} are read: dequantise the model first"
            )
        return DTYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._found[name][1].shape

    def __getitem__(self, name: str) -> np.ndarray:
        data, entry, _ = self._found[name]
        return np.frombuffer(data, self.dtype(name), math.prod(entry.shape), entry.first).reshape(entry.shape)

    def __iter__(self):
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class RenamedTensors(Mapping[str, np.ndarray]):
    """Some of a folder's tensors under other names, with the rest of what `TensorFiles` offers."""

    def __init__(self, files: TensorFiles, names: Mapping[str, str]):
        """`names`: {name here: name in the files}."""
        self.folder, self._files, self._names = files.folder, files, names

    def dtype(self, name: str) -> np.dtype:
        """Its dtype."""
        return self._files.dtype(self._names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._files.shape(self._names[name])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Write tensors into `folder`, in files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = held = 0

    def part(i: int) -> Path:
        return folder / f"part-{i:05d}.safetensors"

    def flush() -> None:
        nonlocal pending, held
        if pending:
            save_file(pending, part(len(shards)), metadata={"format": "pt"})
            shards.append(list(pending))
            pending, held = {}, 0

    for name, x in tensors:
        if held and held + x.nbytes > shard_bytes:
            flush()
        pending[name] = np.ascontiguousarray(x)
        held += x.nbytes
        total += x.nbytes
    flush()
    if len(shards) == 1:
        part(0).rename(folder / WEIGHTS)
        return
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        part(i).rename(folder / file)
        where |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
