"""AdaSpa: training-free block-sparse attention for video diffusion (Xia et al. 2025, arXiv 2502.21079).

    dense     the first steps
    fused     the first search: dense, and by the way the exact mass of every block of every head
    sparse    attention over the blocks of largest mass
    research  search again with this step's queries and keys, then sparse at once

A pure state machine, one layer at a time: `adaspa_attention(q, k, v, state, action, config) -> (out, state)`. Which
action a step takes is static (`action_for_step`), so that every action is one compiled program and runs of equal ones
are one scan: `sample` does that for a whole sampler. Each layer searches with its own queries and keys inside the
step, and every batch element has its own blocks.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jprune.methods.attention.adaspa_select import AdaSpaConfig, Chosen, block_mask, keep_counts, select_blocks, spans
from jprune.models import samplers
from pallas_kernels.block_score import block_scores, search_attention
from pallas_kernels.block_sparse_attention import BlockMask, block_sparse_attention


class Action(enum.Enum):
    """What a step does."""

    DENSE = "dense"
    FUSED = "fused"
    SPARSE = "sparse"
    RESEARCH = "research"


def action_for_step(step: int, config: AdaSpaConfig) -> Action:
    """The action of a sampler's step, counted from zero (section 4.3, figure 7)."""
    first, *later = config.search_steps
    if step <= first:
        return Action.FUSED if step == first else Action.DENSE
    return Action.RESEARCH if step in later else Action.SPARSE


def segments(steps: int, config: AdaSpaConfig) -> list[tuple[Action, int, int]]:
    """(action, first step, last step + 1) of runs of equal actions."""
    runs = itertools.groupby(range(steps), lambda i: action_for_step(i, config))
    whole = [(action, list(run)) for action, run in runs]
    return [(action, run[0], run[-1] + 1) for action, run in whole]


class LayerState(NamedTuple):
    """What one layer remembers between steps.

    Attributes:
      chosen: its blocks, ids as int16 where they fit.
      lse: (batch, heads, tokens) float32 of the first search, None where later searches do not need it.
    """

    chosen: Chosen
    lse: Float[Array, "batch heads tokens"] | None


def init_state(batch: int, heads: int, tokens: int, config: AdaSpaConfig) -> LayerState:
    """One layer's state before the first search; shapes are those of all later states."""
    at = spans(tokens, config)
    most = keep_counts(at.video, config.sparsity).need
    ids = jnp.zeros((batch, heads, at.video, most), _id_type(at.video))
    lse = jnp.zeros((batch, heads, tokens), jnp.float32) if config.research == "cached" else None
    return LayerState(Chosen(ids, jnp.zeros((batch, heads), jnp.int32)), lse)


def adaspa_attention(
    q: Float[Array, "batch heads tokens head"],
    k: Float[Array, "batch heads tokens head"],
    v: Float[Array, "batch heads tokens value"],
    state: LayerState,
    action: Action,
    config: AdaSpaConfig,
    valid: Bool[Array, "batch tokens"] | None = None,
) -> tuple[Float[Array, "batch heads tokens value"], LayerState]:
    """One layer's attention and its new state; jit-able with `action` and `config` static.

    Args:
      q, k, v: joint tokens of text and video, positions already in them.
      state: from `init_state` or the step before.
      action: of this step.
      config: settings.
      valid: tokens that are no padding; padding is never attended to and carries no mass.

    Raises:
      ValueError: text that leaves no block of video, or arguments that the kernels refuse.
    """
    tokens = q.shape[2]
    rules = rules_of(valid)
    if action is Action.DENSE or tokens < config.min_tokens:
        return dense_attention(q, k, v, config, rules), state
    if action is Action.FUSED:
        out, lse, masses = _search(q, k, v, config, rules)
        new = _chosen(masses, config, tokens)
        return out, LayerState(new, lse if config.research == "cached" else None)
    if action is Action.RESEARCH:
        known = {"lse": state.lse} if config.research == "cached" else {}
        masses = block_scores(q, k, block_q=config.block, block_k=config.block, impl=config.impl, **known, **rules)
        state = state._replace(chosen=_chosen(masses, config, tokens))
    return sparse_attention(q, k, v, state.chosen, config, rules), state


