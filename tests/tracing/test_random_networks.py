"""The laws over randomly generated networks: branches, concatenations, groups, heads, gates, scans, conditionals.

Convolutional and sequence networks are grown by hypothesis, one random step after the other, on a pool of live values;
each value knows its width, parameters are created as they are needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import check_laws, lively


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Growing:
    """A network under construction: parameters by name, and a program over a stack of values."""

    def __init__(self):
        self.shapes = {}
        self.steps = []
        self.widths = []

    def new(self, kind, *shape):
        name = f"{kind}{len(self.shapes)}"
        self.shapes[name] = shape
        return name

    def then(self, step, width):
        self.steps.append(step)
        self.widths.append(width)

    def params(self, seed):
        return lively({n: jnp.zeros(s) for n, s in self.shapes.items()}, seed)

    def run(self, p, x):
        values = [x]
        for step in self.steps:
            values.append(step(p, values))
        return values[-1]


def conv(x, k, groups=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups)  # fmt: skip


WIDTHS = (4, 6, 8, 12)


@st.composite
def images(draw):
    """A convolutional network: (function, parameters, input)."""
    net = Growing()
    net.widths = [3]

    def block(i, width, bias=True, scale=True):
        k = net.new("kernel", 3, 3, net.widths[i], width)
        b = net.new("bias", width) if bias else None
        s = net.new("scale", width) if scale else None

        def step(p, v):
            y = conv(v[i], p[k])
            y = y * p[s] if s else y
            return jax.nn.relu(y + p[b]) if b else jax.nn.relu(y)

        net.then(step, width)

    block(0, draw(st.sampled_from(WIDTHS)))
    for _ in range(draw(st.integers(2, 6))):
        i = len(net.widths) - 1 - draw(st.integers(0, min(2, len(net.widths) - 2)))
        w = net.widths[i]
        kinds = ["block", "residual", "concat", "grouped", "depthwise", "dilated", "pad", "split", "sigmoid", "excite",
                 "shuffle", "cond", "transposed", "twice"]  # fmt: skip
        kind = draw(st.sampled_from(kinds))
        if kind == "block":
            block(i, draw(st.sampled_from(WIDTHS)), draw(st.booleans()), draw(st.booleans()))
        elif kind == "residual":
            a, b = net.new("kernel", 3, 3, w, 2 * w), net.new("kernel", 1, 1, 2 * w, w)
            net.then(lambda p, v, i=i, a=a, b=b: v[i] + conv(jax.nn.relu(conv(v[i], p[a])), p[b]), w)
        elif kind == "concat":
            j = draw(st.integers(1, len(net.widths) - 1))
            net.then(lambda p, v, i=i, j=j: jnp.concatenate([v[i], v[j]], -1), w + net.widths[j])
        elif kind == "twice":
            net.then(lambda p, v, i=i: jnp.concatenate([v[i], jnp.tanh(v[i])], -1), 2 * w)
        elif kind == "grouped":
            g = draw(st.sampled_from([d for d in (2, 3, 4) if w % d == 0] or [1]))
            k = net.new("kernel", 3, 3, w // g, 2 * g)
            net.then(lambda p, v, i=i, k=k, g=g: jax.nn.relu(conv(v[i], p[k], g)), 2 * g)
        elif kind == "depthwise":
            k = net.new("kernel", 3, 3, 1, w)
            net.then(lambda p, v, i=i, k=k, w=w: conv(v[i], p[k], w), w)
        elif kind == "dilated":
            k = net.new("kernel", 3, 3, w, w)
            net.then(lambda p, v, i=i, k=k: jnp.tanh(conv(v[i], p[k], 1, 2)), w)
        elif kind == "transposed":
            k = net.new("kernel", 3, 3, w, 4)
            net.then(lambda p, v, i=i, k=k: jax.lax.conv_transpose(v[i], p[k], (1, 1), "SAME"), 4)
        elif kind == "pad":
            lo = draw(st.integers(0, 3))
            k = net.new("kernel", 1, 1, w, w + 4)
            pads = ((0, 0), (0, 0), (0, 0), (lo, 4 - lo))
            net.then(lambda p, v, i=i, k=k, pads=pads: jnp.pad(v[i], pads) + conv(v[i], p[k]), w + 4)
        elif kind == "split":
            cut = draw(st.integers(1, w - 1))
            k = net.new("kernel", 3, 3, w - cut, 5)
            net.then(
                lambda p, v, i=i, k=k, c=cut: jnp.concatenate([v[i][..., :c], conv(v[i][..., c:], p[k])], -1), cut + 5
            )
        elif kind == "sigmoid":
            k = net.new("kernel", 1, 1, w, 6)
            net.then(lambda p, v, i=i, k=k: conv(jax.nn.sigmoid(v[i]), p[k]), 6)
        elif kind == "excite":
            a, b = net.new("kernel", w, 3), net.new("kernel", 3, w)
            net.then(lambda p, v, i=i, a=a, b=b: v[i] * jax.nn.sigmoid(
                jax.nn.relu(v[i].mean((1, 2)) @ p[a]) @ p[b])[:, None, None], w)  # fmt: skip
        elif kind == "shuffle" and w % 2 == 0:
            net.then(
                lambda p, v, i=i, w=w: v[i].reshape(*v[i].shape[:-1], 2, w // 2).swapaxes(-1, -2).reshape(v[i].shape), w
            )
        elif kind == "cond":
            k = net.new("kernel", 3, 3, w, w)
            net.then(lambda p, v, i=i, k=k: jax.lax.cond(
                v[0].sum() > 0, lambda y: jax.nn.relu(conv(y, p[k])), lambda y: 0.5 * y, v[i]), w)  # fmt: skip
    head = net.new("kernel", net.widths[-1], 5)
    net.then(lambda p, v: v[-1].mean((1, 2)) @ p[head], 5)
    x = jnp.asarray(np.random.default_rng(draw(st.integers(0, 99))).normal(size=(2, 5, 5, 3)), jnp.float32)
    return net, x


def images_obey(network, seed):
    net, x = network
    check_laws(net.run, net.params(seed), (x,), alive=1e-4, tolerance=2e-5, seed=seed)


@examples(5)
@given(images(), st.integers(0, 1000))
def test_convolutional_networks_obey_the_laws(network, seed):
    images_obey(network, seed)


@pytest.mark.slow
@examples(25)
@given(images(), st.integers(0, 1000), st.just("more"))
def test_many_convolutional_networks_obey_the_laws(network, seed, _):
    images_obey(network, seed)


@st.composite
def sequences(draw):
    """A transformer of random parts, some of it stacked for a scan."""
    net = Growing()
    width = draw(st.sampled_from([6, 8, 12]))
    net.widths = [4]
    e = net.new("kernel", 4, width)
    net.then(lambda p, v: v[0] @ p[e], width)

    def norm(x, scale):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["attention", "gate", "mlp", "scan", "scan attention"]))
        s = net.new("scale", width)
        if kind == "attention":
            kv, g, d = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 4]))
            q, k, u, o = (
                net.new("kernel", *n)
                for n in ((width, kv * g * d), (width, kv * d), (width, kv * d), (kv * g * d, width))
            )

            def step(p, v, q=q, k=k, u=u, o=o, s=s, kv=kv, g=g, d=d):
                x = norm(v[-1], p[s])
                b, t, _ = x.shape
                logits = jnp.einsum(
                    "btkgd,bskd->bkgts", (x @ p[q]).reshape(b, t, kv, g, d), (x @ p[k]).reshape(b, t, kv, d)
                )
                y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(logits / d**0.5), (x @ p[u]).reshape(b, t, kv, d))
                return v[-1] + y.reshape(b, t, kv * g * d) @ p[o]

        elif kind == "gate":
            h = draw(st.sampled_from([6, 10]))
            a, c = net.new("kernel", width, 2 * h), net.new("kernel", h, width)

            def step(p, v, a=a, c=c, s=s):
                gate, up = jnp.split(norm(v[-1], p[s]) @ p[a], 2, -1)
                return v[-1] + (jax.nn.silu(gate) * up) @ p[c]

        elif kind == "mlp":
            a, b, c = net.new("kernel", width, 10), net.new("bias", 10), net.new("kernel", 10, width)

            def step(p, v, a=a, b=b, c=c, s=s):
                return v[-1] + jax.nn.gelu(norm(v[-1], p[s]) @ p[a] + p[b]) @ p[c]

        elif kind == "scan":
            a, c, n = net.new("kernel", 3, width, 7), net.new("kernel", 3, 7, width), net.new("scale", 3, width)

            def step(p, v, a=a, c=c, n=n):
                def body(x, w):
                    return x + jax.nn.relu(norm(x, w[n]) @ w[a]) @ w[c], None

                return jax.lax.scan(jax.checkpoint(body), v[-1], {k: p[k] for k in (a, c, n)})[0]

        else:
            q, k, u, o = (
                net.new("kernel", 2, *n) for n in ((width, 2, 4), (width, 2, 4), (width, 2, 4), (2, 4, width))
            )

            def step(p, v, q=q, k=k, u=u, o=o):
                def body(x, w):
                    queries, keys = (jnp.einsum("bte,ehd->bthd", x, w[n]) for n in (q, k))
                    a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", queries, keys))
                    return x + jnp.einsum("bhts,bse,ehd,hdf->btf", a, x, w[u], w[o]), None

                return jax.lax.scan(body, v[-1], {n: p[n] for n in (q, k, u, o)})[0]

        net.then(step, width)
    head = net.new("kernel", width, 3)
    net.then(lambda p, v: v[-1].mean(1) @ p[head], 3)
    x = jnp.asarray(np.random.default_rng(draw(st.integers(0, 99))).normal(size=(2, 5, 4)), jnp.float32)
    return net, x


def sequences_obey(network, seed):
    net, x = network
    graph = check_laws(net.run, net.params(seed), (x,), alive=1e-4, tolerance=3e-5, seed=seed)
    stacked = [g for g, i in graph.groups.items() if i.layers is not None]
    assert bool(stacked) == any(len(s) > 2 for n, s in net.shapes.items() if n.startswith("kernel"))


@examples(4)
@given(sequences(), st.integers(0, 1000))
def test_sequence_networks_obey_the_laws(network, seed):
    sequences_obey(network, seed)


@pytest.mark.slow
@examples(25)
@given(sequences(), st.integers(0, 1000), st.just("more"))
def test_many_sequence_networks_obey_the_laws(network, seed, _):
    sequences_obey(network, seed)
