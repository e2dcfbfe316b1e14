"""What a model's name on the command line stands for: a classifier of the zoo, or a folder with a trained model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jprune.checkpoint.hf_config import OWN
from jprune.checkpoint.huggingface import read_config
from jprune.checkpoint.vision import load_vision
from jprune.files.json_files import read_json
from jprune.models import MODELS, build
from jprune.models.llama import Llama
from jprune.models.llama_config import FAMILIES

FOLDER = "a Hugging Face folder (config.json beside .safetensors files)"


def is_language_model(model: str) -> bool:
    """True for a folder with config.json, False for a name of the zoo.

    Raises:
      ValueError: it is neither; what it is, and what would do.
    """
    place = Path(model)
    if (place / "config.json").is_file():
        return True
    if model in MODELS:
        return False
    raise ValueError(_neither(model, place))


def is_decoder_folder(model: str) -> bool:
    """True for the folder of a language model that can be pruned, by what its config.json says."""
    file = Path(model) / "config.json"
    return file.is_file() and str(read_json(file).get("model_type")).removeprefix(OWN) in FAMILIES


def _neither(model: str, place: Path) -> str:
    if place.is_dir():
        held = sorted(p.name for p in place.iterdir())
        if any(name.endswith(".gguf") for name in held):
            return f"{model} has no config.json: {_gguf(place / next(n for n in held if n.endswith('.gguf')))}"
        inside = f"it holds {', '.join(held[:5])}{' and more' if len(held) > 5 else ''}" if held else "it is empty"
        return f"{model} has no config.json ({inside}): give {FOLDER}"
    if place.is_file():
        if place.suffix == ".gguf":
            return f"{model} is one file: {_gguf(place)}"
        return f"{model} is one file: give the folder that holds config.json beside it"
    near = difflib.get_close_matches(model, MODELS, n=3)
    if near:
        return f"no model {model!r}: did you mean {', '.join(near)}?"
    above = place.parent
    beside = [p.name for p in above.iterdir() if (p / "config.json").is_file()] if above.is_dir() else []
    if close := difflib.get_close_matches(place.name, beside, n=3):
        return f"there is no folder {model}: did you mean {', '.join(str(above / name) for name in close)}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return (
            f"there is no folder {model} here, and nothing is downloaded: for that model of the Hugging Face hub run "
            f"`hf download {model} --local-dir {place.name}`, then give --model ./{place.name}"
        )
    return f"no model {model!r}: give a classifier of the zoo (see `jprune list`) or {FOLDER}"


def _gguf(file: Path) -> str:
    return (
        f"GGUF files are not read. With transformers, AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, "
        f"gguf_file={file.name!r}).dequantize() and save_pretrained (the tokenizer too) make {FOLDER} of it"
    )


def to_explain(
    model: str, num_classes: int | None, image: tuple[int, int, int] | None, length: int | None
) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
    """(function, shapes of its parameters, shape of its input) of a zoo model, a decoder's or a vision model's folder.

    Args:
      model: name or folder.
      num_classes, image: of a zoo model; its own if None.
      length: tokens of a decoder's window; 1024 if None.

    Raises:
      ValueError: there is no such model, or a flag means nothing to it.
    """
    for name, value in (
        ("num-classes", num_classes),
        ("length", length),
        ("image", None if image is None else min(image)),
    ):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: it must be at least 1")
    zoo = not is_language_model(model)
    decoder = not zoo and is_decoder_folder(model)
    for name, value, means in (("num-classes", num_classes, zoo), ("image", image, zoo), ("length", length, decoder)):
        if value is not None and not means:
            kind = "a model of the zoo" if zoo else "a language model" if decoder else "a vision model in a folder"
            raise ValueError(f"--{name} means nothing here: {model} is {kind}: leave it out")
    if zoo:
        module: Any = build(model, num_classes)
        x = jax.ShapeDtypeStruct((2, *(image or MODELS[model].image)), jnp.float32)
    elif decoder:
        module = Llama(read_config(model))
        x = jax.ShapeDtypeStruct((2, length or 1024), jnp.int32)
    else:
        vision = load_vision(model)
        side = vision.preprocess.size
        return vision.module.apply, vision.variables, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x
