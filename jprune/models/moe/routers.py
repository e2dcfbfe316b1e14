"""Which experts a token goes to and with what weight, from its logits: by ReLU and RMSNorm (BlockFFN), and four others.

A router is a frozen dataclass that is called with logits: `routed = TopK(6)(logits)`. Everything is float32. An expert is
active where `routed.active` says so, never where its weight is above 0: BlockFFN's weights may be negative.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Routed(NamedTuple):
    """What a router decides.

    Attributes:
      logits: of the tokens, float32.
      unit: the scores as they are before a learned gain, not negative; losses that must not depend on the gain take it.
      scores: the weight of every expert, exactly 0 where it is not active.
      active: which experts run.
      balance: the router's own auxiliary loss, unweighted; 0 where it has none.
    """

    logits: Float[Array, "tokens experts"]
    unit: Float[Array, "tokens experts"]
    scores: Float[Array, "tokens experts"]
    active: Bool[Array, "tokens experts"]
    balance: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class ReluNorm:
    """BlockFFN's router (Song et al. 2025, equations 1 to 3): ReLU chooses, RMSNorm over all experts weighs.

        >>> routed = ReluNorm()(jnp.array([[3.0, -1.0, 4.0, 0.0]]), jnp.ones(4))
        >>> print(routed.scores.round(4), routed.active)
        [[1.2 0.  1.6 0. ]] [[ True False  True False]]

    Attributes:
      eps: added to the mean square
    """

    eps: float = 1e-5

    def __call__(self, logits: Float[Array, "tokens experts"], gain: Float[Array, " experts"]) -> Routed:
        """Any number of experts per token, none too. `gain` is learned and may be negative."""
        z = logits.astype(jnp.float32)
        r = jax.nn.relu(z)
        n = r * jax.lax.rsqrt(jnp.mean(r * r, axis=-1, keepdims=True) + self.eps)
        return Routed(z, n, n * gain.astype(jnp.float32), r > 0, jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class TopK:
    """The k largest of a softmax, over their sum; ties go to the first expert.

    Attributes:
      k: experts of a token
      renormalised: divide by their sum; else the weights are those of the softmax over all experts
    """

    k: int
    renormalised: bool = True

    def __call__(self, logits: Float[Array, "tokens experts"]) -> Routed:
        """The balance loss is E sum_e mean_t(p) load_e (Fedus et al. 2022)."""
        z = logits.astype(jnp.float32)
        _check_k(self.k, z.shape[-1])
        p = jax.nn.softmax(z, axis=-1)
        active = _largest(p, self.k)
        chosen = jnp.where(active, p, 0.0)
        scores = chosen / jnp.sum(chosen, axis=-1, keepdims=True) if self.renormalised else chosen
        load = jnp.mean(active.astype(jnp.float32), axis=0) / self.k
        balance = z.shape[-1] * jnp.sum(jnp.mean(p, axis=0) * load)
        return Routed(z, scores, scores, active, balance)


@dataclasses.dataclass(frozen=True)
class DSMoE:
    """DeepSeek's: the first `shared` experts always run with weight 1, k - shared of the others by `TopK`.

    Attributes:
      k: experts of a token, the shared ones included
      shared: experts that always run
    """

    k: int
    shared: int = 2

    def __call__(self, logits: Float[Array, "tokens experts"]) -> Routed:
        """Logits of the shared experts are not looked at."""
        if not 0 < self.shared < self.k:
            raise ValueError(f"{self.shared} shared experts of {self.k}: at least one, and one that is chosen")
        rest = TopK(self.k - self.shared)(logits[:, self.shared :])
        ones = jnp.ones((len(logits), self.shared), jnp.float32)
        scores = jnp.concatenate([ones, rest.scores], axis=1)
        active = jnp.concatenate([ones > 0, rest.active], axis=1)
        return Routed(logits.astype(jnp.float32), scores, scores, active, rest.balance)


@dataclasses.dataclass(frozen=True)
class ReMoE:
    """ReLU of the logits as weights (Wang et al. 2025). Its loss is an L1 norm that grows or falls until k run on average.

    Attributes:
      k: experts of a token that are wanted on average; `remoe_coefficient` goes there
    """

    k: int

    def __call__(self, logits: Float[Array, "tokens experts"]) -> Routed:
        """The balance loss is E / (T^2 k) sum_e (sum_t relu(z)) (number of tokens at e)."""
        z = logits.astype(jnp.float32)
        _check_k(self.k, z.shape[-1])
        r = jax.nn.relu(z)
        active = r > 0
        tokens, experts = z.shape
        load = jax.lax.stop_gradient(jnp.sum(active, axis=0, dtype=jnp.float32))
        balance = experts / (tokens**2 * self.k) * jnp.sum(jnp.sum(r, axis=0) * load)
        return Routed(z, r, r, active, balance)


def remoe_coefficient(
    coefficient: Any, rate: Any, wanted: float, factor: float = 1.05, least: float = 1e-8
) -> Float[Array, ""]:
    """The weight of ReMoE's loss after a step: larger where more experts run than wanted, else smaller.

        >>> print(remoe_coefficient(1e-5, rate=0.3, wanted=0.2), remoe_coefficient(1e-8, rate=0.1, wanted=0.2))
        1.05e-05 1e-08

    Args:
      coefficient: before.
      rate: mean share of experts that ran.
      wanted: k over the number of experts.
      factor: of growth and fall.
      least: it does not fall below.
    """
    return jnp.where(rate > wanted, coefficient * factor, jnp.maximum(coefficient / factor, least)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Grin:
    """SparseMixer-v2 (Liu et al. 2024): k experts one after the other, sampled in training, with the gradient of sampling.

    For each: of the experts not chosen yet those stay whose logit z has (max - z) / max(|z|, max) <= 2 jitter; q is the
    softmax over them. In training one is drawn of q, otherwise the largest is taken; its weight is its q. A drawn weight that
    is not the largest is multiplied by 1/3 three times of four, which the gradient leaves out.

    Attributes:
      k: experts of a token
      jitter: half of the relative distance from the largest logit up to which an expert stays in the choice
    """

    k: int
    jitter: float = 0.1

    def __call__(self, logits: Float[Array, "tokens experts"], key: Any = None) -> Routed:
        """With a key as in training, without one as afterwards. The balance loss is that of `TopK`: the published program's,
        normalised for every expert over its k choices, is about E whatever the load."""
        z = logits.astype(jnp.float32)
        tokens, experts = z.shape
        _check_k(self.k, experts)
        free = jnp.ones(z.shape, bool)
        scores = jnp.zeros(z.shape, jnp.float32)
        for j in range(self.k):
            left = jnp.where(free, z, -jnp.inf)
            top = jnp.max(left, axis=-1, keepdims=True)
            near = free & ((top - z) / jnp.maximum(jnp.maximum(jnp.abs(z), top), 1e-30) <= 2 * self.jitter)
            among = jnp.where(near, z, -jnp.inf)
            best = jnp.argmax(left, axis=-1)
            if key is None:
                chosen, factor = best, jnp.ones(tokens)
            else:
                draw, luck = jax.random.split(jax.random.fold_in(key, j))
                chosen = jax.random.categorical(draw, among, axis=-1)
                whole = (chosen == best) | (jax.random.uniform(luck, (tokens,)) < 0.25)
                factor = jnp.where(whole, 1.0, 0.3333)
            weight = _sampled(among, chosen, factor)
            one = jax.nn.one_hot(chosen, experts)
            scores = scores + one * weight[:, None]
            free = free & (one == 0)
        active = ~free
        share = jnp.mean(jax.nn.softmax(z, axis=-1), axis=0)
        balance = experts * jnp.sum(share * jnp.mean(active.astype(jnp.float32), axis=0)) / self.k
        return Routed(z, scores, scores, active, balance)


@jax.custom_vjp
def _sampled(
    among: Float[Array, "tokens experts"], chosen: Int[Array, " tokens"], factor: Float[Array, " tokens"]
) -> Float[Array, " tokens"]:
    """factor times the chosen softmax entry; backwards as if the factor were 1."""
    return _share(among, chosen) * factor


def _share(among: Any, chosen: Any) -> Any:
    return jnp.take_along_axis(jax.nn.softmax(among, axis=-1), chosen[:, None], axis=-1)[:, 0]


def _sampled_forward(among: Any, chosen: Any, factor: Any) -> Any:
    q = jax.nn.softmax(among, axis=-1)
    weight = jnp.take_along_axis(q, chosen[:, None], axis=-1)[:, 0]
    return weight * factor, (q, chosen, weight)


def _sampled_backward(kept: Any, cotangent: Any) -> Any:
    q, chosen, weight = kept
    one = jax.nn.one_hot(chosen, q.shape[-1])
    return (cotangent * weight)[:, None] * (one - q), None, None


_sampled.defvjp(_sampled_forward, _sampled_backward)
Router: TypeAlias = ReluNorm | TopK | DSMoE | ReMoE | Grin


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts in place of an MLP.

    Attributes:
      count: how many
      router: which of them run
      gated: an expert is (silu(x gate) * (x up)) down, as in most released models; else silu(x up) down
    """

    count: int
    router: Router = ReluNorm()
    gated: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}: there is at least one expert")


def _largest(p: Any, k: int) -> Any:
    """True for the k largest of every row; ties to the first. Without a scatter, through which no trace sees."""
    _, index = jax.lax.top_k(p, k)
    return (index[:, :, None] == jnp.arange(p.shape[-1])).any(axis=1)


def _check_k(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}: a token goes to at least 1 and at most all {experts} experts")
