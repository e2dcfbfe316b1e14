"""The laws over thousands of small random programs of indexing, experts, wrappers and empty groups.

They are evaluated with numpy (nothing is compiled); a failure names the seed and the steps, and
`check(seed)` repeats it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from laws import every_axis_is_accounted_for
from numpy_jaxpr import run

import jprune

ROWS, WIDTHS = 4, (4, 6, 8)
MESH = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
relu = jax.custom_batching.custom_vmap(lambda h: jnp.maximum(h, 0.0))
relu.def_vmap(lambda n, batched, h: (jnp.maximum(h, 0.0), True))


class Program:
    """A random function of (params, x (rows, 5), ids (rows,), sizes (2,)) and its parameters."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params, self.steps, self.widths, self.names = {}, [], [5], []
        self.add(0, "dense")
        for _ in range(self.rng.integers(2, 6)):
            i = max(1, len(self.widths) - 1 - int(self.rng.integers(0, 3)))
            self.add(i, str(self.rng.choice(KINDS)))
        w = self.new(self.widths[-1], 3)
        final = str(self.rng.choice(["product", "squares"]))
        self.names.append(final)
        self.head = (lambda p, v: v @ p[w]) if final == "product" else (lambda p, v: (v * v).sum(-1))

    def new(self, *shape):
        name = f"w{len(self.params)}"
        self.params[name] = (self.rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)).astype("f4")
        return name

    def add(self, i, kind):
        made = STEPS[kind](self, self.widths[i])
        if made is None:
            return
        step, width = made
        self.names.append(f"{kind} of {i}")
        self.steps.append((i, step))
        self.widths.append(width)

    def __call__(self, p, x, ids, sizes):
        values = [x]
        for i, step in self.steps:
            values.append(step(p, values[i], ids, sizes, values))
        return self.head(p, values[-1])


def dense(g, w):
    n, act = int(g.rng.choice(WIDTHS)), [jnp.tanh, jax.nn.relu, jax.nn.sigmoid, lambda h: h][g.rng.integers(4)]
    k, b = g.new(w, n), g.new(n)
    return lambda p, v, *_: act(v @ p[k] + p[b]), n


def indexed(g, w, at):
    how = g.rng.integers(4)
    if how == 0:
        return lambda p, v, *_: v[:, at], len(at)
    if how == 1:
        return lambda p, v, *_: jnp.take(v, jnp.asarray(at), axis=1), len(at)
    if how == 2:
        return lambda p, v, *_: jax.vmap(lambda r: r[at - w])(v), len(at)
    return lambda p, v, *_: v.at[:, at].get(mode="fill", fill_value=2.0), len(at)


def residual(g, w):
    at = g.rng.permutation(w)
    return lambda p, v, *_: v + jnp.tanh(v)[:, at], w


def joined(g, w):
    j = int(g.rng.integers(1, len(g.widths)))
    if g.widths[j] == w and g.rng.random() < 0.5:
        return lambda p, v, ids, sizes, values: v * values[j] if w % 4 else v + values[j], w
    return lambda p, v, ids, sizes, values: jnp.concatenate([values[j], v], 1), w + g.widths[j]


