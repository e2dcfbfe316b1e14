"""Decoders in plain jax.numpy, written as users write them: flat or fused projections, branches one after or beside
the other."""

import jax
import jax.numpy as jnp
import numpy as np

V, D, F, H, TOKENS = 20, 16, 24, 4, 7


def params(depth=2, heads=4, kv=2, fused=False, seed=0):
    """One dict per layer; weights (in, out)."""
    rng = np.random.default_rng(seed)

    def w(*shape):
        return jnp.asarray(rng.normal(size=shape) * np.sqrt(1.5 / shape[0]), jnp.float32)

    def layer():
        out = {"o": w(heads * H, D), "up": w(D, F), "gate": w(D, F), "down": w(F, D), "n1": w(D) + 1, "n2": w(D) + 1}
        if fused:
            return out | {"qkv": w(D, (heads + 2 * kv) * H)}
        return out | {"q": w(D, heads * H), "k": w(D, kv * H), "v": w(D, kv * H)}

    return {"table": w(V, D), "layers": [layer() for _ in range(depth)], "head": w(D, V)}


def norm(x, scale):
    return scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attention(p, x, heads, kv, repeat=False):
    """Flat (heads x H) projections; keys and values repeated for their queries, or queries grouped."""
    b, t, _ = x.shape
    if "qkv" in p:
        q, k, v = jnp.split(x @ p["qkv"], [heads * H, (heads + kv) * H], axis=-1)
    else:
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    k, v = (z.reshape(b, t, kv, H) for z in (k, v))
    hidden = jnp.tril(jnp.ones((t, t), bool))
    if repeat:
        k, v = (jnp.repeat(z, heads // kv, axis=2) for z in (k, v))
        logits = jnp.einsum("bthd,bshd->bhts", q.reshape(b, t, heads, H), k) / H**0.5
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(hidden, logits, -1e9)), v)
    else:
        logits = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, kv, heads // kv, H), k) / H**0.5
        y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(jnp.where(hidden, logits, -1e9)), v)
    return y.reshape(b, t, heads * H) @ p["o"]


def mlp(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def sequential(p, x, **heads):
    x = x + attention(p, norm(x, p["n1"]), **heads)
    return x + mlp(p, norm(x, p["n2"]))


def behind(p, x, **heads):
    """Norms behind the branches as well, the stream through a cast."""
    x = x + norm(attention(p, norm(x, p["n1"]), **heads), p["n2"])
    return x.astype(jnp.float32) + norm(mlp(p, norm(x, p["n2"])), p["n1"]).astype(jnp.float32)


def beside(p, x, **heads):
    y = norm(x, p["n1"])
    return x + (attention(p, y, **heads) + mlp(p, y))


def beside_in_turn(p, x, **heads):
    y = norm(x, p["n1"])
    return x + attention(p, y, **heads) + mlp(p, y)


def beside_the_other_way(p, x, **heads):
    y = norm(x, p["n1"])
    return x + mlp(p, y) + attention(p, y, **heads)


def decoder(layer=sequential, heads=4, kv=2, **options):
    """fn(params, ids) -> logits."""

    def fn(p, ids):
        x = p["table"][ids]
        for one in p["layers"]:
            x = layer(one, x, heads=heads, kv=kv, **options)
        return x @ p["head"]

    return fn


IDS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, TOKENS)))