def attention_of(action: Action, config: AdaSpaConfig) -> Callable[..., Any]:
    """(layer, q, k, v, valid, state) -> (out, state): the hook of `jprune.models.dit.VideoDiT` for one action."""

    def attention(layer: int, q: Any, k: Any, v: Any, valid: Any, state: LayerState) -> tuple[Any, LayerState]:
        act = Action.DENSE if layer in config.dense_layers else action
        return adaspa_attention(q, k, v, state, act, config, valid)

    return attention


def sample(
    predict: Callable[[Action], Callable[[Any, Any, Any], tuple[Any, Any]]],
    x: Any,
    sampler: samplers.Sampler,
    state: Any,
    config: AdaSpaConfig,
) -> tuple[Any, Any]:
    """(sample, state) of a whole sampler, each run of equal actions as one scan.

    Args:
      predict: action -> (x, time, state) -> (prediction, state), with `attention_of(action, config)` inside.
      x: noise.
      sampler: `RectifiedFlow`, `DDIM` or another.
      state: the states of all layers.
      config: settings.

    Raises:
      ValueError: the first search lies behind the sampler's last step.
    """
    if config.search_steps[0] >= sampler.steps:
        raise ValueError(
            f"the first search is at step {config.search_steps[0]} of {sampler.steps}: choose earlier search_steps"
        )
    for action, first, last in segments(sampler.steps, config):
        x, state = samplers.sample(predict(action), x, sampler, state, first, last)
    return x, state


# -- the four kinds of attention -----------------------------------------------------------------------------------------


def rules_of(valid: Any) -> dict[str, Any]:
    """Segment ids under which every query sees the valid keys only."""
    if valid is None:
        return {}
    return {
        "q_segment_ids": jnp.zeros(valid.shape, jnp.int32),
        "kv_segment_ids": jnp.where(valid, 0, 1).astype(jnp.int32),
    }


def _blocks(q: Any, k: Any, config: AdaSpaConfig) -> BlockMask:
    sizes = {"block_q": config.block, "block_k": config.block, "q_size": q.shape[2], "kv_size": k.shape[2]}
    return BlockMask.dense(**sizes)


def dense_attention(q: Any, k: Any, v: Any, config: AdaSpaConfig, rules: dict[str, Any], lse: bool = False) -> Any:
    """Attention over all blocks; with `lse` (out, log-sum-exp)."""
    return block_sparse_attention(q, k, v, _blocks(q, k, config), return_lse=lse, impl=config.impl, **rules)


def _search(q: Any, k: Any, v: Any, config: AdaSpaConfig, rules: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(out, log-sum-exp, masses of blocks) (algorithm 1)."""
    sizes = {"block_q": config.block, "block_k": config.block, "impl": config.impl}
    if config.fused == "single_pass":
        return search_attention(q, k, v, **sizes, **rules)
    out, lse = dense_attention(q, k, v, config, rules, lse=True)
    return out, lse, block_scores(q, k, lse=lse, **sizes, **rules)


def _chosen(masses: Any, config: AdaSpaConfig, tokens: int) -> Chosen:
    found = select_blocks(masses, config, tokens).chosen
    return found._replace(ids=found.ids.astype(_id_type(spans(tokens, config).video)))


def _id_type(video_blocks: int) -> Any:
    return jnp.int16 if video_blocks < 2**15 else jnp.int32


def sparse_attention(q: Any, k: Any, v: Any, chosen: Chosen, config: AdaSpaConfig, rules: dict[str, Any]) -> Any:
    """Rows of video over their lists; rows with text, which keep every block, in a dense call of their own."""
    tokens = q.shape[2]
    at = spans(tokens, config)
    first, last = at.first * config.block, min(at.last * config.block, tokens)
    out = []
    for low, high in ((0, first), (first, last), (last, tokens)):
        if low == high:
            continue
        part = q[:, :, low:high]
        own = {**rules, "q_segment_ids": rules["q_segment_ids"][:, low:high]} if rules else {}
        if (low, high) == (first, last):
            mask = block_mask(chosen, config, tokens)
            out.append(block_sparse_attention(part, k, v, mask, impl=config.impl, **own))
        else:
            out.append(dense_attention(part, k, v, config, own))
    return jnp.concatenate(out, axis=2)
