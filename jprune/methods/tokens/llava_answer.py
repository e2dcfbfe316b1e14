"""Questions about images answered by a LLaVA whose decoder sees only some of the visual tokens.

    features of the tower  ->  [visionzip, prumerge: fewer features]  ->  projector  ->  prompt
    ->  [divprune and other choices: fewer tokens]  ->  layers 0 ... K - 1  ->  [fastv, vtw, divprune behind layer K]  ->  ...

Before the decoder a choice makes the whole prompt shorter: every layer's cache is. Behind layer K the caches of the first K
layers stay long. Reading and greedy decoding are one compilation per shape and pruning.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jprune.methods.tokens import visual_selectors as selectors
from jprune.methods.tokens.decoder_drops import divprune_inside, fastv, vtw
from jprune.methods.tokens.prompt import ORDERS, POSITIONS, SCOPES, PrunedPrompt, keep_visual_tokens
from jprune.models.decoding import continue_from, new_caches
from jprune.models.llama import Llama
from jprune.models.llava import Llava, check_prompt, image_places
from jprune.models.token_drops import Drop
from jprune.models.token_hook import Aux

BEFORE = {
    "divprune": selectors.divprune,
    "random": selectors.random,
    "uniform_grid": selectors.uniform_grid,
    "norm_topk": selectors.norm_topk,
    "cls_attention": selectors.cls_attention,
}
MERGE = {
    "visionzip": selectors.visionzip,
    "prumerge": selectors.prumerge,
    "prumerge_plus": selectors.prumerge_plus,
}
INSIDE = ("fastv", "vtw", "divprune")
METHODS = (*BEFORE, *MERGE, "fastv", "vtw")
ABOUT = {
    "divprune": "those that differ most (DivPrune)",
    "random": "drawn",
    "uniform_grid": "evenly spaced",
    "norm_topk": "largest norm",
    "cls_attention": "most attended by the tower's class token",
    "visionzip": "those, and the rest merged into a few (VisionZip)",
    "prumerge": "those, with what is similar added to each (PruMerge)",
    "prumerge_plus": "the same around evenly spaced ones too (PruMerge+)",
    "fastv": "most attended by the last token, behind --layer layers of the decoder (FastV)",
    "vtw": "none, behind --layer layers of the decoder (VTW)",
}


@dataclasses.dataclass(frozen=True)
class VisualPruning:
    """Which visual tokens the decoder sees.

    Attributes:
      k: how many stay; 0 only for "vtw". PruMerge adds one to them.
      method: one of METHODS.
      layer: behind how many layers of the decoder; 0: before it. FastV's own is 2.
      order: "raster", or "selection" as the tables of DivPrune were made.
      positions: "packed" numbers what is left anew; "original" keeps positions, as methods behind a layer always do.
      scope: k of every "image", or of all images of a "sample" together.
    """

    k: int
    method: str = "divprune"
    layer: int = 0
    order: str = "raster"
    positions: str = "packed"
    scope: str = "image"

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("order", ORDERS), ("positions", POSITIONS), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.layer < 0 or (self.layer and self.method not in INSIDE):
            raise ValueError(f"layer is {self.layer}: {self.method} drops tokens before the decoder, at layer 0")
        if not self.layer and self.method not in (*BEFORE, *MERGE):
            raise ValueError(f"{self.method} drops tokens behind a layer of the decoder: give layer, at least 1")
        if (self.k == 0) != (self.method == "vtw") or self.k < 0:
            raise ValueError(f"k is {self.k}: vtw keeps 0 visual tokens, every other method at least 1")
        if self.method in MERGE and (self.order, self.positions, self.scope) != ("raster", "packed", "image"):
            raise ValueError(
                f"{self.method} makes new tokens of each image, which have no old order or positions: leave order, positions "
                "and scope as they are"
            )


class Reading(NamedTuple):
    """What the decoder knows after the prompt.

    Attributes:
      logits: of the prompt's last token.
      caches: of successive layers.
      position: of the next token.
      prompt: what the decoder read. For methods behind a layer that is everything, and `prompt.chosen` tells which visual
        tokens, of all images of a row together, go on behind it, in ascending order.
    """

    logits: Float[Array, "batch vocab"]
    caches: Any
    position: Int32[Array, " batch"]
    prompt: PrunedPrompt


def read_prompt(
    module: Llava,
    variables: Any,
    ids: Int[Array, "batch tokens"],
    images: Float[Array, "batch images height width 3"],
    mask: Any = None,
    *,
    pruning: VisualPruning | None = None,
    room: int = 1,
    key: Any = None,
) -> Reading:
    """Read a prompt, for use under jit: caches with room for `room` more tokens.

    Args:
      module, variables: a model.
      ids: with `config.visual_tokens` placeholders for each image; rows padded on the left.
      images: prepared for the tower.
      mask: (batch, tokens), 0 at padding.
      pruning: None: all visual tokens stay.
      room: in the caches.
      key: for method "random".

    Raises:
      ValueError: a k that there is not, a tower without what the method needs.
    """
    c, m, tokens = module.config, module.config.visual_tokens, ids.shape[1]
    count = images.shape[1]
    start = image_places(ids, c.image_token, count, m)[:, :, 0]
    if pruning is None:
        pruning, drops = VisualPruning(m, "uniform_grid"), []  # keeps every one
    else:
        drops = _drops(pruning, start, m, tokens)
    prompt = _prompt(module, variables, ids, images, mask, start, pruning, key)
    kept = prompt.embeddings.shape[1]
    language = Llama(c.language)
    ends = [(drop.layer, size + room) for drop, size in zip(drops, [kept, *(d.kept for d in drops)])]
    sizes = [*ends, (c.language.depth, (drops[-1].kept if drops else kept) + room)]
    caches = new_caches(language, ids.shape[0], sizes, prompt.embeddings.dtype)
    (logits, caches), told = language.apply(
        _of(variables, "language"), None, prompt.mask, caches, embeddings=prompt.embeddings,
        positions=prompt.positions, drops=drops, mutable=["drops"],
    )  # fmt: skip
    for drop in drops:
        went: Any = told["drops"][f"behind{drop.layer}"]
        prompt = prompt._replace(chosen=_visual(went, start, m, went.shape[1] - (tokens - count * m)))
    return Reading(logits[:, -1], caches, prompt.positions[:, -1] + 1, prompt)


def answer(
    module: Llava,
    variables: Any,
    ids: Any,
    images: Any,
    steps: int,
    mask: Any = None,
    *,
    pruning: VisualPruning | None = None,
    stop: int | None = None,
    key: Any = None,
) -> Int32[Array, "batch steps"]:
    """The likeliest continuation of every prompt, token by token; jit-ed within.

    Args:
      module, variables, ids, images, mask, pruning, key: as for `read_prompt`, and checked against each other.
      steps: tokens to make.
      stop: a token after which a row repeats that token only.

    Raises:
      ValueError: prompts and images that do not fit each other, no steps, a pruning that the model cannot do.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: ask for at least one token")
    if pruning is not None and pruning.method == "random" and key is None:
        raise ValueError("method 'random' needs a key: give key=jax.random.key(0), for instance")
    check_prompt(module.config, ids, images, mask)
    real = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    return _answer(module, steps, pruning, stop, variables, jnp.asarray(ids), jnp.asarray(images), real, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _answer(
    module: Llava, steps: int, pruning: Any, stop: Any, variables: Any, ids: Any, images: Any, mask: Any, key: Any
) -> Any:
    read = read_prompt(module, variables, ids, images, mask, pruning=pruning, room=steps - 1, key=key)
    language = Llama(module.config.language)
    return continue_from(language, _of(variables, "language"), read.logits, read.caches, read.position, steps, stop)


def _prompt(
    module: Llava, variables: Any, ids: Any, images: Any, mask: Any, start: Any, pruning: VisualPruning, key: Any
) -> PrunedPrompt:
    """The prompt as it enters the decoder."""

    def run(*args: Any, method: str) -> Any:
        return module.apply(variables, *args, method=method)

    m, batch, count = module.config.visual_tokens, *images.shape[:2]
    if pruning.method in MERGE:
        features, aux = run(images, pruning.method != "visionzip", method="features_and_aux")
        reduce = functools.partial(MERGE[pruning.method], k=pruning.k)
        merged, patches = jax.vmap(jax.vmap(reduce))(features, aux)
        n = merged.shape[2]
        if n > m:
            raise ValueError(f"{pruning.method} with k = {pruning.k} makes {n} tokens of an image's {m}: ask for fewer")
        x = run(ids, run(merged, method="project"), method="embed")
        first = jnp.broadcast_to(jnp.arange(n), (batch, count, n))
        prompt = keep_visual_tokens(x, start, m, first, mask)
        # a visual token's number is its patch's, behind the class token where that is one of them
        built = jnp.where(patches < 0, m, patches + m - features.shape[2])
        return prompt._replace(chosen=built.astype(jnp.int32), source=_built(prompt.source, start, m, built))
    if pruning.method == "cls_attention":
        if module.config.select == "full":
            raise ValueError("cls_attention ranks patches, but this model reads the class token too")
        features, aux = run(images, method="features_and_aux")
    else:
        features, aux = run(images, method="features"), Aux()
    visual = run(features, method="project")
    x = run(ids, visual, method="embed")
    if pruning.layer:
        chosen = jnp.broadcast_to(jnp.arange(m), (batch, count, m))
        return keep_visual_tokens(x, start, m, chosen, mask)
    groups = count if pruning.scope == "image" else 1
    if not 1 <= pruning.k <= count // groups * m:
        raise ValueError(
            f"k is {pruning.k}: of {count // groups * m} visual tokens 1 to {count // groups * m} can be kept"
        )
    given = _grouped(aux, batch, groups, key)
    select = functools.partial(BEFORE[pruning.method], k=pruning.k)
    chosen = jax.vmap(jax.vmap(select))(visual.reshape(batch, groups, -1, visual.shape[-1]), given)
    return keep_visual_tokens(x, start, m, chosen, mask, order=pruning.order, positions=pruning.positions)


def _visual(places: Any, start: Any, m: int, k: int) -> Any:
    """Numbers (batch, 1, k) among the visual tokens of all images of those places of the prompt that are visual tokens."""
    offset = places[:, None] - start[..., None]
    number = jnp.arange(start.shape[1])[:, None] * m + offset
    visual = (offset >= 0) & (offset < m)
    found = jnp.where(visual, number, start.shape[1] * m).min(axis=1)
    return jnp.sort(found, axis=1)[:, None, :k].astype(jnp.int32)


def _built(source: Any, start: Any, m: int, built: Any) -> Any:
    """Places of the prompt (batch, kept) where those of merged tokens are the places of their patches, or -1."""
    for i in range(start.shape[1]):
        own, at = built[:, i], source - start[:, i, None]
        place = jnp.where(own < m, own + start[:, i, None], -1)
        new = jnp.take_along_axis(place, jnp.clip(at, 0, own.shape[1] - 1), axis=1)
        source = jnp.where((at >= 0) & (at < m), new, source)
    return source.astype(jnp.int32)


def _grouped(aux: Aux, batch: int, groups: int, key: Any) -> Aux:
    """What selectors before the decoder look at, (batch, groups) in front."""
    seen = aux.cls_attention
    if seen is not None and groups != seen.shape[1]:  # the patches of all images side by side
        seen = jnp.moveaxis(seen, 1, 2).reshape(batch, 1, seen.shape[2], -1)
    keys = None if key is None else jax.random.split(key, (batch, groups))
    return Aux(cls_attention=seen, key=keys)


def _drops(pruning: VisualPruning, start: Any, m: int, tokens: int) -> list[Drop]:
    if not pruning.layer:
        return []
    if pruning.method == "vtw":
        return [vtw(start, m, tokens, pruning.layer)]
    make = fastv if pruning.method == "fastv" else divprune_inside
    return [make(start, m, pruning.k, tokens, pruning.layer)]


def _of(variables: Any, part: str) -> Any:
    return {"params": variables["params"][part]}
