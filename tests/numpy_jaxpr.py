"""Evaluates a jaxpr with numpy: nothing is compiled, so that thousands of small functions can be compared."""

import jax
import numpy as np
from jax.extend import core as jex

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
         "custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call", "shard_map": "jaxpr", "remat2": "jaxpr",
         "checkpoint": "jaxpr"}  # fmt: skip


def run(fn, *args):
    """The outputs of `fn(*args)` as numpy arrays, flattened."""
    closed = jax.make_jaxpr(fn)(*args)
    return evaluate(closed.jaxpr, closed.consts, [np.asarray(x) for x in jax.tree.leaves(args)])


def evaluate(jaxpr, consts, args):
    if hasattr(jaxpr, "jaxpr"):
        jaxpr, consts = jaxpr.jaxpr, jaxpr.consts
    env = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(v):
        return np.asarray(v.val, v.aval.dtype) if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outs = apply(eqn, [read(v) for v in eqn.invars])
        for var, x in zip(eqn.outvars, outs, strict=True):
            assert x.shape == var.aval.shape, (eqn, x.shape)
            env[var] = x.astype(var.aval.dtype, copy=False)
    return [read(v) for v in jaxpr.outvars]


def apply(eqn, args):
    name, p = eqn.primitive.name, eqn.params
    if not eqn.outvars:
        return []
    if name in CALLS:
        return evaluate(p[CALLS[name]], (), args)
    if name == "scan":
        return scan(eqn, args)
    if name in ONE:
        return [np.asarray(ONE[name](*args))]
    if name in WITH:
        return [np.asarray(WITH[name](p, *args))]
    out = eqn.primitive.bind(*args, **p)  # a primitive that is rare
    return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]


def scan(eqn, args):
    body = eqn.params["jaxpr"]
    inner = [len(v.aval.shape) for v in getattr(body, "jaxpr", body).invars]
    stacked = sum(x.ndim != n for x, n in zip(args, inner, strict=True))
    outs = getattr(body, "jaxpr", body).outvars
    carried = sum(len(v.aval.shape) == len(o.aval.shape) for v, o in zip(outs, eqn.outvars, strict=True))
    split = len(args) - stacked
    consts, carry, xs = args[: split - carried], args[split - carried : split], args[split:]
    assert not eqn.params["reverse"]
    ys = []
    for i in range(eqn.params["length"]):
        out = evaluate(body, (), [*consts, *carry, *(x[i] for x in xs)])
        carry = out[:carried]
        ys.append(out[carried:])
    return [*carry, *(np.stack(y) for y in zip(*ys, strict=True))]


def dot(p, a, b):
    (ca, cb), (ba, bb) = p["dimension_numbers"]
    i, j = list(range(a.ndim)), [100 + k for k in range(b.ndim)]
    for x, y in (*zip(ca, cb, strict=True), *zip(ba, bb, strict=True)):
        j[y] = i[x]
    names = {n: k for k, n in enumerate(dict.fromkeys([*i, *j]))}
    i, j = [names[n] for n in i], [names[n] for n in j]
    free = [i[k] for k in range(a.ndim) if k not in (*ca, *ba)] + [j[k] for k in range(b.ndim) if k not in (*cb, *bb)]
    return np.einsum(a, i, b, j, [*(i[k] for k in ba), *free])


def broadcast(p, x):
    shape = [1] * len(p["shape"])
    for i, d in enumerate(p["broadcast_dimensions"]):
        shape[d] = x.shape[i]
    return np.broadcast_to(x.reshape(shape), p["shape"])


def gather(p, x, at):
    dn, sizes, mode = p["dimension_numbers"], p["slice_sizes"], str(p["mode"])
    limit = np.array([x.shape[i] - sizes[i] for i in dn.start_index_map])
    at = at.astype(np.int64)
    inside = ((at >= 0) & (at <= limit)).all(-1)
    at = at.clip(0, limit)
    batch = at.shape[:-1]
    starts = np.zeros((*batch, x.ndim), np.int64)
    starts[..., list(dn.start_index_map)] = at
    for i, k in zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True):
        starts[..., i] = np.arange(batch[k]).reshape([-1 if j == k else 1 for j in range(len(batch))])
    n, index = len(batch), []
    for i, size in enumerate(sizes):
        own = np.arange(size).reshape([-1 if j == i else 1 for j in range(x.ndim)])
        index.append(starts[..., i].reshape(*batch, *[1] * x.ndim) + own)
    out = x[tuple(index)]
    if "FILL" in mode:
        fill = p["fill_value"] if p["fill_value"] is not None else np.nan
        out = np.where(inside.reshape(*batch, *[1] * x.ndim), out, np.asarray(fill, x.dtype))
    gone = (*dn.collapsed_slice_dims, *dn.operand_batching_dims)
    out = out.squeeze(tuple(n + i for i in gone))
    rest = iter(range(n))
    windows = iter(range(n, out.ndim))
    order = [next(windows) if j in dn.offset_dims else next(rest) for j in range(out.ndim)]
    return out.transpose(order)


def pad(p, x, value):
    config = p["padding_config"]
    assert all(lo >= 0 and hi >= 0 and inner == 0 for lo, hi, inner in config)
    return np.pad(x, [(lo, hi) for lo, hi, _ in config], constant_values=value)


def slices(p, x):
    steps = p["strides"] or (1,) * x.ndim
    return x[tuple(slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], steps, strict=True))]


def iota(p):
    shape = [-1 if i == p["dimension"] else 1 for i in range(len(p["shape"]))]
    return np.broadcast_to(np.arange(p["shape"][p["dimension"]]).reshape(shape), p["shape"])


def ragged(p, x, w, sizes):
    numbers = p["ragged_dot_dimension_numbers"]
    assert numbers.lhs_ragged_dimensions == (0,) and numbers.rhs_group_dimensions == (0,)
    out, ends = np.zeros((x.shape[0], w.shape[2]), x.dtype), np.cumsum([0, *sizes])
    for k in range(len(sizes)):
        out[ends[k] : ends[k + 1]] = x[ends[k] : ends[k + 1]] @ w[k]
    return out


def select(which, *cases):
    return np.choose(which.astype(int), cases) if which.ndim else cases[int(which)]


ONE = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "tanh": np.tanh, "exp": np.exp, "logistic": lambda x: 1 / (1 + np.exp(-x)), "sqrt": np.sqrt, "sign": np.sign,
    "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "abs": np.abs, "lt": np.less, "gt": np.greater,
    "le": np.less_equal, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal, "and": np.logical_and,
    "select_n": select, "stop_gradient": lambda x: x, "copy": lambda x: x,
    "div": lambda x, y: x / y if np.issubdtype(x.dtype, np.floating) else np.trunc(x / y), "rem": np.fmod,
    "clamp": lambda lo, x, hi: np.clip(x, lo, hi),
}  # fmt: skip
WITH = {
    "dot_general": dot, "broadcast_in_dim": broadcast, "gather": gather, "pad": pad, "slice": slices, "iota": iota,
    "ragged_dot_general": ragged, "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "pvary": lambda p, x: x, "psum_invariant": lambda p, x: x,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]), "transpose": lambda p, x: x.transpose(p["permutation"]),
    "squeeze": lambda p, x: x.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]), "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "reduce_sum": lambda p, x: x.sum(tuple(p["axes"])), "reduce_max": lambda p, x: x.max(tuple(p["axes"]), initial=-np.inf),
    "integer_pow": lambda p, x: x ** p["y"], "cumsum": lambda p, x: np.cumsum(x, p["axis"]),
}  # fmt: skip
