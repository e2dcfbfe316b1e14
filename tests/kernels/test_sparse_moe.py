"""Every implementation of the mixture of experts against float64 numpy, closed forms, and what must not matter.

Flags are data: one program of an implementation holds all densities.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from moe_oracle import draw, moe, same
from quick import QUICK

from pallas_kernels.sparse_moe import (
    BackendError,
    DerivativeError,
    MoEError,
    arg_specs,
    permute_pairs,
    permuted_moe,
    tile_activity,
    tile_moe,
    union_moe,
)

T, E, D, F = 37, 5, 24, 64
WAYS = {
    "reference": {},
    "xla": {"tile": 4},
    "tpu": {"tile": 16},
    "permuted xla": {"tile": 4},
    "permuted tpu": {"tile": 16},
}
FEW = ["xla", "tpu"]
SPARSE = [way for way in WAYS if way != "reference"]
FLAGS = {
    "none": lambda a: a & False,
    "one pair": lambda a: (np.arange(T) == 20)[:, None] & (np.arange(E) == 3),
    "some": lambda a: a,
    "one expert nobody uses": lambda a: a & (np.arange(E) != 2),
    "no token of a tile": lambda a: a & ((np.arange(T) < 8) | (np.arange(T) >= 16))[:, None],
    "all": lambda a: a | True,
}


def options(way):
    impl = way.removeprefix("permuted ")
    return {"impl": impl, "interpret": impl == "tpu", **WAYS[way]}


def layer(way):
    return permuted_moe if "permuted" in way else tile_moe


@functools.cache
def trained(way, **more):
    """Jitted (x, scores, active, up, down, cotangent) -> (y, (dx, dscores, dup, ddown))."""

    def run(x, scores, active, up, down, dy):
        config = options(way) | more | ({"tile": 256} if len(x) > T and "permuted" not in way else {})
        y, back = jax.vjp(lambda *a: layer(way)(*a[:2], active, *a[2:], **config), x, scores, up, down)
        return y, back(dy)

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def decoded(way):
    return jax.jit(lambda *a: union_moe(*a, impl=way, interpret=way == "tpu"), compiler_options=QUICK)


def problem(flags="some", seed=0, tokens=T, width=D, hidden=F, dtype=np.float32):
    x, scores, active, up, down, dy = draw(seed, tokens, E, width, hidden, 0.2, dtype)
    active = FLAGS[flags](active)
    if tokens > T:
        active[:128, 1], active[128:256, 3] = False, False
    scores = np.where(active, np.where(scores == 0, 0.7, scores), 0).astype(np.float32)
    scores[::7] *= 0  # a score of 0 is one that may be learnt
    return x, scores, active, up, down, dy


def check(got, given, tolerance):
    y, grads = moe(*given)
    same(got[0], y, tolerance)
    for ours, wanted in zip(got[1], grads, strict=True):
        same(ours, wanted, 2 * tolerance)
    unused = ~given[2].any(0)
    assert not np.asarray(got[1][1])[~given[2]].any()
    assert not any(np.asarray(w)[unused].any() for w in got[1][2:])
    assert [a.dtype for a in (got[0], *got[1])] == [given[i].dtype for i in (0, 0, 1, 3, 4)]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("way", ["reference", *SPARSE])
def test_values_and_all_four_gradients(way, flags):
    given = problem(flags)
    assert (given[1] < 0).any() or flags in ("none", "one pair")
    check(trained(way)(*given), given, 1e-5)


@pytest.mark.parametrize("way", SPARSE)
def test_gradients_are_those_that_jax_derives_of_the_dense_form(way):
    given = problem(seed=4)
    for ours, wanted in zip(jax.tree.leaves(trained(way)(*given)), jax.tree.leaves(trained("reference")(*given))):
        same(ours, wanted, 1e-5)


@pytest.mark.parametrize("way", ["xla", "tpu", "permuted xla"])
def test_hidden_numbers_that_are_kept_save_products(way):
    """Of 37 tokens in tiles of 16 some tiles use no expert, and one expert is used by more than half of the tokens."""
    run = trained(way, save_hidden=True)
    for flags in ("none", "no token of a tile", "all"):  # the last has no room for all pairs where they are sorted
        given = problem(flags)
        check(run(*given), given, 1e-5)
    kept, again = (str(f.trace(*given).jaxpr).count("dot_general[") for f in (run, trained(way)))
    branches = 2 if way == "xla" else 1  # few tokens of an expert, or all
    assert again - kept == branches * (3 if way == "tpu" else 1)


@pytest.mark.parametrize("way", ["reference", *SPARSE])
def test_bfloat16(way):
    """On a TPU with whole parts of tiles that skip an expert, and as many hidden units as lanes."""
    sizes = {"tokens": 300, "width": 150, "hidden": 128} if way == "tpu" else {}
    given = problem(seed=1, dtype=jnp.bfloat16, **sizes)
    if way == "tpu":
        used = tile_activity(given[2], 256, 128)[0]
        assert (used[0] != used[1]).any(), "no part skips anything"
    check(trained(way)(*given), given, 2e-2)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("way", ["reference", *FEW])
def test_union(way, flags):
    *given, _ = problem(flags, seed=2)
    y = decoded(way)(*given)
    same(y, moe(*given), 1e-5)
    assert not np.asarray(y)[~given[2].any(1)].any()


@pytest.mark.parametrize("way", ["reference", *SPARSE])
def test_weights_of_experts_that_nobody_uses_are_not_read(way):
    x, scores, active, up, down, dy = problem("one expert nobody uses", seed=3)

    def run():
        few = decoded(way)(x, scores, active, up, down) if "permuted" not in way else ()
        return jax.tree.leaves((trained(way)(x, scores, active, up, down, dy), few))

    clean = run()
    up[2], down[2] = np.nan, np.inf
    scores = np.where(active, scores, 9)  # nor scores of pairs that are not active
    for ours, wanted in zip(run(), clean, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_a_union_copies_no_weights():
    run = jax.jit(lambda *a: union_moe(*a, impl="xla"), compiler_options=QUICK)
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw(0, 4, 64, 32, 16)[:5]]
    weights = given[3].size * given[3].dtype.itemsize
    assert run.lower(*given).compile().memory_analysis().temp_size_in_bytes < weights / 4


@pytest.mark.parametrize("way", FEW)
def test_a_token_of_a_union_has_the_same_bits_whoever_is_beside_it(way):
    """Without which a draft that is verified in one chunk could end otherwise than token by token."""
    x, scores, active, up, down, _ = (a[:8] if i < 3 else a for i, a in enumerate(problem(seed=5)))
    together = np.asarray(decoded(way)(x, scores, active, up, down))
    for t in range(8):
        alone = np.arange(8)[:, None] == 7 - t  # at another place too
        others = [np.where(alone, np.roll(a, 7 - 2 * t, 0), 0).astype(a.dtype) for a in (x, scores, active)]
        np.testing.assert_array_equal(np.asarray(decoded(way)(*others, up, down))[7 - t], together[t])


@pytest.mark.parametrize("run", [tile_moe, union_moe, permuted_moe])
def test_wrong_arguments_are_named(run):
    x, scores, active, up, down, _ = problem()
    for arguments, words in (
        ((x[:-1], scores, active, up, down), r"scores has shape \(37, 5\): wanted \(36, 5\)"),
        ((x, scores, active[:, :-1], up, down), r"active has shape \(37, 4\): wanted \(37, 5\)"),
        ((x, scores, active, up.swapaxes(1, 2), down), r"up has shape \(5, 64, 24\): wanted \(5, 24, 24\)"),
        ((x, scores, active, up, up), r"down has shape \(5, 24, 64\): wanted \(5, 64, 24\)"),
        ((x[None], scores, active, up, down), "wanted 2 axes"),
        ((x[:0], scores, active, up, down), "none empty"),
        ((x, scores, scores, up, down), "active is float32: wanted bool"),
        ((x, active, active, up, down), "scores are bool"),
        ((x, scores, active, up.astype(jnp.bfloat16), down), "one floating type"),
    ):
        with pytest.raises(MoEError, match=words):
            run(*arguments)
    with pytest.raises(BackendError, match=r"'cuda' is no implementation of a .*: auto, reference, xla, tpu"):
        run(x, scores, active, up, down, impl="cuda")


@pytest.mark.parametrize("way", ["permuted xla", "permuted tpu"])
def test_no_pair_is_lost_where_there_is_no_room(way):
    """One program: with room for all pairs it sorts, with one pair more it loops, and both mean the same."""
    x, scores, active, up, down, dy = problem("all", seed=6)
    room = 40

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x, scores, active, up, down, dy):
        y, back = jax.vjp(
            lambda *a: permuted_moe(*a[:2], active, *a[2:], capacity=room, **options(way)), x, scores, up, down
        )
        return y, back(dy), permute_pairs(active, scores, room)

    for pairs in (room, room + 1, active.size):
        used = active & (np.cumsum(active.T) <= pairs).reshape(E, T).T
        given = x, np.where(used, scores, 0).astype(np.float32), used, up, down, dy
        *got, listed = run(*given)
        assert bool(listed.overflow) == (pairs > room) and listed.group_sizes.sum() == min(pairs, room)
        check(got, given, 1e-5)


def test_pairs_are_sorted_by_expert_and_then_by_token():
    _, scores, active, *_ = problem(seed=7)
    pairs = permute_pairs(active, scores, active.size)
    experts, tokens = np.nonzero(active.T)
    np.testing.assert_array_equal(pairs.group_sizes, active.sum(0))
    np.testing.assert_array_equal(pairs.row_token[: len(tokens)], tokens)
    np.testing.assert_array_equal(pairs.row_score[: len(tokens)], scores[tokens, experts])
    assert not np.asarray(pairs.row_score[len(tokens) :]).any() and not pairs.overflow


def test_what_cannot_be_asked_for():
    x, scores, active, up, down, _ = problem()
    with pytest.raises(MoEError, match="tile is 0"):
        tile_moe(x, scores, active, up, down, tile=0)
    with pytest.raises(MoEError, match="capacity is 0: wanted a number of pairs"):
        permuted_moe(x, scores, active, up, down, capacity=0)
    twice = [np.concatenate([a, a]) for a in (x, scores, active)]
    with pytest.raises(MoEError, match="74 tokens, more than 64: use tile_moe"):
        union_moe(*twice, up, down)
    with pytest.raises(DerivativeError, match="use tile_moe"):
        jax.grad(lambda x: union_moe(x, scores, active, up, down).sum())(x)
    slope = jax.grad(lambda x: tile_moe(x, scores, active, up, down, impl="xla").sum())
    with pytest.raises(DerivativeError, match="impl='reference'"):
        jax.grad(lambda x: slope(x).sum())(x)


@pytest.mark.parametrize(("chip", "width", "room"), [("TPU v5e", 16384, "76.8"), ("TPU v5p", 8192, "38.4")])
@pytest.mark.parametrize("run", [tile_moe, union_moe])
def test_a_layer_that_vmem_has_no_room_for_is_refused_by_name(run, chip, width, room):
    spec = arg_specs.MoESpec("too wide", "no model", width, hidden=1024, experts=4, tokens=64)
    device = AbstractDevice(device_kind=chip, num_cores=1, platform="tpu")
    with (
        use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
        pytest.raises(BackendError, match=rf"{width} x 1024 with tiles of 64 tokens need .* MB of VMEM of {room}"),
    ):
        jax.eval_shape(functools.partial(run, impl="tpu"), *spec.arrays)


def test_no_kernel_runs_where_there_is_no_tpu():
    with pytest.raises(BackendError, match="the device is cpu, no TPU"):
        tile_moe(*problem()[:5], impl="tpu")
    with jax.enable_x64(True), pytest.raises(BackendError, match="float64, not float32 or bfloat16"):
        tile_moe(*problem(dtype=np.float64)[:5], impl="tpu", interpret=True)


def test_what_auto_takes_is_said(caplog):
    from pallas_kernels.common import backends

    backends._say_once.cache_clear()
    with caplog.at_level("INFO", logger="pallas_kernels.common.backends"):
        tile_moe(*problem()[:5])
        union_moe(*problem()[:5])
        permuted_moe(*problem()[:5])
    assert [r.getMessage() for r in caplog.records] == [
        "a block-sparse mixture of experts runs on plain XLA", "a union of experts runs on plain XLA",
        "a permuted mixture of experts runs on plain XLA"]  # fmt: skip
