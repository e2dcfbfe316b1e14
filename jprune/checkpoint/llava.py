"""LLaVA-1.5 from the folders people hold: `llava-hf/*` in three spellings, and `liuhaotian/llava-v1.5-*` with CLIP beside it.

    folder/config.json, model*.safetensors     config and weights
    folder/tokenizer.json                      for text (package `tokenizers`)
    folder/preprocessor_config.json            what to do to a picture (or processor_config.json)

The original authors' folders have no vision tower (give CLIP's folder as `vision`) and pad pictures to a square with the mean
colour first; those of `llava-hf` cut out the centre. Each kind has its prompt. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32
from PIL import Image

from jprune.checkpoint.hf_config import config_from_hf
from jprune.checkpoint.hf_files import RenamedTensors, TensorFiles
from jprune.checkpoint.huggingface import layers_in, load_tokenizer, read_decoder
from jprune.checkpoint.vision import clip_vision
from jprune.checkpoint.vision_config import hf_preprocess
from jprune.data.images import Preprocess
from jprune.files.json_files import MOST, Fields, read_json, said_of
from jprune.models.llava import SELECT, Llava, LlavaConfig

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions."
)
PROMPTS = {
    "hf": f"USER: {IMAGE}\n{{question}} ASSISTANT:",
    "original": f"{SYSTEM} USER: {IMAGE}\n{{question}} ASSISTANT:",
}
# What names begin with, and where that belongs; the first that fits. One name of each part per container.
PARTS = (
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.", "vision", ""),
    ("vision_tower.vision_model.", "vision", ""),
    ("vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", ""),
    ("multi_modal_projector.", "projector", ""),
    ("model.mm_projector.0.", "projector", "linear_1."),
    ("model.mm_projector.2.", "projector", "linear_2."),
    ("language_model.lm_head.", "language", "lm_head."),
    ("language_model.model.", "language", "model."),
    ("model.language_model.", "language", "model."),
    ("lm_head.", "language", "lm_head."),
    ("model.", "language", "model."),
)
# transformers' defaults of a LLaMA, which config.json of the 7B model leaves out
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class LlavaProcessor:
    """Pictures and questions as a model reads them.

    Attributes:
      config: of the model.
      preprocess: of a picture.
      pad: to a square with the mean colour, before.
      template: of a prompt, with {question} and one <image> where the pictures go.
      tokenizer: None: there is no tokenizer.json, or the package tokenizers is not installed.
    """

    config: LlavaConfig
    preprocess: Preprocess
    pad: bool
    template: str
    tokenizer: Any = None

    def images(self, rows: Sequence[Sequence[Image.Image]]) -> Float32[np.ndarray, "batch images height width 3"]:
        """The pictures of every row, equally many.

        Raises:
          ValueError: rows of different numbers of pictures, or none.
        """
        counts = {len(row) for row in rows}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"rows have {sorted(counts)} pictures: give each equally many, and at least one")
        colour: Any = tuple(int(255 * m) for m in self.preprocess.mean)
        flat = [pad_to_square(p, colour) if self.pad else p for row in rows for p in row]
        pixels = self.preprocess(flat)
        return pixels.reshape(len(rows), -1, *pixels.shape[1:])

    def prompts(
        self, questions: Sequence[str], images: int = 1
    ) -> tuple[Int32[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
        """(ids, mask) of questions put into the template, padded on the left.

        Args:
          questions: one a row.
          images: pictures of a row.

        Raises:
          ValueError: no tokenizer, a question that itself says <image>, a tokenizer of another model.
        """
        if self.tokenizer is None:
            raise ValueError(
                "there is no tokenizer: save tokenizer.json in the folder, or give ids to the model yourself"
            )
        rows = []
        for question in questions:
            if IMAGE in question:
                raise ValueError(f"the question holds {IMAGE}, which the template writes: leave it out")
            text = self.template.replace(IMAGE, "\n".join([IMAGE] * images)).format(question=question)
            rows.append(self.encode(text))
        tokens = max(map(len, rows))
        ids = np.stack([np.pad(row, (tokens - len(row), 0)) for row in rows]).astype(np.int32)
        return ids, np.stack([np.arange(tokens) >= tokens - len(row) for row in rows])

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, every <image> in it as many placeholders as an image has tokens."""
        c = self.config
        ids: list[int] = []
        if self.tokenizer.token_to_id(IMAGE) == c.image_token:
            ids = self.tokenizer.encode(text.replace(IMAGE, IMAGE * c.visual_tokens)).ids
        else:  # the tokenizer knows no placeholder: what stands between them is encoded piece by piece
            for i, part in enumerate(text.split(IMAGE)):
                ids += [c.image_token] * (c.visual_tokens if i else 0)
                ids += self.tokenizer.encode(part, add_special_tokens=not i).ids if part else []
        found = np.asarray(ids, np.int32)
        wrong = found[(found != c.image_token) & ((found < 0) | (found >= c.language.vocab))]
        if wrong.size:
            raise ValueError(
                f"the text has the token id {wrong[0]}, the model only 0 to {c.language.vocab - 1}: its tokenizer belongs "
                "to another model"
            )
        return found


