"""The laws that every traced function has to obey, checked on a keep set; shared by the tests of the core."""

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from jprune.tracing.paths import flatten


def normal(seed, *shape):
    """Normal weights scaled by the first axis."""
    return on_device(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0]))


def on_device(x, dtype=np.float32):
    """The jax array of a numpy one; jnp.asarray would compile a program for every new shape."""
    return jax.device_put(np.asarray(x).astype(dtype))


def members(graph, group):
    """{(leaf, axis)} of a group."""
    return {(m.path, m.axis) for m in graph.groups[group].members}


def lively(tree, seed=0):
    """Variables whose signals neither die nor explode: kernels He-scaled, scales and variances near 1, shifts 0.4 N."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = str(getattr(path[-1], "key", path[-1])).strip("'\".[]")
        if name in ("scale", "var") or name.startswith("scale"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif len(leaf.shape) <= 1 or name in ("bias", "mean"):
            value = 0.4 * rng.normal(size=leaf.shape)
        else:
            fan = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) == 4 else leaf.shape[-2]
            value = rng.normal(size=leaf.shape) * np.sqrt(2.0 / max(fan, 1))
        return on_device(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def subset(graph, rng, groups=None, exact=True, least=0.3, most=0.8):
    """A random proper keep set over the exact groups."""
    keep = {}
    for g, info in graph.groups.items():
        if (groups is not None and g not in groups) or (exact and not info.exact) or info.size < 2:
            continue
        k = int(np.clip(round(rng.uniform(least, most) * info.size), 1, info.size - 1))
        if info.layers is None:
            keep[g] = rng.permutation(info.size) < k
        else:
            keep[g] = np.stack([rng.permutation(info.size) < k for _ in range(info.layers)])
    return keep


def relative(a, b):
    """Largest difference over the largest entry of b, over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    scale = max(float(np.abs(np.asarray(y, np.float64)).max(initial=0)) for _, y in pairs)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x, _ in pairs)
    return (
        max(float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max(initial=0)) for x, y in pairs)
        / scale
    )


def same_numbers(got, want, terms):
    """Assert that two programs computed the same float32 numbers, of which each is a sum of `terms` products.

    The compiler orders and fuses sums as it likes, on another processor or another release in another way. Equal bits
    are therefore asked for only where one program ran twice or where nothing was computed: slices, copies, masks,
    integers, what was written and read back. Everything else comes here: roundings of n float32 terms add up to about
    eps sqrt(n), and 4 eps sqrt(n) of the largest entry is allowed. `terms` counts what lies behind one output, over all
    layers in a row: two layers of width 32 make 64.
    """
    assert relative(got, want) <= 4 * np.finfo(np.float32).eps * np.sqrt(terms)


def check_laws(
    fn, params, inputs, keep=None, *, graph=None, tolerance=1e-5, gradients=True, alive=1e-2, stacked="pad", seed=0
):
    """Laws 1 to 3 and what follows from them; returns the graph.

    1: replay(keep)(compact) == fn(mask). 2: every axis of every leaf is in a group or has a reason. 3: cost(keep) is
    the cost of the compacted function. Besides: masking matters (else the test proves nothing), expand undoes compact,
    keeping everything is the identity, the plan repeats the slices, gradients are the sliced gradients.
    """
    graph = graph or jprune.trace(fn, params, *inputs)
    every_axis_is_accounted_for(graph)
    keep = subset(graph, np.random.default_rng(seed)) if keep is None else keep
    assert keep, graph.explain()
    masked = graph.mask(params, keep)
    decision = graph.decide(keep, stacked=stacked)
    small, run = graph.compact(params, decision), graph.replay(decision)
    whole = jax.jit(fn)
    want = whole(masked, *inputs)
    got = jax.jit(run)(small, *inputs)
    assert relative(got, want) <= tolerance, graph.explain()
    if alive:
        assert relative(whole(params, *inputs), want) > alive, "masking changes nothing: the test is blind"

    back = graph.expand(small, decision)
    for (path, a), (_, b) in zip(flatten(back), flatten(masked), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)

    everything = {g: np.ones(i.shape, bool) for g, i in graph.groups.items()}
    for (path, a), (_, b) in zip(
        flatten(graph.compact(params, graph.decide(everything, allow_inexact=True))), flatten(params), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert relative(jax.jit(graph.dense)(params, *inputs), whole(params, *inputs)) <= tolerance

    if stacked == "pad":
        again = jprune.trace(run, small, *inputs, is_param=lambda p: graph.leaves[p].is_param)
        assert (again.cost().macs, again.cost().params) == (graph.cost(keep).macs, graph.cost(keep).params)
        assert again.cost().bytes == graph.cost(keep).bytes
        planned = graph.plan(keep).apply(params)
        for (path, a), (_, b) in zip(flatten(planned), flatten(small), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)
        if gradients:
            gradient_is_the_sliced_gradient(graph, fn, run, params, masked, small, keep, inputs, tolerance)
    return graph


def check_values(fn, params, inputs, keep=None, *, graph=None, tolerance=1e-5, alive=1e-3, seed=0, **allow):
    """Laws 1 to 3 evaluated equation by equation, with no compilation of whole functions; returns the graph."""
    graph = graph or jprune.trace(fn, params, *inputs)
    every_axis_is_accounted_for(graph)
    keep = subset(graph, np.random.default_rng(seed)) if keep is None else keep
    assert keep, graph.explain()
    small, run = graph.compact(params, keep, verify=None, **allow), graph.replay(keep, **allow)
    want = fn(graph.mask(params, keep), *inputs)
    assert relative(run(small, *inputs), want) <= tolerance, graph.explain()
    if alive:
        assert relative(fn(params, *inputs), want) > alive, "masking changes nothing: the test is blind"
    again = jprune.trace(run, small, *inputs, is_param=lambda p: graph.leaves[p].is_param)
    assert again.cost() == graph.cost(keep)
    return graph


def gradient_is_the_sliced_gradient(graph, fn, run, params, masked, small, keep, inputs, tolerance):
    """d/d small of the pruned function is the slice of d/d masked of the whole one."""

    def loss(f):
        return lambda p: sum((jnp.asarray(y, jnp.float32) ** 2).sum() for y in jax.tree.leaves(f(p, *inputs)))

    whole = graph.compact(jax.jit(jax.grad(loss(fn)))(masked), keep, verify=None)
    assert relative(jax.jit(jax.grad(loss(run)))(small), whole) <= 10 * tolerance


def every_axis_is_accounted_for(graph):
    """Law 2: an axis longer than 1 belongs to groups, or says why not."""
    for leaf in graph.leaves.values():
        for axis, layout in enumerate(leaf.layouts):
            if leaf.shape[axis] > 1 and axis != leaf.layer_axis:
                has_group = any(
                    m.path == leaf.path and m.axis == axis for g in graph.groups.values() for m in g.members
                )
                assert has_group or leaf.frozen[axis] is not None, (leaf.path, axis, layout)
