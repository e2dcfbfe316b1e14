"""Vision transformers from the files people hold: timm, transformers (ViT, DeiT, CLIP), torchvision, AugReg .npz.

folder/config.json                 timm's ("architecture") or transformers' ("model_type")
folder/model*.safetensors          weights under their original names
folder/preprocessor_config.json    transformers: what to do to a picture

torchvision's state dict (saved as safetensors) and the .npz files of "How to train your ViT" have no config.json: give
the file, or a folder that holds nothing else. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jprune.checkpoint import vision_config as read
from jprune.checkpoint import vit_names
from jprune.checkpoint.hf_files import TensorFiles
from jprune.checkpoint.tensors import load_safetensors
from jprune.checkpoint.torch import PICKLES, from_torch, torch_names
from jprune.data.images import MEAN, STD, Preprocess
from jprune.files.json_files import Fields, read_json, said_of
from jprune.files.npz import read_npz
from jprune.models.shapes import shapes_of
from jprune.models.vit import ViT
from jprune.models.vit_config import ViTConfig
from jprune.tracing.paths import flatten

KINDS = ("vit", "deit", "clip_vision_model", "clip")
# Tensors of transformers' files that are no part of the function: the text model beside a vision tower, the buffer of
# positions, what masked pre-training and `pooler_output` need.
BESIDE = (
    "text_model.", "text_projection.", "logit_scale", "embeddings.position_ids", "embeddings.mask_token", "pooler.",
)  # fmt: skip


class Vision(NamedTuple):
    """A model that was read.

    Attributes:
      module, variables: `module.apply(variables, images)`.
      preprocess: pictures to images.
      labels: names of the classes, if the files have them.
    """

    module: ViT
    variables: Any
    preprocess: Preprocess
    labels: tuple[str, ...] | None


def load_vision(path: str | Path, *, heads: int | None = None, dtype: Any = None) -> Vision:
    """(module, variables, preprocess, labels) of a vision transformer's folder or file.

    A transformers model without classifier has `num_classes` 0: it answers with the last norm of the class token. CLIP
    answers with its image embedding, or with the pooled output where there is no projection.

    Args:
      path: folder, or a .safetensors or .npz file.
      heads: attention heads, where the files do not say.
      dtype: cast the weights; None: every tensor as it is stored.

    Raises:
      ValueError: no such model, a kind, option or name that is not known, a tensor too many or too few (named).
    """
    path = Path(path)
    with said_of(path):
        return _load(path, heads, dtype)


def _load(path: Path, heads: int | None, dtype: Any) -> Vision:
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if config is None:
        file = _only_file(path)
        arrays = read_npz(file) if file.suffix == ".npz" else _safetensors(file)
        found = _bare(file, arrays, heads)
    elif "architecture" in config:
        found = _timm(config, _floats(TensorFiles(path)), heads)
    else:
        found = _transformers(path, config, heads)
    side = found.module.config.image
    if side != (found.preprocess.size,) * 2:
        raise ValueError(
            f"{path} prepares images of {found.preprocess.size} pixels, and its model has positions for {side}: the "
            "files do not belong together"
        )
    classes = found.module.config.num_classes
    if found.labels is not None and len(found.labels) != classes:
        raise ValueError(f"{path} names {len(found.labels)} classes, and its model has {classes}: correct config.json")
    cast = found.variables if dtype is None else jax.tree.map(lambda x: x.astype(dtype), found.variables)
    return found._replace(variables=cast)


def clip_vision(config: Mapping[str, Any], tensors: Mapping[str, Any], heads: int | None = None) -> tuple[ViT, Any]:
    """(module, variables) of CLIP's vision tower.

    `module.apply(variables, images, method="features")` gives the tokens that a language model reads.

    Args:
      config: transformers' `vision_config`.
      tensors: by name, with or without "vision_model." in front; text model and projection of the text are left out.
      heads: instead of the config's.

    Raises:
      ValueError: tensors that are missing, left over or of other shapes; an activation that is not known.
    """
    tensors = {n.removeprefix("vision_model."): x for n, x in tensors.items() if not n.startswith("text_model.")}
    tensors = {n: x for n, x in tensors.items() if not n.startswith(BESIDE)}
    module = ViT(read.clip_config(config, _shapes(tensors), heads))
    return module, from_torch(module, tensors)


def _timm(config: Mapping[str, Any], tensors: Mapping[str, Any], heads: int | None) -> Vision:
    module = ViT(read.timm_config(config, _shapes(tensors), heads))
    f = Fields(config)
    labels = _labels(f, "label_names") or _labels(f.fields("pretrained_cfg", {}), "label_names")
    return Vision(module, from_torch(module, tensors), read.timm_preprocess(config), labels)


def _transformers(folder: Path, config: Mapping[str, Any], heads: int | None) -> Vision:
    f = Fields(config)
    kind = f.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f'{folder / "config.json"} has neither timm\'s "architecture" nor a model_type that is read here, but '
            f"{kind!r}: only {', '.join(KINDS)} are"
        )
    tensors = _floats(TensorFiles(folder), ("text_model.", *BESIDE))
    if kind.startswith("clip"):
        module, variables = clip_vision(f.fields("vision_config", config), tensors, heads)
    else:
        tensors = {n.removeprefix(f"{kind}."): x for n, x in tensors.items()}
        tensors = {n: x for n, x in tensors.items() if not n.startswith(BESIDE)}
        module = ViT(read.hf_config(config, _shapes(tensors), heads))
        variables = from_torch(module, tensors)
    processor = folder / "preprocessor_config.json"
    side = (module.config.image or (0, 0))[0]
    preprocess = read.hf_preprocess(kind, read_json(processor) if processor.is_file() else {}, side)
    labels = _labels(f, "id2label") if module.config.num_classes else None
    if kind.startswith("clip") or (labels and all(n == f"LABEL_{i}" for i, n in enumerate(labels))):
        labels = None  # transformers' placeholders, and CLIP has no classes
    return Vision(module, variables, preprocess, labels)


def _bare(file: Path, arrays: Mapping[str, np.ndarray], heads: int | None) -> Vision:
    shapes = _shapes(arrays)
    if file.suffix == ".npz":
        module = ViT(read.augreg_config(shapes))
        preprocess = read.augreg_preprocess(_side(module.config))
        return Vision(module, _from_flax(module, arrays), preprocess, None)
    if "conv_proj.weight" in arrays:
        module = ViT(read.torchvision_config(shapes, heads))
        side = _side(module.config)
        preprocess = read.torchvision_preprocess(side, "swag" in file.stem.lower() or side != 224)
        return Vision(module, from_torch(module, arrays), preprocess, None)
    name = file.stem.split("-")[0].split(".")[0]
    if "patch_embed.proj.weight" not in arrays or not name.startswith("deit_"):
        raise ValueError(
            f"{file} has no config.json beside it that says what it is: torchvision's vit_*, the official deit_*.safetensors "
            "and AugReg's .npz are read without one"
        )
    module = ViT(read.timm_config({"architecture": name}, shapes, heads))
    side = _side(module.config)
    preprocess = Preprocess(side, round(side * 256 / 224), MEAN, STD, "bicubic")  # the authors' evaluation
    return Vision(module, from_torch(module, arrays), preprocess, None)


def _from_flax(module: ViT, arrays: Mapping[str, np.ndarray]) -> Any:
    """Variables from arrays that already have Flax's shapes."""
    table = dict(vit_names.augreg(module.config))
    tokens = arrays[table["pos_embed"]].shape[-2]
    shapes = shapes_of(module, arrays["embedding/kernel"].shape[2], tokens)
    wanted = dict(flatten(shapes))
    names = torch_names(table, shapes, {leaf: leaf for leaf in ("kernel", "bias", "scale")})
    for name in [*arrays, *names]:
        if name not in names or name not in arrays:
            state = "is missing" if name in names else "has no place in a plain vision transformer"
            raise ValueError(f"array {name!r} {state}: the file is another model's, or not complete")
        if arrays[name].shape != wanted[names[name]].shape:
            raise ValueError(
                f"array {name!r} has shape {arrays[name].shape}, not {wanted[names[name]].shape} as the others' shapes say"
            )
    flat = {path: jnp.asarray(arrays[name]) for name, path in names.items()}
    return jax.tree.structure(shapes).unflatten([flat[path] for path in wanted])


