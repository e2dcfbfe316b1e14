"""Decoders in Hugging Face folders (config.json beside safetensors): read into `jprune.models.llama`, written pruned.

folder/config.json                 the model, as its family's stock classes or our few lines of code read it
folder/model*.safetensors          weights under their original names
folder/jprune.json                 what was done: method, seed, sparsities, kept indices, the true widths
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jprune.checkpoint.folder import Placement
from jprune.checkpoint.hf_config import config_from_hf, export_family, hf_from_config
from jprune.checkpoint.hf_experts import StackedExperts, split_experts
from jprune.checkpoint.hf_export import (
    CODE_FILE,
    hetero_config,
    pad_layer,
    padded_config,
    remote_code,
    removed,
    strip_layer,
)
from jprune.checkpoint.hf_files import TensorFiles, write_tensors
from jprune.checkpoint.layouts.codebases import HF, LINEN, LINEN_SCAN
from jprune.checkpoint.layouts.convert import shape_in, sizes
from jprune.checkpoint.layouts.kept import Kept
from jprune.checkpoint.layouts.layout import from_logical, views
from jprune.files.atomic import whole_folder, write_json
from jprune.files.json_files import REQUIRED, Fields, read_json, said_of
from jprune.models.llama import Llama, LlamaConfig, unstack_layers
from jprune.models.llama_config import FAMILIES, WITH_EXPERTS
from jprune.models.shapes import check_tree
from jprune.version import __version__

RECORD, FORMAT = "jprune.json", "jprune-hf/1"
MODES = ("uniform", "padded", "hetero")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PruningRecord:
    """What `jprune.json` says of how a model came about.

    Attributes:
      method, seed, calibration, target: name, PRNG seed, description of the data, sparsity that was asked for.
      source: id of the model that was pruned.
      dense: its config; with it the achieved sparsities are written.
      kept: which units of it stayed; with it masks can be applied to the original and adapters transplanted.
    """

    method: str = ""
    seed: int | None = None
    calibration: str = ""
    target: float | None = None
    source: str = ""
    dense: LlamaConfig | None = None
    kept: Kept | None = None


def load_hf(
    folder: str | Path,
    *,
    dtype: Any = None,
    scanned: bool = False,
    sharding: Placement | None = None,
    keep_padding: bool = False,
) -> tuple[LlamaConfig, Any, dict[str, Any]]:
    """(config, variables, metadata) of a folder; `Llama(config, scanned).apply(variables, ids)` runs it.

    One tensor at a time is read; with a sharding, every device is given its own part straight from the file.

    Args:
      folder: config.json beside model.safetensors or its shards; from the hub or from `save_hf`, in any mode.
      dtype: cast the weights; None: every tensor as it is stored.
      scanned: stack the layers.
      sharding: one for all leaves, or a function of (leaf path, ShapeDtypeStruct); None: the default device.
      keep_padding: leave the zeros of a folder that was saved "padded" where they are.

    Returns:
      metadata: {"hf_config": the config.json, "record": the jprune.json or None}.

    Raises:
      ValueError: a missing, damaged or quantised model, an unsupported type, a tensor too many or too few (named).
    """
    folder = Path(folder)
    with said_of(folder):
        hf, record = _said(folder)
        files = TensorFiles(folder)
        with said_of(folder / "config.json"):
            stored = config_from_hf(hf, layers=layers_in(files))
        config, variables = read_decoder(
            files, stored, record, dtype=dtype, scanned=scanned, sharding=sharding, keep_padding=keep_padding
        )
    return config, variables, {"hf_config": hf, "record": record}


def read_config(folder: str | Path) -> LlamaConfig:
    """The config that `load_hf` gives for a folder, without a look at its weights: their dtype is what config.json says.

    Raises:
      ValueError: a missing or damaged config.json, an unsupported type.
    """
    folder = Path(folder)
    with said_of(folder):
        hf, record = _said(folder)
        with said_of(folder / "config.json"):
            stored = config_from_hf(hf, layers=layers_in(TensorFiles(folder)))
        return _recorded(folder, stored, record, keep_padding=False)


def _said(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json, jprune.json or None) of a folder."""
    hf = read_json(folder / "config.json", "give the folder of a Hugging Face model, or download it again")
    return hf, read_json(folder / RECORD) if (folder / RECORD).is_file() else None


