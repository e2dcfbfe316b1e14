"""Grouped products against float64 numpy: one program of an implementation holds all divisions into groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_oracle import same
from quick import QUICK

from pallas_kernels.grouped_matmul import BackendError, DerivativeError, GroupError, grouped_matmul, tpu

P, K, N = 37, 24, 40
SIZES = {
    "none": [0, 0, 0, 0, 0],
    "one row": [0, 0, 1, 0, 0],
    "some are empty": [0, 17, 0, 9, 0],
    "all rows, edges within tiles": [3, 5, 14, 2, 13],
    "edges at tiles": [16, 0, 16, 0, 5],
    "one has all": [0, 0, 0, 37, 0],
}


def draw(sizes, seed=0, dtype=np.float32, shape=(P, K, N)):
    """lhs, rhs, sizes, row_scale (negative and 0 too), cotangent; what no group reads is not-a-number."""
    rng, (p, k, n) = np.random.default_rng(seed), shape
    lhs, rhs = rng.normal(size=(p, k)), rng.normal(size=(len(sizes), k, n)) / np.sqrt(k)
    scale, dout = rng.normal(size=p), rng.normal(size=(p, n))
    scale[::5] = 0
    lhs[sum(sizes) :], rhs[np.asarray(sizes) == 0] = np.nan, np.nan
    return (
        *(a.astype(dtype) for a in (lhs, rhs)),
        np.asarray(sizes, np.int32),
        scale.astype(np.float32),
        dout.astype(dtype),
    )


def expected(lhs, rhs, sizes, scale, dout, silu):
    """(out, (dlhs, drhs, dscale)), a group at a time."""
    lhs, rhs, scale, dout = (np.asarray(a, np.float64) for a in (lhs, rhs, scale, dout))
    out, grads, start = np.zeros_like(dout), [np.zeros_like(a) for a in (lhs, rhs, scale)], 0
    for g, size in enumerate(sizes):
        rows, start = slice(start, start + size), start + size
        h = lhs[rows] @ np.nan_to_num(rhs[g])
        gate = 1 / (1 + np.exp(-h)) if silu else np.ones_like(h)
        value, slope = h * gate, gate * (1 + h * (1 - gate)) if silu else gate
        out[rows] = scale[rows, None] * value
        dh = scale[rows, None] * dout[rows] * slope
        grads[0][rows], grads[1][g] = dh @ np.nan_to_num(rhs[g]).T, lhs[rows].T @ dh
        grads[2][rows] = (value * dout[rows]).sum(1)
    return out, grads


@functools.cache
def program(way, silu, tile=16):
    def run(lhs, rhs, sizes, scale, dout):
        options = {"activation": "silu"} if silu else {}
        options |= {"impl": way, "tile": tile, "interpret": way == "tpu"}
        out, back = jax.vjp(lambda a, b, s: grouped_matmul(a, b, sizes, row_scale=s, **options), lhs, rhs, scale)
        return out, back(dout)

    return jax.jit(run, compiler_options=QUICK)


def check(got, given, silu, tolerance):
    out, grads = expected(*given, silu)
    same(got[0], out, tolerance)
    for ours, wanted in zip(got[1], grads, strict=True):
        same(ours, wanted, 2 * tolerance)
    assert [a.dtype for a in (got[0], *got[1])] == [given[i].dtype for i in (0, 0, 1, 3)]


@pytest.mark.parametrize("way", ["reference", "xla", "tpu"])
def test_values_and_gradients(way):
    for seed, sizes in enumerate(SIZES.values()):
        given = draw(sizes, seed)
        got = program(way, True)(*given)
        check(got, given, True, 1e-5)
        behind, empty = sum(sizes), given[2] == 0
        assert not any(np.asarray(a)[behind:].any() for a in (got[0], got[1][0], got[1][2]))
        assert not np.asarray(got[1][1])[empty].any()


@pytest.mark.parametrize("way", ["xla", "tpu"])
def test_without_activation_in_bfloat16(way):
    given = draw(SIZES["some are empty"], dtype=jnp.bfloat16)
    check(program(way, False)(*given), given, False, 2e-2)


def test_it_means_what_ragged_dot_means():
    lhs, rhs, sizes, *_ = draw(SIZES["all rows, edges within tiles"])
    run = jax.jit(lambda *a: (grouped_matmul(*a, impl="xla"), jax.lax.ragged_dot(*a)), compiler_options=QUICK)
    same(*run(lhs, rhs, sizes), 1e-5)


def test_a_tile_is_visited_by_the_groups_that_have_rows_in_it():
    """Rows 0 and 1 are the first group's, 2 to 4 the third's, the last tile of two is nobody's; as many steps, no more."""
    of = jax.jit(tpu.Visits.of, static_argnums=(1, 2), static_argnames="by", compiler_options=QUICK)
    for by, tiles, groups, valid in (
        ("tile", [0, 1, 2, 3], [0, 2, 2, 2], [1, 1, 1, 0]),
        ("group", [0, 1, 1, 2], [0, 1, 2, 2], [1, 0, 1, 1]),
    ):
        visits = of(np.array([2, 0, 3]), 8, 2, by=by)
        assert int(visits.n) == 4
        assert [a[:4].tolist() for a in visits[:3]] == [tiles, groups, valid]
    shared = of(np.array([3, 3, 0]), 8, 2, by="tile")  # of the tile of rows 2 and 3 each group has one
    assert int(shared.n) == 5 and shared.tile[:5].tolist() == [0, 1, 1, 2, 3]
    assert shared.group[:5].tolist() == [
        0,
        0,
        1,
        1,
        1,
    ]  # for the last tile, which is nobody's, no other matrix is fetched


