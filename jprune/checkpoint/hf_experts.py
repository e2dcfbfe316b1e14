"""The experts of Qwen3-MoE and Mixtral folders: one tensor for each in the files, one array for all of a layer here.

    qwen3_moe  model.layers.{l}.mlp.gate.weight (E, d); mlp.experts.{e}.gate_proj, up_proj (F, d), down_proj (d, F)
    mixtral    block_sparse_moe.gate.weight (E, d); block_sparse_moe.experts.{e}.w1 (gate), w3 (up) (F, d), w2 (down) (d, F)

What newer programs keep in memory, mlp.experts.gate_up_proj (E, 2 F, d) and mlp.experts.down_proj (E, d, F), is read too;
single tensors are written, which all programs read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jprune.models.llama_config import LlamaConfig

NAMES = {  # family: the module, and an expert's gate, up and down
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}
PARTS = ("gate", "up", "down")
LAYER = "model.layers.{l}."


class StackedExperts(Mapping[str, np.ndarray]):
    """A folder's tensors, with a layer's experts side by side: `mlp.experts.gate` and `.up` (E F, d), `.down` (d, E F).

    Raises:
      ValueError: an expert that is missing, or more of them than the config says.
    """

    def __init__(self, files: Any, config: LlamaConfig):
        assert config.experts is not None
        self.folder: Path = files.folder
        self._files, self._config, self._own = files, config, {}
        count, (module, parts) = config.experts.count, NAMES[config.family]
        consumed: set[str] = set()
        for i in range(config.depth):
            layer = LAYER.replace("{l}", str(i))
            self._own[f"{layer}mlp.gate.weight"] = [f"{layer}{module}.gate.weight"]
            fused = f"{layer}mlp.experts.gate_up_proj" in files
            for part, name in zip(PARTS, parts):
                if fused:
                    found = [f"{layer}mlp.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"]
                else:
                    found = [f"{layer}{module}.experts.{e}.{name}.weight" for e in range(count)]
                    one_more = f"{layer}{module}.experts.{count}.{name}.weight"
                    if one_more in files:
                        raise ValueError(f"{self.folder} has the tensor {one_more!r}, though its config.json says {count} "
                                         "experts: correct the number")  # fmt: skip
                self._own[f"{layer}mlp.experts.{part}"] = found
        for names in self._own.values():
            for name in names:
                if name not in files:
                    raise ValueError(f"{self.folder} has no tensor {name!r}, which its config.json asks for")
            consumed |= set(names)
        self._rest = {name for name in files if name not in consumed}

    def dtype(self, name: str) -> np.dtype:
        """The widest dtype of what it is made of."""
        return np.result_type(*(self._files.dtype(n) for n in self._own.get(name, [name])))

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; tensors of experts are compared with the config.

        Raises:
          ValueError: an expert of another shape than the config says.
        """
        names = self._own.get(name)
        if names is None or name.endswith("mlp.gate.weight"):
            return self._files.shape(name if names is None else names[0])
        wanted, whole = self._shapes(name)
        for n in names:
            if self._files.shape(n) != wanted:
                raise ValueError(f"tensor {n!r} has shape {self._files.shape(n)}; by its config.json it has {wanted}")
        return whole

    def _shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(of each tensor in the files, of all side by side)."""
        c, down = self._config, name.endswith("down")
        assert c.experts is not None
        e, f, d = c.experts.count, c.ffn[int(name.split(".")[2])], c.stream
        one = (d, f) if down else (f, d)
        if len(self._own[name]) == 1 and not self._own[name][0].endswith(".weight"):
            one = (e, d, f) if down else (e, 2 * f, d)
        return one, (d, e * f) if down else (e * f, d)

    def __getitem__(self, name: str) -> np.ndarray:
        names = self._own.get(name)
        if names is None:
            return self._files[name]
        if name.endswith("mlp.gate.weight"):
            return self._files[names[0]]
        down = name.endswith("down")
        if names[0].endswith(".weight"):
            return np.concatenate([self._files[n] for n in names], axis=1 if down else 0)
        x = self._files[names[0]]
        if down:
            return x.transpose(1, 0, 2).reshape(x.shape[1], -1)
        half = x.shape[1] // 2
        return (x[:, :half] if name.endswith("gate") else x[:, half:]).reshape(-1, x.shape[2])

    def __contains__(self, name: object) -> bool:  # a mapping would read the tensor to find out
        return name in self._own or name in self._rest

    def __iter__(self):
        yield from self._own
        yield from self._rest

    def __len__(self) -> int:
        return len(self._own) + len(self._rest)


def split_experts(tensors: Iterable[tuple[str, np.ndarray]], config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse: a tensor for each expert, by the family's names."""
    assert config.experts is not None
    module, parts = NAMES[config.family]
    for name, x in tensors:
        head, _, part = name.rpartition(".mlp.")
        if part == "gate.weight":
            yield f"{head}.{module}.gate.weight", x
        elif part.startswith("experts."):
            kind = part.removeprefix("experts.")
            own = parts[PARTS.index(kind)]
            split = np.split(x, config.experts.count, axis=1 if kind == "down" else 0)
            yield from ((f"{head}.{module}.experts.{e}.{own}.weight", one) for e, one in enumerate(split))
        else:
            yield name, x
