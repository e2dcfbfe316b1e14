"""Training a decoder with experts: the text's loss, BlockFFN's two losses or the router's own, resumable to the bit.

    loss = next-token loss + locality * AL + factor(step) * CS + balance(step) * the routers' own loss

AL, CS and the routers' losses are means over the layers. The factor follows CS; ReMoE's weight follows how many experts run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jprune.language.perplexity import next_token_loss
from jprune.methods.contract import checked
from jprune.methods.experts.losses import (
    AdaptiveFactor,
    activation_locality,
    adaptive_factor,
    chunk_sparsification,
    factor_state,
    previous_tokens,
)
from jprune.models.moe.routers import ReMoE, Routed, remoe_coefficient
from jprune.training.steps import Trained, each_step, run_steps


@dataclasses.dataclass(frozen=True)
class ExpertLosses:
    """Weights of the losses beside that of the text.

    Attributes:
      locality: of the loss that makes neighbours use the same experts; 0: without it
      factor: of the loss that makes chunks use few; None: without it
      chunk: tokens of a chunk
      sharpness: alpha of the locality loss
      balance: of the router's own loss; where the router is ReMoE, its first weight
    """

    locality: float = 0.0
    factor: AdaptiveFactor | None = None
    chunk: int = 64
    sharpness: float = 100.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        checked(self, {
            "locality": (self.locality >= 0, "at least 0"), "chunk": (self.chunk >= 1, "at least 1"),
            "sharpness": (self.sharpness > 0, "above 0"), "balance": (self.balance >= 0, "at least 0"),
        })  # fmt: skip


class ExpertState(NamedTuple):
    """All that changes, as arrays.

    Attributes:
      params: variables of the decoder. optimizer: its state. factor: `FactorState`. balance: weight of the router's loss.
      step: steps made.
    """

    params: Any
    optimizer: Any
    factor: Any
    balance: Any
    step: Any


def routed_layers(state: Any) -> list[Routed]:
    """What the routers of all layers decided, from the collection "routed" of a decoder's pass; in the order of the layers."""

    def one(x: Any) -> bool:
        return isinstance(x, Routed)

    def layer(path: Any) -> int:
        return int("".join(filter(str.isdigit, jax.tree_util.keystr(path))) or 0)

    found = jax.tree_util.tree_flatten_with_path(state.get("routed", {}), is_leaf=one)[0]
    layers = [r for _, r in sorted(found, key=lambda leaf: layer(leaf[0]))]
    if len(layers) == 1 and layers[0].logits.ndim == 3:  # stacked
        return [jax.tree.map(lambda x, i=i: x[i], layers[0]) for i in range(len(layers[0].logits))]
    return layers


def losses_of(
    routed: list[Routed], rows: int, losses: ExpertLosses
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(AL, CS, the routers' own loss, share of experts that run), means over the layers; every row is a document.

    Args:
      routed: of the layers, their tokens row after row.
      rows: of the batch.
      losses: settings.
    """
    tokens = len(routed[0].logits)
    previous = previous_tokens(jnp.repeat(jnp.arange(rows), tokens // rows))
    zero = [jnp.zeros(())]
    al = [activation_locality(r.logits, previous, losses.sharpness) for r in routed] if losses.locality else zero
    cs = [chunk_sparsification(r.unit, None, losses.chunk) for r in routed] if losses.factor is not None else zero

    def mean(xs: list[Any]) -> Any:
        return jnp.mean(jnp.stack(xs))

    return mean(al), mean(cs), mean([r.balance for r in routed]), mean([jnp.mean(r.active) for r in routed])


def train_experts(
    module: Any,
    variables: Any,
    batch_of_step: Callable[[int], Any],
    steps: int,
    optimizer: optax.GradientTransformation,
    losses: ExpertLosses = ExpertLosses(),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 0,
    progress: Any = False,
    title: str = "experts",
) -> Trained:
    """Train a decoder; host-side. `state.params` of what it returns has the variables.

    Args:
      module: a `jprune.models.llama.Llama`, with experts or without.
      variables: where to start.
      batch_of_step: step -> token ids (rows, tokens), always the same ones for a step; every row is a document.
      steps: of training.
      optimizer: of the whole tree.
      losses: weights of the losses.
      out, resume, save_every, progress, title: as `jprune.training.steps.run_steps` has them; metrics.jsonl has all losses.

    Raises:
      ValueError: rows that are no whole chunks, and what `run_steps` refuses.
    """
    experts = module.config.experts
    remoe = experts.router if experts is not None and isinstance(experts.router, ReMoE) else None
    wanted = 0.0 if remoe is None or experts is None else remoe.k / experts.count
    tokens = np.shape(batch_of_step(0))[1]
    if experts is not None and losses.factor is not None and tokens % losses.chunk:
        raise ValueError(
            f"rows of {tokens} tokens are no whole chunks of {losses.chunk}: choose another length, or chunk"
        )

    def loss(params: Any, ids: Any, state: ExpertState) -> tuple[Any, Any]:
        logits, found = module.apply(params, ids, mutable=["routed"])
        text = jnp.mean(next_token_loss(jnp.asarray(logits), ids))
        said, factor, balance = {"text": text}, state.factor, state.balance
        total = text
        if experts is not None:
            al, cs, own, rate = losses_of(routed_layers(found), len(ids), losses)
            if losses.factor is not None:
                weight, factor = adaptive_factor(losses.factor, state.factor, jax.lax.stop_gradient(cs))
                total = total + weight * cs
                said["factor"] = weight
            total = total + losses.locality * al + state.balance * own
            if remoe is not None and losses.balance:
                balance = remoe_coefficient(state.balance, rate, wanted, least=losses.balance)
            said |= {"locality": al, "chunks": cs, "balance": own, "active": rate}
        return total, (said, factor, balance)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: ExpertState, ids: Any) -> tuple[ExpertState, Any]:
        (total, (said, factor, balance)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, ids, state)
        updates, own = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return ExpertState(params, own, factor, balance, state.step + 1), {"loss": total, **said}

    variables = jax.tree.map(jnp.array, variables)  # which the first step gives away
    start: Any = ExpertState(
        variables, optimizer.init(variables), factor_state(losses.factor or AdaptiveFactor()),
        jnp.float32(losses.balance), jnp.zeros((), jnp.int32))  # fmt: skip

    def advance(state: Any, _: int, batch: Any) -> Any:
        return update(state, batch)

    recipe = {
        "method": "experts",
        "losses": dataclasses.asdict(losses),
        "steps": steps,
        "config": repr(module.config),
    }
    return run_steps(start, advance, each_step(batch_of_step), steps, recipe=recipe, out=out, resume=resume,
                     save_every=save_every, progress=progress, title=title)  # fmt: skip
