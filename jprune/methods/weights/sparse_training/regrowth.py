"""What SET and RigL share: the smallest weights are dropped, as many others grow, a falling share at each step.

At step t of T the share f(t) = drop / 2 (1 + cos(pi t / T)) of a leaf's weights goes (Evci et al. 2020, section 3).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jprune.methods.weights.sparse_training.method import Look


def check_share(drop: float) -> None:
    """Raise ValueError unless the share dropped lies in [0, 1]."""
    if isinstance(drop, bool) or not 0 <= drop <= 1:
        raise ValueError(f"drop is {drop}: it is the share of the weights left that is exchanged at first, in [0, 1]")


def drop_and_grow(look: Look, drop: float, grow: dict[str, Any]) -> dict[str, Any]:
    """Masks without the smallest weights and with as many others whose `grow` score is the largest.

    A weight that has just been dropped may grow again, and then keeps its value. The counts are those of the schedule, so
    that the sparsity may rise meanwhile. In an N:M pattern every group keeps its N.
    """
    share = drop / 2 * (1 + jnp.cos(jnp.pi * look.step / max(look.last, 1)))
    active = {p: jnp.sum(m, dtype=jnp.uint32) for p, m in look.masks.items()}
    aim = {p: look.kept.get(p, n) for p, n in active.items()}
    survive = {p: n - jnp.minimum(jnp.floor(share * n).astype(jnp.uint32), n) for p, n in aim.items()}
    large = {p: jnp.where(look.masks[p], jnp.abs(w), -jnp.inf) for p, w in look.weights.items()}
    survivors = look.choose_among(large, survive)
    return look.choose({p: jnp.where(m, jnp.inf, _finite(grow[p])) for p, m in survivors.items()}, look.kept)


def _finite(x: Any) -> Any:
    """Below infinity, which is kept for the weights that survive."""
    return jnp.minimum(x, jnp.finfo(x.dtype).max)
