"""Which experts a kernel visits for which tokens: lists of (tile of tokens, expert) and the union of the active experts.

Tokens are cut into tiles in their order, and a tile visits every expert that one of its tokens uses. All of it is jit-able:
lists have room for every visit that is possible, and the number of real ones is an array.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.common.block_lists import pack_lists
from pallas_kernels.common.xla import padded

SUB_TILES = 31  # bits of an int32 that are no sign


class WorkList(NamedTuple):
    """Visits in order; entries behind the first `n` repeat the last and mean nothing.

    Attributes:
      tile, expert: int32, what a visit is of. n: how many visits there are, at least 1.
      sub_mask: int32, bit i: the i-th part of the tile uses the expert. 0 at visits made only so that what belongs to
        the tile or the expert is written.
    """

    tile: Int[Array, " W"]
    expert: Int[Array, " W"]
    sub_mask: Int[Array, " W"]
    n: Int[Array, ""]

    @property
    def valid(self) -> Bool[Array, " W"]:
        """Whether there is anything to compute at a visit."""
        return self.sub_mask != 0


def tile_activity(
    active: Bool[Array, "T E"] | np.ndarray, tile: int, sub_tile: int | None = None
) -> Bool[Array, "tiles parts experts"]:
    """Whether a token of each part of each tile uses an expert; a last tile that is not full counts as if others followed.

    >>> import jax.numpy as jnp
    >>> tile_activity(jnp.array([[True, False], [False, False], [False, True]]), 2).tolist()
    [[[True, False]], [[False, True]]]
    """
    sub_tile = sub_tile or tile
    if tile % sub_tile or tile // sub_tile > SUB_TILES:
        raise ValueError(
            f"tiles of {tile} tokens have no parts of {sub_tile}: wanted a divisor, of at most {SUB_TILES} parts"
        )
    flags = padded(jnp.asarray(active), 0, tile, False)
    return flags.reshape(-1, tile // sub_tile, sub_tile, flags.shape[1]).any(2)


def tile_worklist(act: Bool[Array, "tiles *parts experts"] | np.ndarray, *, order: str = "tile") -> WorkList:
    """The visits of every active (tile, expert), ascending; with at least one of each tile, or of each expert.

    Args:
      act: flags of tiles, or of their parts. order: "tile": all experts of a tile in turn, as outputs of tokens need it, and
        a tile without any visits expert 0. "expert": all tiles of an expert in turn, as gradients of weights need it, and an
        expert that nobody uses visits tile 0.

    Raises:
      ValueError: another order.

    >>> import jax.numpy as jnp
    >>> work = tile_worklist(jnp.array([[True, False, True], [False, False, False]]))
    >>> n = int(work.n)
    >>> work.tile[:n].tolist(), work.expert[:n].tolist(), work.valid[:n].tolist()
    ([0, 0, 1], [0, 2, 0], [True, True, False])
    """
    if order not in ("tile", "expert"):
        raise ValueError(f"order {order!r} is not known: 'tile' or 'expert'")
    act = jnp.asarray(act)
    parts = act if act.ndim == 3 else act[:, None]
    bits = (parts << jnp.arange(parts.shape[1], dtype=jnp.int32)[:, None]).sum(1, dtype=jnp.int32)
    bits = bits if order == "tile" else bits.T
    visited = bits != 0
    visited = visited.at[:, 0].set(visited[:, 0] | ~visited.any(1))
    entries, count, _ = pack_lists(visited.reshape(-1), visited.size)
    outer, inner = entries // bits.shape[1], entries % bits.shape[1]
    tile, expert = (outer, inner) if order == "tile" else (inner, outer)
    return WorkList(tile, expert, bits.reshape(-1)[entries], count)


def union_ids(
    active: Bool[Array, "T E"] | np.ndarray, row_valid: Bool[Array, " T"] | None = None
) -> tuple[Int[Array, " E"], Int[Array, ""]]:
    """(ids, how many): the experts that at least one token uses, ascending; behind them the last is repeated.

    Args:
      row_valid: tokens that count, all by default.

    >>> import jax.numpy as jnp
    >>> ids, count = union_ids(jnp.array([[False, True, False, True], [False, True, False, False]]))
    >>> ids[:count].tolist()
    [1, 3]
    """
    flags = jnp.asarray(active)
    if row_valid is not None:
        flags &= row_valid[:, None]
    ids, count, _ = pack_lists(flags.any(0), flags.shape[1])
    return ids, count