def test_columns_are_split_where_vmem_has_no_room(monkeypatch):
    shape = (40, 160, 300)
    given = draw([7, 0, 30], shape=shape)
    monkeypatch.setattr(tpu, "SHARE", 0.0)  # blocks are as small as they can be
    blocks = tpu._Blocks.of(tpu.Static(), shape[0], shape[1], shape[2], 4, whole=False)
    assert (blocks.inner, blocks.columns) == (128, 128)
    check(program("tpu", True, 8)(*given), given, True, 1e-5)


def test_wrong_arguments_are_named():
    lhs, rhs, sizes, scale, _ = draw(SIZES["one row"])
    for arguments, options, words in (
        ((lhs[None], rhs, sizes), {}, r"lhs has shape \(1, 37, 24\): wanted \(rows, k\)"),
        ((lhs, rhs[0], sizes), {}, r"rhs has shape \(24, 40\)"),
        ((lhs, rhs, sizes[:0]), {}, "group_sizes has shape .*none empty"),
        ((lhs, rhs.swapaxes(1, 2), sizes), {}, r"rhs \(5, 40, 24\) and group_sizes \(5,\) do not fit"),
        ((lhs, rhs, sizes[:-1]), {}, "do not fit"),
        ((lhs, rhs.astype(jnp.bfloat16), sizes), {}, "float32 and bfloat16"),
        ((lhs, rhs, sizes.astype(np.float32)), {}, "group_sizes are float32: wanted integers"),
        ((lhs, rhs, sizes + 9), {}, "sum up to 46, the least is 9: .*at most the 37 rows"),
        ((lhs, rhs, sizes - 1), {}, "the least is -1"),
        ((lhs, rhs, sizes), {"row_scale": scale[1:]}, r"row_scale is float32 of shape \(36,\)"),
        ((lhs, rhs, sizes), {"activation": "gelu"}, "activation 'gelu' is not known: None, 'silu'"),
        ((lhs, rhs, sizes), {"tile": 0}, "tile is 0"),
    ):
        with pytest.raises(GroupError, match=words):
            grouped_matmul(*arguments, **options)
    with pytest.raises(BackendError, match="auto, reference, xla, tpu"):
        grouped_matmul(lhs, rhs, sizes, impl="cuda")
    with pytest.raises(BackendError, match="the device is cpu, no TPU"):
        grouped_matmul(lhs, rhs, sizes, impl="tpu")
    slope = jax.grad(lambda a: grouped_matmul(a, rhs, sizes, impl="xla").sum())
    with pytest.raises(DerivativeError, match="impl='reference'"):
        jax.grad(lambda a: slope(a).sum())(lhs)
