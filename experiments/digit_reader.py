"""The small vision transformer reading digits with few tokens: answers under a reducer, and where scores see the digit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from experiments.digit_canvas import Canvases, Recipe, calibration_set, model, sizes, test_set, trained
from experiments.study import Run
from jprune.methods.tokens.before_first_block import two_pass
from jprune.methods.tokens.pagerank import aggregate_heads, initial_signal, wpr_scores
from jprune.methods.tokens.search import search_schedule
from jprune.methods.tokens.selection import best_places
from jprune.methods.tokens.zero_tprune import PAPER_VARIANCES
from jprune.models.token_hook import Seen, TokenReducer, Tokens, take

REDUCERS = (
    "zero_tprune",
    "zero_tprune_uni",
    "tome",
    "ats",
    "evit",
    "cls_topk",
    "column_mean",
    "random",
)  # of the curves


@dataclasses.dataclass(frozen=True)
class Setting:
    """Model, numbers of tokens and budgets.

    Attributes:
      recipe: of the model.
      kept: tokens before the first block. schedules: tokens after the first blocks.
      fractions: of the blocks' MACs. searched: those at which a schedule is searched, with so many trials on few images.
      images: so many canvases; None: all.
      methods: of the curves.
    """

    recipe: Recipe = Recipe()
    kept: tuple[int, ...] = (32, 20, 12, 8)
    schedules: tuple[tuple[int, ...], ...] = ((44, 32, 24, 16), (24, 12, 8, 6))
    fractions: tuple[float, ...] = (0.9, 0.75, 0.6, 0.45, 0.3)
    searched: tuple[float, ...] = (0.3,)
    trials: int = 60
    few: int = 256
    images: int | None = None
    methods: tuple[str, ...] = REDUCERS


BATCH = 250
SCORES = ("PageRank, 1 vote", "PageRank, 5 votes", "PageRank, 30 votes", "5 votes, boosted", "5 votes, heads filtered",
          "class token's attention", "column mean")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WrongWay(TokenReducer):
    """Keeps the patches that average most over what they look at, A s: PageRank with the transpose forgotten. A control."""

    keep: int
    iters: int = 5

    def reads_weights(self, layer: int) -> bool:
        return layer == 0

    def after(self, layer: int, tokens: Tokens, seen: Seen) -> Tokens:
        if layer:
            return tokens
        assert seen.weights is not None
        n = tokens.x.shape[1]
        s = jnp.broadcast_to(1 + 0.01 * jnp.arange(n) / n, seen.weights.shape[:3])  # a uniform start would stay so
        for _ in range(self.iters):
            s = jnp.einsum("bhij,bhj->bhi", seen.weights, s)
        return take(tokens, best_places(aggregate_heads(s), self.keep, seen.prefix))


@functools.cache
def program(reducer: TokenReducer, twice: bool = False) -> Callable[..., Any]:
    """(variables, images, key) -> answers; one compilation for the models of all seeds."""
    module = model()

    def run(variables: Any, x: Any, key: Any) -> Any:
        def apply(x: Any, **options: Any) -> Any:
            return module.apply(variables, x, key=key, **options)

        return two_pass(apply, x, reducer) if twice else apply(x, reducer=reducer)

    return jax.jit(run)


@functools.cache
def scores(block: int) -> Callable[..., Any]:
    """(variables, images) -> scores of all patches in a block of the unreduced model: (names, batch, patches)."""
    module = model()

    def run(variables: Any, x: Any) -> Any:
        found = module.apply(variables, x, layer=block, watch=block, select="full", method="features")
        a = found.seen.weights  # pyright: ignore[reportAttributeAccessIssue]
        even, boosted = (initial_signal(a.shape[-1], 1, b) for b in (False, True))
        rows = [aggregate_heads(wpr_scores(a, n, even)) for n in (1, 5, 30)]
        rows += [
            aggregate_heads(wpr_scores(a, 5, boosted)),
            aggregate_heads(wpr_scores(a, 5, even), "rms", PAPER_VARIANCES),
        ]
        return jnp.stack([*rows, a[:, :, 0].mean(1), a.mean((1, 2))])[:, :, 1:]

    return jax.jit(run)


def auroc(score: np.ndarray, shown: np.ndarray) -> float:
    """Mean over images of the chance that a token with the digit is scored above one without."""
    rank = rankdata(score, axis=1)
    n = shown.sum(1)
    above = (np.where(shown, rank, 0).sum(1) - n * (n + 1) / 2) / (n * (shown.shape[1] - n))
    return float(above.mean())


class DigitReader:
    """The model of one seed, and its test canvases."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.run = s, run
        self.module, self.variables = trained(run.seed, s.recipe, progress=run.progress)
        self.canvases = Canvases(*(a[: s.images] for a in test_set(run.seed)))

    def logits(self, reducer: TokenReducer, twice: bool = False) -> np.ndarray:
        """Of all images."""
        answer, parts = program(reducer, twice), []
        for i in range(0, len(self.canvases.images), BATCH):
            key = jax.random.fold_in(jax.random.key(self.run.seed), i)
            parts.append(np.asarray(answer(self.variables, self.canvases.images[i : i + BATCH], key)))
        return np.concatenate(parts)

    def accuracy(self, reducer: TokenReducer, twice: bool = False) -> float:
        """Share of canvases read right; `twice`: tokens are chosen by a first pass of the whole model."""
        return float(np.mean(self.logits(reducer, twice).argmax(-1) == self.canvases.labels))

    def localisation(self, block: int) -> dict[str, float]:
        """{score: AUROC} in a block of the unreduced model."""
        images = self.canvases.images
        parts = [np.asarray(scores(block)(self.variables, images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        found = np.concatenate(parts, axis=1)
        return {name: auroc(s, self.canvases.shown) for name, s in zip(SCORES, found, strict=True)}

    def hidden(self, reducer: Any) -> float:
        """Largest difference of logits between tokens that are dropped and tokens that are hidden."""
        both = (self.logits(r) for r in (reducer, dataclasses.replace(reducer, masked=True)))
        return float(np.abs(np.subtract(*both)).max())

    def searched(self, fraction: float) -> dict[str, Any]:
        """Accuracy of the best of many schedules of one cost."""
        s, held = self.s, (self.canvases.images, self.canvases.labels)
        few = calibration_set(self.run.seed, 2 * s.few)

        def apply(x: Any, reducer: Any) -> Any:
            return self.module.apply(self.variables, x, reducer=reducer)

        found = search_schedule(apply, sizes(), fraction, (few.images, few.labels), held, trials=s.trials, few=s.few, keep=4,
                                seed=self.run.seed, batch=BATCH, progress=self.run.progress)[0]  # fmt: skip
        return {"calibration": found.calibration, "held_out": found.held_out}
