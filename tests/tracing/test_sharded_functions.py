"""shard_map and other primitives that only wrap a jaxpr are looked into, on one device and on four."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_devices import run_script
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from laws import check_laws, check_values, members, normal

import jprune
from jprune.tracing import taps
from jprune.tracing.errors import TraceError

X = normal(9, 4, 6)
PARAMS = {"a": normal(0, 6, 8), "b": normal(1, 8, 6), "c": normal(2, 6, 3)}


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def tensor_parallel(p, x, mesh, checked=True):
    """Hidden channels over "model", samples over "data"; partial sums are added over the devices."""

    def layer(a, b, x):
        return jax.lax.psum(jax.nn.relu(x @ a) @ b, "model")

    specs = (P(None, "model"), P("model"), P("data"))
    return jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=checked)(
        p["a"], p["b"], x
    ) @ p["c"]  # fmt: skip


def gathered(p, x, mesh):
    """Channels are computed in parts, then collected and given out again."""

    def layer(a, x):
        h = jax.lax.all_gather(jax.nn.relu(x @ a), "model", axis=1, tiled=True)
        h = h + jax.lax.pmax(jax.lax.stop_gradient(h), "data")
        return jax.lax.psum_scatter(h, "model", scatter_dimension=1, tiled=True)

    made = jax.shard_map(layer, mesh=mesh, in_specs=(P(None, "model"), P("data")), out_specs=P("data", "model"))
    return made(p["a"], x) @ p["b"]


def joined(p, x, mesh):
    """Parts of 3 and of 5 channels over two devices: what lies at one place of both halves goes together."""
    h = jnp.concatenate([x @ p["a"][:, :3], x @ p["a"][:, 3:]], 1)
    return jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P(None, "model"), out_specs=P(None, "model"))(h) @ p["b"]


@pytest.mark.parametrize("checked", [True, False])
def test_one_shard_is_the_function_itself(checked):
    graph = check_laws(lambda p, x: tensor_parallel(p, x, mesh(1, 1), checked), PARAMS, (X,))
    assert members(graph, "a:1") == {("a", 1), ("b", 0)} and members(graph, "b:1") == {("b", 1), ("c", 0)}
    assert graph.cost().macs == 4 * 6 * 8 * 2 + 4 * 6 * 3
    assert {t.primitive for t in graph.taps.values()} == {"dot_general"} and set(graph.taps) == {"a", "b", "c"}
    stats = graph.calibrate(PARAMS, [X], {"squares": taps.sum_of_squares()}, ["b"])
    np.testing.assert_allclose(stats["b"]["squares"], (jax.nn.relu(X @ PARAMS["a"]) ** 2).sum(0), rtol=1e-5)
    # the batch is free
    keep = {"a:1": np.arange(8) < 5}
    more = normal(8, 7, 6)
    got = jax.jit(graph.replay(keep))(graph.compact(PARAMS, keep), more)
    np.testing.assert_allclose(got, tensor_parallel(graph.mask(PARAMS, keep), more, mesh(1, 1)), rtol=1e-5, atol=1e-6)


def test_collectives_of_one_device():
    check_values(lambda p, x: gathered(p, x, mesh(1, 1)), PARAMS, (X,))


SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import jax, numpy as np
import test_sharded_functions as t
from laws import check_laws, check_values
import jprune

assert jax.device_count() == 4
mesh = t.mesh(2, 2)
graph = check_laws(lambda p, x: t.tensor_parallel(p, x, mesh), t.PARAMS, (t.X,))
check_values(lambda p, x: t.tensor_parallel(p, x, mesh, False), t.PARAMS, (t.X,))
other = check_values(lambda p, x: t.gathered(p, x, mesh), t.PARAMS, (t.X,))
check_values(lambda p, x: t.joined(p, x, mesh), t.PARAMS, (t.X,))
replay = graph.replay({"a:1": np.arange(4) < 2})
try:
    replay(graph.compact(t.PARAMS, {"a:1": np.arange(4) < 2}), t.normal(0, 6, 6))
    batch = "taken"
except jprune.TraceError as e:
    batch = str(e)
try:
    graph.calibrate(t.PARAMS, [t.X], {"mean": t.taps.mean()}, ["c"])
    taps = "c is outside"
except jprune.TraceError as e:
    taps = str(e)
print(json.dumps({
    "units": next(m for m in graph.groups["a:1"].members if m.path == "a").positions.tolist(),
    "other": {g: i.size for g, i in other.groups.items()},
    "macs": graph.cost().macs, "batch": batch, "taps": taps,
    "reason": str(graph.leaves["a"].frozen[1].code)}))
"""


