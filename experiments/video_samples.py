"""Samples of the moving digits' model under sparse attention, compared with dense ones: what one seed's rows share."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.moving_digits import FRAMES, MODEL, SIDE, TOKENS, WORDS, Recipe, trained, videos
from experiments.study import Run
from jprune.methods.attention.adaspa import Action, LayerState, attention_of, init_state, sample
from jprune.methods.attention.adaspa_select import AdaSpaConfig, recall_of
from jprune.models.samplers import RectifiedFlow
from jprune.report.similarity import psnr, ssim
from pallas_kernels.block_score import block_scores


@dataclasses.dataclass(frozen=True)
class Setting:
    """Model, sampler and sparsity.

    Attributes:
      recipe: of the video model.
      sampler: how videos are made.
      sparsities: shares of video blocks that a row does not read; demands are about the first.
      noises: samples of every model.
      block: tokens of a block.
    """

    recipe: Recipe = Recipe()
    sampler: RectifiedFlow = RectifiedFlow(50, 7.0)
    sparsities: tuple[float, ...] = (0.8, 0.6)
    noises: int = 3
    block: int = 8


VIDEOS = 4


class Measured(NamedTuple):
    """A layer's state and the sum and number of its recalls in sparse steps."""

    inner: LayerState
    recall: Any
    steps: Any


def measuring(hook: Callable[..., Any], action: Action, config: AdaSpaConfig) -> Callable[..., Any]:
    """The hook, with the exact share of attention mass in the blocks it used added to its state."""

    def attention(layer: int, q: Any, k: Any, v: Any, valid: Any, state: Measured) -> Any:
        out, inner = hook(layer, q, k, v, valid, state.inner)
        if action in (Action.DENSE, Action.FUSED):
            return out, state._replace(inner=inner)
        masses = block_scores(q, k, block_q=config.block, block_k=config.block)
        share = recall_of(masses, inner.chosen, config, q.shape[2]).mean()
        return out, Measured(inner, state.recall + share, state.steps + 1)

    return attention


class VideoModel:
    """The model of one seed, its noises, and the videos that dense attention makes of them."""

    def __init__(self, s: Setting, run: Run):
        self.s, self.seed = s, run.seed
        self.module, self.variables, self.loss = trained(run.seed, s.recipe, progress=run.progress)
        _, self.label, self.motion = videos(np.random.default_rng(1000 + run.seed), VIDEOS)
        shape = (VIDEOS, FRAMES, SIDE, SIDE, 1)
        self.noises = [
            jax.random.normal(jax.random.fold_in(jax.random.key(77 + run.seed), i), shape) for i in range(s.noises)
        ]

    @functools.cached_property
    def dense(self) -> list[np.ndarray]:
        """Of every noise."""
        config = AdaSpaConfig(0.0, self.s.block, text_start=TOKENS - WORDS, text_len=WORDS, min_tokens=TOKENS + 1)
        run = self.sampler(config, lambda a: attention_of(Action.DENSE, config))
        return [np.asarray(run(noise)[0]) for noise in self.noises]

    def sampler(self, config: AdaSpaConfig, hook_of: Callable[[Action], Any]) -> Callable[[Any], Any]:
        """noise -> (videos, states of the layers), compiled."""

        def predictor(hook: Callable[..., Any]) -> Callable[..., Any]:
            def predict(x: Any, t: Any, states: Any) -> Any:
                return self.module.apply(self.variables, x, jnp.full(VIDEOS, t), self.label, self.motion, hook, states)

            return predict

        def run(noise: Any) -> Any:
            zero, heads = jnp.zeros((), jnp.float32), MODEL.blocks[0].heads
            states = (Measured(init_state(VIDEOS, heads, TOKENS, config), zero, zero),) * len(MODEL.blocks)
            return sample(lambda a: predictor(measuring(hook_of(a), a, config)), noise, self.s.sampler, states, config)

        return jax.jit(run)

    def row(self, config: AdaSpaConfig, hook_of: Callable[[Action], Any]) -> list[dict[str, float]]:
        """Of every noise: how near the videos come to the dense ones, and what share of the attention was kept."""
        run, out = self.sampler(config, hook_of), []
        for noise, target in zip(self.noises, self.dense, strict=True):
            began = time.perf_counter()
            made, states = jax.block_until_ready(run(noise))
            made = np.asarray(made)
            out.append({
                "psnr": psnr(made, target),
                "ssim": float(np.mean([ssim(a[..., 0], b[..., 0]) for a, b in zip(made, target, strict=True)])),
                "recall": float(np.mean([s.recall / s.steps for s in states])),
                "seconds": time.perf_counter() - began,
                "loss": self.loss,
            })  # fmt: skip
        return out