def _only_file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code when it is loaded: save its tensors as safetensors")
    if path.is_file():
        return path
    found = sorted(p for p in path.glob("*") if p.suffix in (".safetensors", ".npz")) if path.is_dir() else []
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "no .safetensors or .npz file"
        raise ValueError(f"{path} has no config.json and holds {names}: give a model's folder, or one file")
    return found[0]


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    flat: dict[str, Any] = traverse_util.flatten_dict(load_safetensors(file, separator=".")[0], sep=".")
    return flat


def _floats(files: TensorFiles, leave: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    return {name: files[name] for name in files if not name.startswith(leave) and not name.endswith("position_ids")}


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def _labels(f: Fields, key: str) -> tuple[str, ...] | None:
    """Names of the classes in their order, from a list or from an object of numbers; None if there are none."""
    if not f.get(key):
        return None
    if isinstance(f[key], list):
        return f.texts(key)
    found = f.fields(key)
    if odd := set(found) ^ set(map(str, range(len(found)))):
        raise ValueError(
            f"{key} has {len(found)} names, whose numbers must be 0 to {len(found) - 1}: {min(odd)!r} is not"
        )
    return tuple(found.text(str(i)) for i in range(len(found)))


def _side(config: ViTConfig) -> int:
    return (config.image or (0,))[0]