def test_units_of_a_sharded_axis_are_positions_of_every_shard():
    here = Path(__file__).parent
    result = run_script(SCRIPT, here, here.parent)
    assert result["units"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert result["other"]["a:1"] == 4 and result["reason"] == "SHARDED"
    assert result["macs"] == 4 * 6 * 8 * 2 + 4 * 6 * 3  # once per real work, whichever device does it
    assert "trace again with the new size" in result["batch"] and result["taps"] == "c is outside"


def test_a_shard_that_cuts_through_parts_is_refused_by_name():
    """Three heads of two channels over two devices: half a head is no unit."""
    two = AbstractMesh((2,), ("model",))
    params = {"a": normal(0, 6, 3, 2), "c": normal(2, 6, 3)}

    def f(p, x):
        h = jnp.einsum("be,ehd->bhd", x, p["a"]).reshape(-1, 6)
        return jax.shard_map(jax.nn.relu, mesh=two, in_specs=P(None, "model"), out_specs=P(None, "model"))(h) @ p["c"]

    graph = jprune.trace(f, params, X)
    assert not graph.groups and graph.leaves["a"].frozen[1].code == "SHARDED"


def test_statistics_inside_several_shards_are_refused_by_name():
    two = AbstractMesh((2,), ("model",))

    def f(p, x):
        return jax.shard_map(lambda a, x: x @ a, mesh=two, in_specs=(P(), P("model")), out_specs=P("model"))(p["a"], x)

    with pytest.raises(TraceError, match=r"shard_map over 2 devices.*'a'"):
        jprune.trace(f, PARAMS, X).calibrate(PARAMS, [X], {"mean": taps.mean()})


# -- other wrappers ---------------------------------------------------------------------------------------------------


@jax.custom_batching.custom_vmap
def custom(h):
    return jax.nn.relu(h)


@custom.def_vmap
def _(n, batched, h):
    return 2 * jax.nn.relu(h), True  # twice as much, to tell it apart


composed = jax.lax.composite(jax.nn.relu, name="tests.relu")


@pytest.mark.parametrize(
    ("wrap", "scale"),
    [(custom, 1), (jax.vmap(custom), 2), (composed, 1)],
    ids=["custom_vmap", "its own vmap", "composite"],
)
def test_wrappers_are_looked_into(wrap, scale):
    def f(p, x):
        return wrap(x @ p["a"]) @ p["b"] @ p["c"]

    graph = check_values(f, PARAMS, (X,))
    assert members(graph, "a:1") == {("a", 1), ("b", 0)} and graph.groups["a:1"].exact and not graph.unsupported
    want = scale * jax.nn.relu(X @ PARAMS["a"]) @ PARAMS["b"] @ PARAMS["c"]
    np.testing.assert_allclose(graph.dense(PARAMS, X), want, rtol=1e-5, atol=1e-6)


def test_where_an_equation_is_computed_is_kept():
    from jax.experimental.compute_on import compute_on

    def f(p, x):
        with compute_on("device_host"):
            h = jax.nn.relu(x @ p["a"])
        return h @ p["b"]

    graph = jprune.trace(f, PARAMS, X)
    keep = {"a:1": np.arange(8) < 5}
    small = graph.compact(PARAMS, keep)
    for g, p in ((f, PARAMS), (graph.replay(keep), small)):
        assert "_xla_compute_type" in jax.jit(g).lower(p, X).as_text()
