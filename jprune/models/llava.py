"""LLaVA-1.5 (Liu et al. 2024): a CLIP tower, a two-layer projector, and a LLaMA that reads the image as embedded tokens.

    vision/...        the tower (`jprune.models.vit`); its output two blocks from the end is read, without class token
    projector/linear_1, linear_2
    language/...      the decoder (`jprune.models.llama`)

A prompt holds one placeholder id per visual token; the projected tokens are written over their embeddings. What an answer
costs less when fewer of them are kept is the matter of `jprune.methods.tokens.llava_answer`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from jprune.models.llama import Llama
from jprune.models.llama_config import LlamaConfig
from jprune.models.token_hook import Aux
from jprune.models.vit import ViT
from jprune.models.vit_config import ViTConfig

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False)}
SELECT = ("default", "full")


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """What a LLaVA-1.5 is.

    Attributes:
      vision: the tower, with its image size.
      language: the decoder.
      image_token: the id that stands for a visual token in prompts.
      feature_layer: whose output is read: -1 the last block, -2 the one before.
      select: "default" leaves the class token out, "full" reads it too.
      hidden: width between the projector's layers; None: that of the decoder's stream.
      activation: between them.
      projector_bias: whether they have biases.
    """

    vision: ViTConfig
    language: LlamaConfig
    image_token: int = 32000
    feature_layer: int = -2
    select: str = "default"
    hidden: int | None = None
    activation: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        if self.vision.image is None:
            raise ValueError(
                "the vision tower's config has no image size, from which visual tokens are counted: give image="
            )
        if self.select not in SELECT:
            raise ValueError(f"select must be one of {', '.join(SELECT)}, not {self.select!r}")
        depth = len(self.vision.blocks)
        if not -depth - 1 <= self.feature_layer <= depth:
            raise ValueError(
                f"feature_layer is {self.feature_layer}: a tower of {depth} blocks has the layers 0 to {depth}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported: only {', '.join(ACTIVATIONS)} is")

    @property
    def visual_tokens(self) -> int:
        """How many an image has."""
        height, width = self.vision.image or (0, 0)
        patches = (height // self.vision.patch) * (width // self.vision.patch)
        return patches + (self.vision.prefix if self.select == "full" else 0)


class Projector(nn.Module):
    """Visual features to embeddings: linear, GELU, linear."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., features) -> (..., stream)."""
        c = self.config
        x = nn.Dense(c.hidden or c.language.stream, use_bias=c.projector_bias, name="linear_1")(x)
        return nn.Dense(c.language.stream, use_bias=c.projector_bias, name="linear_2")(ACTIVATIONS[c.activation](x))


