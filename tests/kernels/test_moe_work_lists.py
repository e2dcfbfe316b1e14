"""The lists that mixture-of-experts kernels walk, against closed forms and against loops over the flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_moe import tile_activity, tile_worklist, union_ids

ACT = np.array([[1, 0, 1], [0, 0, 0]], bool)
ORDERS = {order: jax.jit(lambda a, order=order: tile_worklist(a, order=order)) for order in ("tile", "expert")}


def visits(work):
    n = int(work.n)
    return list(zip(*(np.asarray(a)[:n].tolist() for a in (work.tile, work.expert, work.valid))))


def test_closed_forms():
    assert visits(ORDERS["tile"](ACT)) == [(0, 0, True), (0, 2, True), (1, 0, False)]
    assert visits(ORDERS["expert"](ACT)) == [(0, 0, True), (0, 1, False), (0, 2, True)]
    assert ORDERS["tile"](ACT).sub_mask.tolist()[:3] == [1, 1, 0]


@pytest.mark.parametrize("order", ["tile", "expert"])
@pytest.mark.parametrize("density", [0, 0.2, 1])
def test_every_active_pair_once_ascending_and_nobody_left_out(order, density):
    parts = np.random.default_rng(3).random((4, 3, 5)) < density  # tiles, parts, experts
    work = ORDERS[order](parts)
    act = parts.any(1) if order == "tile" else parts.any(1).T
    wanted = [
        (o, i) for o in range(len(act)) for i in range(act.shape[1]) if act[o, i] or (i == 0 and not act[o].any())
    ]
    n = int(work.n)
    outer, inner = (work.tile, work.expert) if order == "tile" else (work.expert, work.tile)
    assert list(zip(np.asarray(outer)[:n].tolist(), np.asarray(inner)[:n].tolist())) == wanted
    assert work.valid[:n].tolist() == [bool(act[pair]) for pair in wanted]
    for tile, expert, bits in zip(work.tile[:n], work.expert[:n], np.asarray(work.sub_mask)):
        assert [bits >> i & 1 for i in range(3)] == parts[tile, :, expert].tolist()
    for entries in work[:3]:  # what lies behind is a real visit, so that no index leads out of the arrays
        assert (np.asarray(entries)[n:] == entries[n - 1]).all() and len(entries) == 20


def test_tiles_of_tokens():
    active = np.random.default_rng(0).random((11, 3)) < 0.2
    got = np.asarray(tile_activity(active, 4, 2))
    whole = np.concatenate([active, np.zeros((1, 3), bool)])
    np.testing.assert_array_equal(got, whole.reshape(3, 2, 2, 3).any(2))
    with pytest.raises(ValueError, match="no parts of 3"):
        tile_activity(active, 4, 3)
    with pytest.raises(ValueError, match="at most 31"):
        tile_activity(active, 64, 2)
    with pytest.raises(ValueError, match="order 'token'"):
        tile_worklist(active[None], order="token")


def test_union():
    active = np.zeros((4, 6), bool)
    active[0, 4], active[1, 1], active[3, 5] = True, True, True
    for ids, count in (union_ids(active), jax.jit(union_ids)(active)):
        assert ids[: int(count)].tolist() == [1, 4, 5] and (ids[3:] == 5).all()
    ids, count = union_ids(jnp.asarray(active), jnp.array([True, True, False, False]))
    assert ids[: int(count)].tolist() == [1, 4]
    ids, count = union_ids(active & False)
    assert int(count) == 0 and (ids == 0).all()  # ids that may be read even so