def read_decoder(
    files: Any,
    stored: LlamaConfig,
    record: Mapping[str, Any] | None = None,
    *,
    dtype: Any = None,
    scanned: bool = False,
    sharding: Placement | None = None,
    keep_padding: bool = False,
) -> tuple[LlamaConfig, Any]:
    """(config, variables) of a decoder from its tensors by name.

    Args:
      files: `TensorFiles`, or a part of them under the decoder's own names (`RenamedTensors`).
      stored: the model that these tensors are.
      record: the folder's jprune.json, if it has one.
      dtype, scanned, sharding, keep_padding: as for `load_hf`.

    Raises:
      ValueError: as for `load_hf`.
    """
    if stored.experts is not None:
        files = StackedExperts(files, stored)
    names = _names(stored)
    _check_tensors(files, stored, names)
    own = jnp.dtype(dtype or files.dtype(names["embed", None]))
    stored = dataclasses.replace(stored, dtype=own.name)
    config = _recorded(Path(files.folder), stored, record, keep_padding)
    target = LINEN_SCAN if scanned else LINEN
    if scanned and not config.uniform:
        raise ValueError(f"the layers of {files.folder} differ in width: they cannot be stacked; use scanned=False")

    def part(name: str, layer: int | None) -> np.ndarray:
        x = files[names[name, layer]]
        if layer is not None and config is not stored:
            x = strip_layer(name, x, config, stored, layer)
        site = target.sites[name][0]
        return from_logical(name, site, x, shape_in(site, sizes(config, layer)))

    params: dict[str, Any] = {}
    for name, layer in names:
        site = target.sites[name][0]
        if scanned and layer is not None:
            if layer:
                continue
            kinds = [files.dtype(names[name, i]) for i in range(config.depth)]
            x = np.empty((config.depth, *part(name, 0).shape), np.result_type(*kinds) if dtype is None else own)
            for i in range(config.depth):
                x[i] = part(name, i)
        else:
            x = part(name, layer)
        keys = site.path.replace("{l}", str(layer)).split("/")
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = _placed("/".join(("params", *keys)), x, x.dtype if dtype is None else own, sharding)
    return config, {"params": params}