class Llava(nn.Module):
    """Images and text to logits."""

    config: LlavaConfig

    def setup(self) -> None:
        self.vision = ViT(self.config.vision)
        self.projector = Projector(self.config)
        self.language = Llama(self.config.language)

    def __call__(self, ids: jax.Array, images: jax.Array, mask: Any = None, positions: Any = None) -> jax.Array:
        """Logits (batch, tokens, vocab) of whole prompts.

        Args:
          ids: (batch, tokens); `visual_tokens` placeholders for each image.
          images: (batch, images, height, width, 3), prepared for the tower.
          mask: (batch, tokens), 0 at padding; None: no padding.
          positions: (batch, tokens); None: real tokens are counted.
        """
        if self.is_initializing():
            self.vision(images[:, 0])  # the blocks behind the one that is read have parameters too
        x = self.embed(ids, self.project(self.features(images)))
        return self.language(None, mask, embeddings=x, positions=positions)

    def features(self, images: jax.Array) -> jax.Array:
        """What the tower says of images: (batch, images, visual tokens, features)."""
        flat = images.reshape(-1, *images.shape[2:])
        x = self.vision.features(flat, self.config.feature_layer, self.config.select).x
        return x.reshape(*images.shape[:2], *x.shape[1:])

    def features_and_aux(self, images: jax.Array, last: bool = False) -> tuple[jax.Array, Aux]:
        """`features` without class token, and what else selectors want to know, with axes (batch, images) in front.

        Args:
          images: as in a call.
          last: of the last block's queries and keys, and not of the attention in the block whose output is read.

        Raises:
          ValueError: a tower without a class token.
        """
        c, prefix = self.config, self.config.vision.prefix
        if "cls_token" not in c.vision.special:
            raise ValueError("this vision tower has no class token: choose a method that does not look at one")
        flat = images.reshape(-1, *images.shape[2:])
        x, seen = self.vision.features(flat, c.feature_layer, "full", watch=-1 if last else c.feature_layer)
        if seen is None or seen.weights is None:
            raise ValueError("the vision tower tells nothing of its attention")
        patches = x[:, prefix:]
        if last:
            query, keys = (a.reshape(*a.shape[:2], -1) for a in (seen.query, seen.key))
            aux = Aux(last_query=query[:, 0], last_key=keys[:, 0], last_keys=keys[:, prefix:])
        else:
            keys = jnp.swapaxes(seen.key[:, prefix:], 1, 2)
            aux = Aux(cls_attention=seen.weights[:, :, 0, prefix:], cls_feature=x[:, 0], keys=keys)
        apart = partial(_apart, shape=images.shape[:2])
        return apart(patches), jax.tree.map(apart, aux)

    def project(self, features: jax.Array) -> jax.Array:
        """Features as the decoder's embeddings."""
        return self.projector(features)

    def embed(self, ids: jax.Array, visual: jax.Array) -> jax.Array:
        """The prompt's embeddings (batch, tokens, stream), `visual` (batch, images, n, stream) over the first n of each image."""
        places = image_places(ids, self.config.image_token, visual.shape[1], self.config.visual_tokens)
        x = self.language.embeddings(ids)
        at = places[:, :, : visual.shape[2]].reshape(ids.shape[0], -1)
        rows = jnp.arange(ids.shape[0])[:, None]
        return x.at[rows, at].set(visual.reshape(*at.shape, -1).astype(x.dtype))


def image_places(
    ids: Int[Array, "batch tokens"], image_token: int, images: int, length: int
) -> Int32[Array, "batch images length"]:
    """Where the placeholders of each image stand; every row has `images` times `length` of them (see `check_prompt`)."""
    found = jnp.argsort(ids != image_token, axis=1, stable=True)[:, : images * length]
    return found.reshape(-1, images, length).astype(jnp.int32)


def check_prompt(config: LlavaConfig, ids: Any, images: Any, mask: Any = None) -> None:
    """On the host: that the prompts fit the images, and the images the tower.

    Raises:
      ValueError: images of another size; a row with another number of placeholders than its images have visual tokens, with
        placeholders that are not in a row, are padding or end the prompt; padding that is not on the left.
    """
    shape, m = tuple(images.shape), config.visual_tokens
    if len(shape) != 5 or shape[2:4] != config.vision.image or shape[0] != ids.shape[0]:
        raise ValueError(
            f"images are {shape}: give (batch {ids.shape[0]}, images of a row, height, width, 3) with height and width "
            f"{config.vision.image}, as the processor prepares them"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"the mask is {mask.shape}, the prompt {ids.shape}")
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if not (np.diff(real.astype(int), axis=1) >= 0).all() or not real[:, -1].all():
        raise ValueError("a prompt has padding behind text: pad prompts on the left")
    for row, (here, alive) in enumerate(zip(np.asarray(ids) == config.image_token, real, strict=True)):
        places = np.flatnonzero(here)
        if len(places) != shape[1] * m:
            raise ValueError(
                f"prompt {row} has {len(places)} placeholders {config.image_token}; {shape[1]} images of {m} visual tokens need "
                f"{shape[1] * m}"
            )
        runs = places.reshape(-1, m)
        if (np.diff(runs, axis=1) != 1).any() or not alive[places].all() or here[-1]:
            raise ValueError(
                f"the placeholders of prompt {row} are not runs of {m} with text behind them: write one run for each image"
            )


def _apart(x: Any, shape: tuple[int, ...]) -> Any:
    return x.reshape(*shape, *x.shape[1:])