def gate(g, w):
    if w % 2:
        return None
    if g.rng.random() < 0.5:
        return lambda p, v, *_: jnp.tanh(v[:, ::2]) * v[:, 1::2], w // 2
    even, odd = jnp.arange(w // 2) * 2, jnp.arange(w // 2) * 2 + 1
    return lambda p, v, *_: jnp.tanh(v[:, even]) * v[:, odd], w // 2


def strided(g, w):
    lo, step = int(g.rng.integers(0, 2)), int(g.rng.integers(2, 4))
    return lambda p, v, *_: v[:, lo::step], len(range(lo, w, step))


def looked_up(g, w):
    t, fill = g.new(3, w), float(g.rng.choice([0.0, 1.0]))
    how = g.rng.integers(3)
    if how == 0:
        return lambda p, v, ids, *_: v + jax.vmap(lambda i: p[t][i])(ids), w
    if how == 1:
        return lambda p, v, ids, *_: v * p[t].at[ids + 1].get(mode="fill", fill_value=fill), w
    return lambda p, v, ids, *_: v + jax.vmap(lambda i: lax.dynamic_slice(p[t], (i, 0), (2, w)).sum(0))(ids), w


def written(g, w):
    how = g.rng.integers(3)
    if how == 0:
        return lambda p, v, ids, *_: v + jnp.zeros((ROWS, w)).at[ids].add(v), w
    if how == 1:
        return lambda p, v, ids, *_: jax.vmap(
            lambda h, i: lax.dynamic_update_slice(jnp.zeros((3, w)), h[None], (i, 0)))(v, ids).sum(1), w  # fmt: skip
    return lambda p, v, ids, *_: jax.vmap(lambda h, i: jnp.ones((3, w)).at[i].multiply(h))(v, ids)[:, 1], w


def watched(g, w):
    def step(p, v, *_):
        jax.debug.callback(lambda h: None, v)
        jax.debug.print("{}", v.max()) if w == 6 else None
        return v

    return step, w


def experts(g, w):
    h, n = int(g.rng.choice(WIDTHS)), int(g.rng.choice(WIDTHS))
    up, down = g.new(2, w, h), g.new(2, h, n)
    return lambda p, v, ids, sizes, _: lax.ragged_dot(jnp.tanh(lax.ragged_dot(v, p[up], sizes)), p[down], sizes), n


def wrapped(g, w):
    if g.rng.random() < 0.5:
        return lambda p, v, *_: jax.vmap(relu)(v), w
    k = g.new(w, 6)
    return lambda p, v, *_: jax.shard_map(
        lambda a, x: jnp.tanh(x @ a), mesh=MESH, in_specs=(P(), P("d")), out_specs=P("d"))(p[k], v), 6  # fmt: skip


def along_rows(g, w):
    return [
        lambda p, v, *_: lax.top_k(v, ROWS, axis=0)[0],
        lambda p, v, *_: lax.cumsum(v, 0),
        lambda p, v, *_: jax.nn.softmax(v, axis=0),
        lambda p, v, *_: v[::-1],
        lambda p, v, *_: v[np.array([2, 0, 1, 1])],
    ][g.rng.integers(5)], w


def heads(g, w):
    q, k = g.new(w, 8), g.new(w, 4)
    at = [np.arange(4) // 2, np.arange(4) % 2, g.rng.integers(0, 2, 4)][g.rng.integers(3)]

    def step(p, v, *_):
        query, key = jnp.tanh(v @ p[q]).reshape(ROWS, 4, 2), (v @ p[k]).reshape(ROWS, 2, 2)
        return (query * key[:, at]).reshape(ROWS, 8)

    return step, 8


def convolved(g, w):
    depthwise = g.rng.random() < 0.5 or w % 2
    k = g.new(3, 1, w) if depthwise else g.new(3, w // 2, w)
    n = w if depthwise else 2

    def step(p, v, *_):
        return lax.conv_general_dilated(
            v[None], p[k], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=n)[0]  # fmt: skip

    return step, w


def layers(g, w):
    up, down, at = g.new(2, w, 8), g.new(2, 4, w), g.rng.permutation(4)
    ordered = g.rng.random() < 0.5

    def step(p, v, *_):
        def layer(h, k):
            y = h @ k[0]
            z = jnp.tanh(y[:, ::2]) * y[:, 1::2]
            return h + (z[:, at] if ordered else z) @ k[1], None

        return lax.scan(layer, v, (p[up], p[down]))[0]

    return step, w


STEPS = {
    "dense": dense,
    "permutation": lambda g, w: indexed(g, w, g.rng.permutation(w)),
    "choice": lambda g, w: indexed(g, w, g.rng.integers(0, w, int(g.rng.choice(WIDTHS)))),
    "repeat": lambda g, w: indexed(g, w, np.arange(2 * w) // 2) if w < 9 else None,
    "tile": lambda g, w: indexed(g, w, np.arange(2 * w) % w) if w < 9 else None,
    "reverse": lambda g, w: (lambda p, v, *_: jnp.flip(v, 1), w),
    "roll": lambda g, w: (lambda p, v, *_: jnp.roll(v, 1 + w // 3, axis=1), w),
    "pad": lambda g, w: (lambda p, v, *_: jnp.pad(v[:, 1:], ((0, 0), (0, 1)), constant_values=float(w % 4 > 0)), w),
    "residual": residual,
    "joined": joined,
    "gate": gate,
    "strided": strided,
    "looked up": looked_up,
    "written": written,
    "watched": watched,
    "experts": experts,
    "wrapped": wrapped,
    "along rows": along_rows,
    "heads": heads,
    "convolved": convolved,
    "layers": layers,
    "normalised": lambda g, w: (lambda p, v, *_: v * lax.rsqrt((v * v).mean(-1, keepdims=True) + 1e-3), w),
}
KINDS = [k for k in STEPS if k != "dense"] + ["dense"] * 4


def choose(graph, rng):
    """A random keep set over the exact groups; some lose everything."""
    keep = {}
    for g, i in graph.groups.items():
        if i.exact and rng.random() < 0.8:
            k = rng.random(i.shape) < rng.uniform(0.3, 0.9)
            if rng.random() > 0.1:
                k[..., rng.integers(i.size)] = True
            keep[g] = k
    return keep


def masked(graph, params, keep):
    """Zeros at the positions that the removed units own, written down with numpy."""
    out = {n: v.copy() for n, v in params.items()}
    for g, k in keep.items():
        for m in graph.groups[g].members:
            leaf = np.moveaxis(out[m.path], m.axis, -1)
            for layer in range(len(k)) if k.ndim == 2 else [None]:
                gone = m.positions[~(k if layer is None else k[layer])].ravel()
                if layer is None:
                    leaf[..., gone] = 0
                else:  # the layers come first here
                    leaf[layer, ..., gone] = 0
    return out


def check(seed):
    """Laws 1 to 3 of one random program; returns how many units it was decided about."""
    program = Program(seed)
    rng = np.random.default_rng(seed)
    inputs = (rng.normal(size=(ROWS, 5)).astype("f4"), rng.integers(0, 3, ROWS).astype("i4"), np.array([3, 1], "i4"))
    where = f"seed {seed}: {', '.join(program.names)}"
    try:
        graph = jprune.trace(program, program.params, *inputs)
        every_axis_is_accounted_for(graph)
        keep = choose(graph, rng)
        small = graph.compact(program.params, graph.decide(keep, allow_empty=True), verify=None)
        replay = graph.replay(graph.decide(keep, allow_empty=True))
        with np.errstate(all="ignore"):
            (got,) = run(replay, small, *inputs)
            (want,) = run(program, masked(graph, program.params, keep), *inputs)
        again = jprune.trace(replay, small, *inputs).cost()
    except Exception as e:
        raise AssertionError(where) from e
    scale = max(float(np.abs(want).max()), 1e-3)
    assert np.isfinite(want).all() and float(np.abs(got - want).max()) <= 1e-4 * scale, (where, keep, got, want)
    assert again == graph.cost(keep), (where, again, graph.cost(keep))
    return sum(i.size for g, i in graph.groups.items() if g in keep)


def test_random_programs_of_indexing_obey_the_laws():
    assert sum(check(seed) > 3 for seed in range(32)) > 20  # and most of them have something to prune


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_two_thousand_programs_of_indexing_obey_the_laws(part):
    seeds = range(800 + 250 * part, 1050 + 250 * part)
    assert sum(check(seed) > 3 for seed in seeds) > 150