class LlavaFolder(NamedTuple):
    """A model that was read.

    Attributes:
      module, variables: for `jprune.methods.tokens.llava_answer.answer`.
      processor: pictures and questions to what it reads.
    """

    module: Llava
    variables: Any
    processor: LlavaProcessor


def load_llava(folder: str | Path, *, vision: str | Path | None = None, dtype: Any = None) -> LlavaFolder:
    """(module, variables, processor) of a LLaVA-1.5 folder of any of the four layouts.

    Args:
      folder: config.json beside safetensors.
      vision: CLIP's folder, for weights without a vision tower.
      dtype: cast the weights; None: every tensor as it is stored.

    Raises:
      ValueError: a model of another kind, a projector or option that is not supported, a missing vision tower, tensors that
        are missing, left over or of other shapes (named).
    """
    folder = Path(folder)
    with said_of(folder):
        return _load(folder, vision, dtype)


def _load(folder: Path, vision: str | Path | None, dtype: Any) -> LlavaFolder:
    hf = Fields(read_json(folder / "config.json", "give the folder of a LLaVA, or download it again"))
    files = TensorFiles(folder)
    own = "text_config" not in hf  # the original authors' config.json is that of the decoder, with mm_* added
    kind = hf.get("model_type", hf.get("architecture"))
    if kind not in ("llava", "llava_llama"):
        raise ValueError(f"{folder} holds a {kind!r}: only LLaVA-1.5 is read (model_type llava or llava_llama)")
    parts = _parts(files)
    if not parts["projector"]:
        raise ValueError(f"{folder} has no projector between images and text: it is no LLaVA-1.5, or not all of one")
    layer, select = _features(hf, own)
    text = {**LLAMA, **({**hf, "model_type": "llama"} if own else hf.fields("text_config"))}
    text.setdefault("tie_word_embeddings", "lm_head.weight" not in parts["language"])
    stored = config_from_hf(Fields(text, "" if own else "text_config"), layers=layers_in(parts["language"]))
    language, decoder = read_decoder(RenamedTensors(files, parts["language"]), stored, dtype=dtype)
    tower, tower_config, beside = _tower(hf, files, parts["vision"], vision)
    module, seen = clip_vision(tower_config, tower)
    ends = module.config.stream, language.stream
    projector, width, bias = _projector(RenamedTensors(files, parts["projector"]), *ends)
    config = LlavaConfig(
        module.config,
        language,
        _image_token(hf, language.vocab),
        layer,
        select,
        None if width == language.stream else width,
        projector_bias=bias,
    )

    def cast(x: Any) -> Any:
        return jnp.asarray(x) if dtype is None else jnp.asarray(x).astype(dtype)

    params = {
        "vision": jax.tree.map(cast, seen["params"]),
        "projector": jax.tree.map(cast, projector),
        "language": decoder["params"],
    }
    return LlavaFolder(Llava(config), {"params": params}, _processor(folder, config, beside, own))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of one colour."""
    image, side = image.convert("RGB"), max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _parts(files: TensorFiles) -> dict[str, dict[str, str]]:
    """{part: {name in it: name in the files}}."""
    out: dict[str, dict[str, str]] = {"vision": {}, "projector": {}, "language": {}}
    for name in files:
        if name.endswith("image_newline"):
            raise ValueError(
                f"{files.folder} has {name!r}: it is a LLaVA-1.6, which reads an image in tiles; only 1.5 is read"
            )
        fit = next(((old, part, new) for old, part, new in PARTS if name.startswith(old)), None)
        if fit is None:
            raise ValueError(
                f"{files.folder} has the tensor {name!r}, which belongs to no part of a LLaVA-1.5: remove it"
            )
        old, part, new = fit
        out[part][new + name.removeprefix(old)] = name
    return out


def _features(hf: Fields, own: bool) -> tuple[int, str]:
    """(layer of the tower, which of its tokens) that the projector reads; raises for projectors that are not read."""
    if own:
        kind = hf.text("mm_projector_type", "mlp2x_gelu")
        if kind != "mlp2x_gelu":
            raise ValueError(f"mm_projector_type {kind!r} is not supported: only 'mlp2x_gelu' is (LLaVA-1.5)")
        chosen = {"patch": "default", "cls_patch": "full"}
        select = chosen[hf.text("mm_vision_select_feature", "patch", among=tuple(chosen))]
    else:
        act = hf.text("projector_hidden_act", "gelu")
        if act != "gelu":
            raise ValueError(f"projector_hidden_act {act!r} is not supported: only 'gelu' is")
        select = hf.text("vision_feature_select_strategy", "default", among=SELECT)
    key = "mm_vision_select_layer" if own else "vision_feature_layer"
    if isinstance(hf.get(key), list):
        raise ValueError(f"{key} is {hf[key]!r}: the features of one layer are read, give its number")
    return hf.integer(key, -2, least=-MOST), select


def _tower(
    hf: Fields, files: TensorFiles, names: Mapping[str, str], folder: str | Path | None
) -> tuple[dict[str, np.ndarray], Mapping[str, Any], Path]:
    """(tensors, config, folder of the picture's preprocessing) of the vision tower."""
    if folder is not None:
        folder = Path(folder)
        config, stored = Fields(read_json(folder / "config.json")), TensorFiles(folder)
        tensors = {name: stored[name] for name in stored if not name.endswith("position_ids")}
        return tensors, config.fields("vision_config", config), folder
    if not names:
        raise ValueError(
            f"{files.folder} has no vision tower: download {hf.get('mm_vision_tower', 'openai/clip-vit-large-patch14-336')} "
            "and give its folder as vision"
        )
    if "vision_config" not in hf:
        raise ValueError(
            f"{files.folder} has a vision tower, and its config.json no vision_config: give CLIP's folder as vision"
        )
    tensors = {new: files[old] for new, old in names.items() if not new.endswith("position_ids")}
    return tensors, hf.fields("vision_config"), files.folder


def _projector(files: RenamedTensors, inputs: int, outputs: int) -> tuple[dict[str, Any], int, bool]:
    """(parameters, width between the layers, whether there are biases)."""
    out: dict[str, dict[str, np.ndarray]] = {}
    bias = "linear_1.bias" in files
    if "linear_1.weight" in files and len(files.shape("linear_1.weight")) == 2:
        hidden = files.shape("linear_1.weight")[0]
    else:
        hidden = outputs
    for layer, columns, rows in (("linear_1", inputs, hidden), ("linear_2", hidden, outputs)):
        for kind, shape in (("weight", (rows, columns)), *([("bias", (rows,))] if bias else [])):
            name = f"{layer}.{kind}"
            if name not in files:
                raise ValueError(f"{files.folder} lacks {name} of the projector: the download is not complete")
            if files.shape(name) != shape:
                raise ValueError(
                    f"{name} of the projector has shape {files.shape(name)}; between these models it has {shape}"
                )
        out[layer] = {"kernel": np.ascontiguousarray(files[f"{layer}.weight"].T)}
        if bias:
            out[layer]["bias"] = np.array(files[f"{layer}.bias"])
    if left := set(files) - {f"{n}.{kind}" for n in out for kind in (("weight", "bias") if bias else ("weight",))}:
        raise ValueError(
            f"{files.folder} has the tensor {min(left)!r}, which the projector of a LLaVA-1.5 has not: remove it"
        )
    return out, hidden, bias


def _image_token(hf: Fields, vocab: int) -> int:
    """The placeholder; the original code has none in its vocabulary (-200), then the first id behind it."""
    for name in ("image_token_id", "image_token_index"):
        found = hf.integer(name, None, least=-MOST)
        if found is not None and found >= 0:
            return found
    return vocab


def _processor(folder: Path, config: LlavaConfig, pictures: Path, own: bool) -> LlavaProcessor:
    said = Fields({})
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (pictures / name).is_file():
            said = Fields(read_json(pictures / name))
            said = said.fields("image_processor", said) if name == "processor_config.json" else said
            break
    preprocess = hf_preprocess("clip", said, (config.vision.image or (0,))[0])
    pad = said.flag("do_pad", False) or own
    try:
        tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    except ImportError:
        tokenizer = None
    return LlavaProcessor(config, preprocess, pad, PROMPTS["original" if own else "hf"], tokenizer)