def save_hf(
    variables: Any,
    config: LlamaConfig,
    folder: str | Path,
    *,
    mode: str | None = None,
    record: PruningRecord | None = None,
    hf_config: Mapping[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
    multiple_of: int = 128,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a (pruned) decoder as a Hugging Face folder, whole or not at all; `load_hf` gives the same bits back.

    Args:
      variables: of `Llama(config)`, unrolled or scanned.
      config: its widths.
      folder: to write.
      mode: "uniform": an ordinary model, if all layers are equally wide; "padded": an ordinary model with zeros up to
        the widest layer, the same function; "hetero": layers as they are, loads with trust_remote_code=True. None:
        uniform, if the layers agree.
      record: how it came about.
      hf_config: config.json of the original, whose other keys (token ids, ...) are kept.
      tokenizer_from: a folder whose tokenizer files are copied.
      multiple_of: what "padded" rounds the MLP's width up to.
      shard_bytes: of the largest weights file.
      overwrite: replace an existing folder.

    Raises:
      ValueError: an unknown mode or one that cannot hold the model, a tree that is not the config's.
    """
    if mode is None:
        mode = "uniform" if config.uniform else None
        if mode is None:
            raise ValueError("the layers differ in width: choose mode='padded' (zeros, any program) or 'hetero'")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    variables = unstack_layers(variables)
    check_tree(Llama(config), variables)
    _check_mode(config, mode)
    stored = padded_config(config, multiple_of) if mode == "padded" else config
    if mode == "hetero":
        hf = hetero_config(stored, dict(hf_config or {}))
    else:
        hf = hf_from_config(stored, export_family(stored), hf_config)
    hf["torch_dtype"] = str(views(variables, LINEN)["embed", None].dtype)
    said = _record_json(record or PruningRecord(), config, mode)
    with whole_folder(folder, overwrite) as unfinished:
        write_json(unfinished / "config.json", hf)
        write_json(unfinished / RECORD, said)
        if mode == "hetero":
            (unfinished / CODE_FILE).write_text(remote_code(config.family))
        for name in TOKENIZER_FILES if tokenizer_from is not None else ():
            if (Path(tokenizer_from) / name).is_file():  # pyright: ignore[reportArgumentType]
                shutil.copy(Path(tokenizer_from) / name, unfinished / name)  # pyright: ignore[reportArgumentType]
        tensors = _tensors(variables, config, stored)
        write_tensors(unfinished, tensors if config.experts is None else split_experts(tensors, stored), shard_bytes)


def load_tokenizer(folder: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder's tokenizer.json; needs the package tokenizers.

    Raises:
      ImportError: the package is not installed.
      ValueError: there is no tokenizer.json, or it is damaged.
    """
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{error}; text needs: python -m pip install tokenizers") from error
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: save one with transformers' AutoTokenizer.save_pretrained")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no other type
        raise ValueError(f"{file} is damaged or no tokenizer ({error}): download or copy it again") from error


def layers_in(names: Iterable[str]) -> int:
    """How many layers a decoder's tensors are of."""
    found = (_LAYER.match(name) for name in names)
    return len({match[1] for match in found if match})


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _names(config: LlamaConfig) -> dict[tuple[str, int | None], str]:
    """{(logical name, layer): tensor name} of everything a checkpoint of this model holds, in the order of the layers."""
    c = config
    mlp = ["gate", "up", "down"] if c.experts is None else ["router", "expert_gate", "expert_up", "expert_down"]
    layer = ["input_norm", "q", "k", "v", "o", "post_norm", *mlp]
    layer += ["q_bias", "k_bias", "v_bias"] * c.qkv_bias + ["o_bias"] * c.o_bias + ["q_norm", "k_norm"] * c.qk_norm
    layer += ["gate_bias", "up_bias", "down_bias"] * c.mlp_bias
    keys: list[tuple[str, int | None]] = [("embed", None)]
    keys += [(name, i) for i in range(c.depth) for name in layer]
    keys += [("final_norm", None), *([] if c.tied else [("lm_head", None)])]
    return {(name, i): HF.sites[name][0].path.replace("{l}", str(i)) for name, i in keys}


def _check_tensors(files: Any, config: LlamaConfig, names: Mapping[tuple[str, int | None], str]) -> None:
    for (name, layer), key in names.items():
        if key not in files:
            raise ValueError(f"{files.folder} has no tensor {key!r}, which its config.json asks for")
        site = HF.sites[name][0]
        wanted = shape_in(site, sizes(config, layer))
        if files.shape(key) != wanted:
            raise ValueError(f"tensor {key!r} has shape {files.shape(key)}; by its config.json it has {wanted}")
    known = set(names.values())
    for key in files:
        if key in known or key.endswith(".self_attn.rotary_emb.inv_freq"):  # a buffer of old exports
            continue
        if key == "lm_head.weight" and config.tied:
            if not np.array_equal(files[key], files[names["embed", None]]):
                raise ValueError("tie_word_embeddings is true, but lm_head.weight differs from the embedding: set it")
            continue
        raise ValueError(f"{files.folder} has the tensor {key!r}, which a {config.family} model has not: remove it")


def _recorded(folder: Path, stored: LlamaConfig, record: Mapping[str, Any] | None, keep_padding: bool) -> LlamaConfig:
    """The config without padding, and of the family that was saved."""
    if record is None:
        return stored
    with said_of(folder / RECORD):
        return _unpadded(stored, Fields(record), keep_padding)


def _unpadded(stored: LlamaConfig, record: Fields, keep_padding: bool) -> LlamaConfig:
    found = record.text("format", "")
    if found != FORMAT:
        raise ValueError(f"it has format {found!r}, this version reads {FORMAT!r}: update jprune")
    family = dataclasses.replace(stored, family=record.text("family", among=FAMILIES))
    mode = record.text("mode", among=MODES)
    widths, own = record.fields("widths"), {}
    for name in ("ffn", "q_heads", "kv_heads", "value_dim"):
        most = getattr(stored, name if name != "value_dim" else "value_dims")
        least = int(name in ("q_heads", "kv_heads"))
        own[name] = widths.integers(name, None if name == "value_dim" else REQUIRED, count=stored.depth, least=least)
        if any(w > m for w, m in zip(own[name] or (), most)):
            raise ValueError(f"widths.{name} is wider than the model of config.json: one of them is another model's")
        if mode != "padded" and own[name] not in (None, most):
            raise ValueError(f"widths.{name} differs from config.json, though mode is {mode!r}: copy the folder again")
    if mode != "padded" or keep_padding:
        # the weights have these widths already; only the family can differ
        return stored if family == stored else family
    return dataclasses.replace(family, **own)


def _placed(path: str, x: np.ndarray, dtype: Any, sharding: Placement | None) -> jax.Array:
    if sharding is None:  # a copy: jax may use an aligned array where it is, and this one may be the mapped file
        return jax.device_put(np.array(x, dtype, order="C"))
    place = sharding if isinstance(sharding, Sharding) else sharding(path, jax.ShapeDtypeStruct(x.shape, dtype))
    return jax.make_array_from_callback(x.shape, place, lambda index: np.array(x[index], dtype, order="C"))


def _check_mode(config: LlamaConfig, mode: str) -> None:
    if config.experts is not None and mode != "uniform":
        raise ValueError(f"decoders with experts are only written with mode='uniform', not {mode!r}")
    if config.experts is not None and config.family not in WITH_EXPERTS:
        raise ValueError(f"a {config.family} with experts fits no Hugging Face model: use jprune.checkpoint.save")
    if mode == "uniform" and not config.uniform:
        raise ValueError("the layers differ in width: choose mode='padded' (zeros, any program) or 'hetero'")
    if config.norm_width not in (None, config.stream):
        raise ValueError(
            f"the stream was pruned from {config.norm_width} to {config.stream}, and other programs divide their norms "
            "by the latter: call jprune.models.llama.fold_norm_width first"
        )
    if any(v > config.head_dim for v in config.value_dims):
        raise ValueError(f"value heads wider than head_dim {config.head_dim} fit no Hugging Face model")
    if mode != "padded" and set(config.value_dims) != {config.head_dim}:
        raise ValueError(f"value heads narrower than head_dim {config.head_dim} can only be saved with mode='padded'")


def _record_json(record: PruningRecord, config: LlamaConfig, mode: str) -> dict[str, Any]:
    widths = {name: getattr(config, name) for name in ("ffn", "q_heads", "kv_heads", "value_dim")}
    if record.kept is not None:
        if record.dense is None:
            raise ValueError("a record with kept indices needs the dense model's config too: dense=...")
        expected = record.kept.config(record.dense)
        if (expected.ffn, expected.q_heads, expected.kv_heads) != (config.ffn, config.q_heads, config.kv_heads):
            raise ValueError("the record's kept indices do not give the widths of this config")
    said = {
        "format": FORMAT,
        "jprune": __version__,
        "mode": mode,
        "family": config.family,
        "widths": widths,
        "method": record.method,
        "seed": record.seed,
        "calibration": record.calibration,
        "target": record.target,
        "source": record.source,
        "removed": None if record.dense is None else removed(record.dense, config),
        "kept": None if record.kept is None else record.kept.to_json(),
    }
    return json.loads(json.dumps(said))


def _tensors(variables: Any, config: LlamaConfig, stored: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    found = views(variables, LINEN)
    for (name, layer), key in _names(config).items():
        x = np.asarray(found[name, layer])
        yield key, x if layer is None or stored is config else pad_layer(name, x, config, stored, layer)
