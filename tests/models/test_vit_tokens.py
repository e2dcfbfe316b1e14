"""Vision transformers beside float64 loops, in every variant; what a token reducer is given, and what it may change."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import lively, relative, subset

import jprune
from jprune.models import rebuild, vit
from jprune.models.token_hook import TokenReducer, Tokens, take

BASE = vit.vit(12, 2, 3, 4, 5, mlp=20).config
VARIANTS = {
    "class token": {},
    "mean": {"pool": "mean"},
    "distilled": {"distilled": True, "both_heads": True},
    "distilled, one head": {"distilled": True},
    "registers": {"registers": 2, "positions": "patches", "layer_scale": True},
    "mean beside a class token": {"pool": "mean", "class_token": True},
    "norm, then mean": {"pool": "mean", "class_token": True, "registers": 1, "norm_first": True},
    "clip": {"num_classes": 0, "pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "epsilon": 1e-5},
    "no biases": {"qkv_bias": False, "head_bias": False, "fused": False, "activation": "gelu_tanh", "epsilon": 1e-2},
}


@functools.cache
def case(name):
    """(module, variables, images of 12 patches)."""
    module = vit.ViT(dataclasses.replace(BASE, **VARIANTS[name]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 16, 3)), jnp.float32)
    return module, lively(jax.eval_shape(module.init, jax.random.key(0), x), seed=3), x


# -- loops in float64 ----------------------------------------------------------------------------------------------


def norm(x, p, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


ACTS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def by_loops(module, variables, image, keep=None):
    """(answer, tokens before and after each block, attention per block) of one image; only `keep` after block 1."""
    c = module.config
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    image = np.asarray(image, np.float64)
    patches = []
    for i in range(0, image.shape[0], c.patch):
        for j in range(0, image.shape[1], c.patch):
            window = image[i : i + c.patch, j : j + c.patch]
            patches.append(np.einsum("ijc,ijcd->d", window, p["patch_embed"]["kernel"]))
    x = np.stack(patches) + (p["patch_embed"]["bias"] if c.patch_bias else 0)
    special = [p[n][0] for n in ("cls_token", "dist_token", "reg_token") if n in p]
    front = sum(len(s) for s in special)
    if c.positions == "patches":
        x = np.concatenate([*special, x + p["pos_embed"][0]])
    else:
        x = np.concatenate([*special, x]) + p["pos_embed"][0]
    x = norm(x, p["pre_norm"], c.epsilon) if c.pre_norm else x
    states, seen = [x], []
    for i, block in enumerate(c.blocks):
        name = f"block{i + 1}"
        y, attention = norm(x, p[f"{name}_norm1"], c.epsilon), p[f"{name}_attn"]
        out, weights = 0.0, []
        for h in range(block.heads):
            if c.fused:
                parts = [{"kernel": attention["qkv"]["kernel"][:, k, h]} for k in range(3)]
                parts = [{**part, "bias": attention["qkv"]["bias"][k, h]} for k, part in enumerate(parts)]
            else:
                parts = [{leaf: a[..., h, :] for leaf, a in attention[n].items()} for n in ("query", "key", "value")]
            q, k, v = (dense(y, part) for part in parts)
            e = np.exp(q @ k.T / math.sqrt(block.head))
            weights.append(e / e.sum(-1, keepdims=True))
            out = out + weights[-1] @ v @ attention["proj"]["kernel"][h]
        x = x + (out + attention["proj"]["bias"]) * p.get(f"{name}_scale1", 1.0)
        y = ACTS[c.activation](dense(norm(x, p[f"{name}_norm2"], c.epsilon), p[f"{name}_fc1"]))
        x = x + dense(y, p[f"{name}_fc2"]) * p.get(f"{name}_scale2", 1.0)
        x = x[keep] if keep is not None and i == 0 else x
        states.append(x)
        seen.append(np.stack(weights))
    if c.pool == "mean" and not c.norm_first:
        read = norm(x[front:].mean(0), p["norm"], c.epsilon)
    else:
        x = norm(x, p["norm"], c.epsilon)
        read = x[front:].mean(0) if c.pool == "mean" else x[0]
    answer = dense(read, p["head"]) if c.num_classes else read
    if c.both_heads:
        answer = (answer + dense(x[1], p["head_dist"])) / 2
    return answer, states, seen


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_its_loops(name):
    module, variables, x = case(name)
    want = [by_loops(module, variables, image)[0] for image in x]
    assert relative(jax.jit(module.apply)(variables, x), np.stack(want)) <= 2e-5


@pytest.mark.parametrize("name", ["distilled", "clip"])
def test_features_are_the_tokens_between_blocks(name):
    module, variables, x = case(name)
    _, states, seen = zip(*(by_loops(module, variables, image) for image in x))

    def run(variables, x):
        features = functools.partial(module.apply, variables, x, method="features")
        return [features(layer=layer, select="full") for layer in (0, 1, -1)], features(watch=-1)

    got, patches = jax.jit(run)(variables, x)
    for i in range(3):
        assert got[i].seen is None
        assert relative(got[i].x, np.stack([s[i] for s in states])) <= 2e-5
    assert patches.x.shape == (2, 12, 12)
    assert relative(patches.x, np.stack([s[1][module.config.prefix :] for s in states])) <= 2e-5
    assert relative(patches.seen.weights, np.stack([s[1] for s in seen])) <= 2e-5
    assert patches.seen.key.shape == (2, 12 + module.config.prefix, 3, 4)


def test_features_run_no_block_too_many():
    module, variables, x = case("clip")

    def products(**options):
        run = functools.partial(module.apply, method="features", **options)
        return str(jax.make_jaxpr(run)(variables, x)).count("dot_general")

    assert products(layer=0) == 0  # the patches are a convolution
    assert products(layer=1) == products(layer=-2) == products(layer=0, watch=0) == products(layer=-1) // 2 == 6


# -- reducers ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keep(TokenReducer):
    """After the first block: leaves these places, or marks the others as gone."""

    places: tuple[int, ...]
    masked: bool = False

    def after(self, layer, tokens, seen):
        if layer:
            return tokens
        places = jnp.broadcast_to(jnp.array(self.places), (len(tokens.x), len(self.places)))
        if not self.masked:
            return take(tokens, places)
        return tokens._replace(alive=jnp.isin(tokens.index, places[0]))


@dataclasses.dataclass(frozen=True)
class MergeTwins(TokenReducer):
    """Before the first block: the last two patches are one of size two."""

    def before(self, tokens, prefix):
        size = jnp.ones(tokens.index.shape, jnp.float32).at[:, -2].set(2.0)
        return jax.tree.map(lambda a: a[:, :-1], Tokens(tokens.x, tokens.index, size))


@dataclasses.dataclass(frozen=True)
class Watch(TokenReducer):
    """Removes nothing and notes what it is called with."""

    calls: list
    layers: tuple[int, ...] = (1,)
    needs_class_token = True

    def reads_weights(self, layer):
        return layer in self.layers

    def before(self, tokens, prefix):
        self.calls.append(("before", prefix, tokens))
        return tokens

    def inside(self, layer, tokens, seen):
        self.calls.append((f"inside {layer}", seen, tokens))
        return tokens

    def after(self, layer, tokens, seen):
        self.calls.append((f"after {layer}", seen, tokens))
        return tokens


@pytest.mark.parametrize("name", ["class token", "mean"])
def test_a_reducer_that_removes_nothing_leaves_the_program_as_it_is(name):
    module, variables, x = case(name)
    reduced = functools.partial(module.apply, reducer=TokenReducer())
    plain, same = (str(jax.make_jaxpr(f)(variables, x)) for f in (module.apply, reduced))
    assert plain == same
    trace = jax.eval_shape(functools.partial(reduced, trace=True), variables, x)[1]
    n = 12 + module.config.prefix
    assert [a.shape for a in (*trace.index, *trace.mlp)] == [(2, n)] * 5 and trace.size == (None,) * 3
    last = jax.jit(lambda v, x: reduced(v, x, trace=True)[1].index[2])(variables, x)
    np.testing.assert_array_equal(last[1], np.arange(n))


@pytest.mark.parametrize("name", ["distilled", "registers", "norm, then mean"])
def test_dropped_tokens_are_dropped_in_the_loops_too(name):
    module, variables, x = case(name)
    special = range(module.config.prefix)
    places = (*special, *(module.config.prefix + i for i in (1, 4, 5, 11)))
    want = np.stack([by_loops(module, variables, image, np.array(places))[0] for image in x])

    def run(variables, x):
        return [module.apply(variables, x, reducer=Keep(places, masked), trace=True) for masked in (False, True)]

    (gathered, trace), (masked, marked) = jax.jit(run)(variables, x)
    assert relative(gathered, want) <= 2e-5 and relative(masked, gathered) <= 2e-5
    assert relative(gathered, np.stack([by_loops(module, variables, image)[0] for image in x])) > 1e-2
    n = 12 + module.config.prefix
    assert [a.shape[1] for a in trace.index] == [n, len(places), len(places)]
    assert [a.shape[1] for a in trace.mlp] == [n, len(places)]
    np.testing.assert_array_equal(trace.index[2][0], places)
    assert marked.index[2].shape == (2, n) and marked.alive[0] is None and int(marked.alive[2].sum()) == 2 * len(places)


@pytest.mark.parametrize("name", ["class token", "mean"])
def test_two_equal_tokens_are_one_of_size_two(name):
    """Softmax over a key that stands twice is softmax with log 2 added; and the mean counts it twice."""
    module, variables, x = case(name)
    positions = variables["params"]["pos_embed"]
    variables = {"params": {**variables["params"], "pos_embed": jnp.zeros_like(positions)}}
    x = x.at[:, 8:, 12:].set(x[:, 8:, 8:12])
    want, (got, trace) = jax.jit(
        lambda v, x: (module.apply(v, x), module.apply(v, x, reducer=MergeTwins(), trace=True))
    )(variables, x)
    assert relative(got, want) <= 1e-5
    n = 12 + module.config.prefix
    assert trace.index[0].shape == (2, n - 1) and float(trace.size[2].sum()) == 2 * n


def test_what_a_reducer_is_given():
    module, variables, x = case("distilled")
    calls = []
    module.apply(variables, x, reducer=Watch(calls), key=jax.random.key(7))
    assert [name for name, _, _ in calls] == ["before", "inside 0", "after 0", "inside 1", "after 1"]
    _, states, seen = by_loops(module, variables, x[0])
    assert calls[0][1] == 2 and all(c[1].prefix == 2 for c in calls[1:])
    assert all(jnp.array_equal(jax.random.key_data(c[2].key), jax.random.key_data(jax.random.key(7))) for c in calls)
    assert calls[1][1].weights is None and calls[2][1].weights is None
    assert relative(calls[3][1].weights[0], seen[1]) <= 2e-5 and calls[3][1].weights.dtype == jnp.float32
    for got, want in ((calls[0], states[0]), (calls[2], states[1]), (calls[4], states[2])):
        assert relative(got[2].x[0], want) <= 2e-5
    y = norm(states[1], jax.tree.map(np.float64, variables["params"]["block2_norm1"]), BASE.epsilon)
    kernel = np.asarray(variables["params"]["block2_attn"]["qkv"]["kernel"], np.float64)
    bias = np.asarray(variables["params"]["block2_attn"]["qkv"]["bias"], np.float64)
    for k, name in enumerate(("query", "key", "value")):
        want = np.einsum("nd,dhk->nhk", y, kernel[:, k]) + bias[k]
        assert relative(getattr(calls[3][1], name)[0], want) <= 2e-5


def test_pruned_in_widths_and_in_tokens():
    config = dataclasses.replace(
        BASE, blocks=BASE.blocks[:1], distilled=True, both_heads=True, registers=1, positions="patches", pre_norm=True,
        layer_scale=True, patch_bias=False, qkv_bias=False, head_bias=False, activation="quick_gelu", image=(12, 16),
    )  # fmt: skip
    module, x = vit.ViT(config), case("clip")[2]
    variables = lively(jax.eval_shape(module.init, jax.random.key(0), x))
    graph = jprune.trace(module.apply, variables, x)
    keep = subset(graph, np.random.default_rng(0))
    small = graph.compact(variables, keep)
    rebuilt = rebuild(module, small)
    assert relative(jax.jit(rebuilt.apply)(small, x), jax.jit(graph.replay(keep))(small, x)) <= 1e-4
    reducer = Keep((0, 1, 2, 3, 9, 12))
    got = jax.jit(functools.partial(rebuilt.apply, reducer=reducer))(small, x)
    want = jax.jit(functools.partial(module.apply, reducer=reducer))(graph.mask(variables, keep), x)
    assert relative(got, want) <= 1e-4
    apart, split = vit.unfuse(module, variables)
    assert set(split["params"]["block1_attn"]["query"]) == {"kernel"}
    assert vit.fuse(apart, split)[0] == module
    jax.tree.map(np.testing.assert_array_equal, vit.fuse(apart, split)[1], variables)


def test_half_precision():
    """Attention weights stay float32, and the logits those of float32 to bfloat16's digits."""
    module, variables, x = case("class token")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)

    def run(variables, x):
        watched = module.apply(variables, x, layer=1, watch=0, method="features")
        return module.apply(variables, x, reducer=MergeTwins()), watched.seen.weights

    got, weights = jax.jit(run)(half, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert relative(got, jax.jit(run)(variables, x)[0]) <= 4e-2


@pytest.mark.parametrize(
    ("options", "pixels", "params"),
    [
        ({"stream": 192, "heads": 3}, 224, 5_717_416),
        ({"stream": 384, "heads": 6, "distilled": True, "both_heads": True}, 224, 22_436_432),
        ({"stream": 768, "heads": 12}, 384, 86_859_496),
    ],
)
def test_parameters_of_published_models(options, pixels, params):
    """DeiT-T, DeiT-S with its distillation token, SWAG's ViT-B/16 at 384 pixels."""
    kind = {k: options.pop(k) for k in ("distilled", "both_heads") if k in options}
    one = vit.vit(depth=1, patch=16, num_classes=1000, **options).config
    counts = []
    for depth in (1, 2):  # the other ten blocks are like the second
        module = vit.ViT(dataclasses.replace(one, blocks=one.blocks * depth, **kind))
        image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
        counts.append(sum(a.size for a in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), image))))
    assert counts[0] + 11 * (counts[1] - counts[0]) == params


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "image", "message"),
    [
        ((12, 18), None, r"images of 12x18 pixels cannot be cut into patches of 4x4: resize them, to 12x16 say"),
        ((2, 16), None, r"images of 2x16 pixels cannot be cut.*to 4x16"),
        ((16, 16), None, r"images of 16x16 pixels have 16 patches of 4x4.*positions for 12: resize them"),
        ((16, 12), (12, 16), r"images of 16x12 pixels are not what this ViT was trained on: resize them to 12x16"),
    ],
)
def test_images_of_a_wrong_size_are_refused(size, image, message):
    module, variables, _ = case("class token")
    module = module.clone(config=dataclasses.replace(module.config, image=image))
    with pytest.raises(ValueError, match=message):
        module.apply(variables, jnp.zeros((1, *size, 3)))


def test_a_square_grid_is_named():
    module = vit.vit(12, 1, 3, 4, 5)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="positions for 4: resize them to 8x8"):
        jax.eval_shape(module.apply, variables, jnp.zeros((1, 12, 12, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "no layer 3: 2 blocks have the layers 0 to 2"),
        ({"watch": 2}, "no block 2 to watch: there are 2"),
        ({"select": "patch"}, "select is 'patch': use 'default'"),
    ],
)
def test_features_that_are_not_there(options, message):
    module, variables, x = case("clip")
    with pytest.raises(ValueError, match=message):
        module.apply(variables, x, method="features", **options)


def test_a_reducer_without_its_class_token_is_refused():
    module, variables, x = case("mean")
    with pytest.raises(ValueError, match=r"Watch looks at the class token, and this ViT \(pool 'mean', .*none\)"):
        module.apply(variables, x, reducer=Watch([]))
