"""Grafting onto convolutions of any function: where the sites are, what a join sees, and what is refused."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from laws import lively, relative, same_numbers

import jprune
from jprune.models import resnet
from jprune.surgery.sites import SiteError, folded, graft, select, sites
from jprune.training import as_forward

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(3, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(0)


def array(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


RESNET_TERMS = 400  # five convolutions of 27 to 72 products each, and the head


def conv(x, w, stride=1):
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def kernel(i, o, k=3):
    return array(k, k, i, o, scale=(2 / (k * k * i)) ** 0.5)


def keep_it(site, x, y, extra):
    return y, None


def both_traces(model, variables, x):
    forward = as_forward(model)
    return forward, jprune.trace(forward.evaluate, variables, x), jprune.trace(forward.train, variables, x, KEY)


@pytest.mark.smoke
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_sites_of_a_residual_network_in_both_modes(shortcut):
    model = resnet.small((1, 2), widths=(4, 8), shortcut=shortcut)
    variables = lively(jax.eval_shape(model.init, KEY, IMAGES))
    forward, evaluate, train = both_traces(model, variables, IMAGES)
    found, refused = sites(evaluate)
    again, _ = sites(train)
    assert not refused and list(found) == list(again)
    assert list(found)[:3] == [
        f"params/{p}/kernel" for p in ("stem_conv", "stage1_block1/conv1", "stage1_block1/conv2")
    ]
    for name, site in found.items():
        bn = name.replace("conv", "bn").removesuffix("/kernel")
        assert set(site.norm) == {f"{bn}/scale", f"{bn}/bias"} | {
            f"{bn}/{s}".replace("params", "batch_stats") for s in ("mean", "var")
        }
        assert set(again[name].norm) == {f"{bn}/scale", f"{bn}/bias"}
        assert site.stem == again[name].stem == ("stem" in name)
        assert site.shortcut == again[name].shortcut == ("shortcut" in name)
        assert site.bypassed == ("stem" not in name)
        assert "resnet.py" in site.where
    # a join that changes nothing changes nothing, in either mode and at another batch size
    whole, states = graft(evaluate, found, keep_it)(variables, {}, IMAGES[:2])
    same_numbers(whole, forward.evaluate(variables, IMAGES[:2]), terms=RESNET_TERMS)
    assert set(states) == set(found)
    (logits, updates), _ = graft(train, again, keep_it)(variables, {}, IMAGES, KEY)
    want, wanted = forward.train(variables, IMAGES, KEY)
    same_numbers(logits, want, terms=RESNET_TERMS)
    same_numbers(updates, wanted, terms=RESNET_TERMS)


def test_a_join_sees_input_and_normalised_output_and_its_result_goes_on():
    model = resnet.small((1,), widths=(4,))
    variables = lively(jax.eval_shape(model.init, KEY, IMAGES))
    forward, evaluate, train = both_traces(model, variables, IMAGES)
    name = "params/stage1_block1/conv1/kernel"
    w = variables["params"]["stage1_block1"]["conv1"]["kernel"]
    bn = {**variables["params"]["stage1_block1"]["bn1"], **variables["batch_stats"]["stage1_block1"]["bn1"]}
    seen = []

    def join(site, x, y, extra):
        z = lax.conv_general_dilated(x, w, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        seen.append((z - bn["mean"]) / jnp.sqrt(bn["var"] + 1e-5) * bn["scale"] + bn["bias"] - y)
        return extra * y, y.mean()

    fn = graft(evaluate, select(evaluate, [name]), join)
    got, states = fn(variables, {name: 3.0}, IMAGES)
    assert float(jnp.abs(seen[0]).max()) < 1e-5 and states[name].shape == ()
    tripled = jax.tree.map(lambda a: a, variables)
    tripled["params"]["stage1_block1"]["bn1"] = {k: 3.0 * bn[k] for k in ("scale", "bias")}
    assert relative(got, jax.jit(model.apply)(tripled, IMAGES)) < 1e-5
    assert relative(got, jax.jit(model.apply)(variables, IMAGES)) > 1e-2
    in_training = graft(train, select(train, [name]), lambda s, x, y, e: (e * y, None))
    (logits, _), _ = in_training(variables, {name: 3.0}, IMAGES, KEY)
    assert relative(logits, forward.train(tripled, IMAGES, KEY)[0]) < 1e-5
    # an ordinary function of variables and extras: jitted, differentiated, traced again
    grad = jax.jit(jax.grad(lambda e: fn(variables, {name: e}, IMAGES)[0].sum()))(3.0)
    quick = jax.jit(lambda e: fn(variables, {name: e}, IMAGES)[0].sum())
    step = [float(quick(3.0 + d)) for d in (-1e-2, 1e-2)]
    np.testing.assert_allclose(grad, (step[1] - step[0]) / 2e-2, rtol=1e-2, atol=1e-3)
    again = jprune.trace(
        lambda v, x: fn(v["net"], {name: v["extra"]}, x)[0], {"net": variables, "extra": 3.0 * jnp.ones(4)}, IMAGES
    )
    group = next(g for g in again.groups.values() if g.id.endswith("stage1_block1/conv1/kernel:3"))
    assert ("extra", 0) in {(m.path, m.axis) for m in group.members}


def plain_norm(p, x, train, axis):
    """BatchNorm written out the two-pass way: x - mean is computed for the variance and again for the result."""
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = [x.shape[i] if i == axis else 1 for i in range(x.ndim)]
    if train:
        mean, var = x.mean(axes), ((x - x.mean(axes, keepdims=True)) ** 2).mean(axes)
    else:
        mean, var = p["mean"], p["var"]
    factor = p["scale"] * lax.rsqrt(var + 1e-5)
    return x * factor.reshape(shape) + (p["shift"] - mean * factor).reshape(shape)


def channels_first(p, x, train=False, mutable=False):
    """A plain function, NCHW with OIHW kernels, strided, with a folded BatchNorm inside jit and remat."""

    @jax.jit
    def first(x):
        y = lax.conv_general_dilated(x, p["a"], (2, 2), [(1, 1)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return jax.nn.relu(plain_norm(p["norm_a"], y, train, 1))

    def second(x):
        y = lax.conv_general_dilated(x, p["b"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return jnp.maximum(y + p["bias_b"][:, None, None], 0)

    y = jax.checkpoint(second)(first(x)).mean((2, 3)) @ p["out"]
    return (y, {}) if train else y


def first_weights():
    norm = {"mean": array(6), "var": jnp.abs(array(6)) + 0.5, "scale": jnp.abs(array(6)) + 0.5, "shift": array(6)}
    return {"a": array(6, 3, 3, 3, scale=0.3), "norm_a": norm, "b": array(5, 6, 2, 2, scale=0.3), "bias_b": array(5),
            "out": array(5, 4)}  # fmt: skip


def test_any_layout_inside_jit_and_rematerialisation():
    p, x = first_weights(), jnp.moveaxis(IMAGES, 3, 1)
    forward, evaluate, train = both_traces(channels_first, p, x)
    found, refused = sites(evaluate)
    assert not refused and set(found["a"].norm) == {"norm_a/mean", "norm_a/var", "norm_a/scale", "norm_a/shift"}
    assert found["b"].norm == ("bias_b",) and found["a"].channel == 1 and found["a"].kernel_out == 0
    in_training, _ = sites(train)
    assert set(in_training["a"].norm) == {"norm_a/scale", "norm_a/shift"}
    extra = {"a": 2.0, "b": 0.5}
    changed = {**p, "norm_a": {**p["norm_a"], **{k: 2.0 * p["norm_a"][k] for k in ("scale", "shift")}},
               "b": 0.5 * p["b"], "bias_b": 0.5 * p["bias_b"]}  # fmt: skip
    for mode, graph, where, inputs in (("evaluate", evaluate, found, (x,)), ("train", train, in_training, (x, KEY))):
        fn = graft(graph, where, lambda s, x, y, e: (e * y, y.sum((0, 2, 3))))

        def loss(p, fn=fn, inputs=inputs):
            outs, states = fn(p, extra, *inputs)
            return sum((leaf**2).sum() for leaf in jax.tree.leaves((outs, states)))

        outs, states = jax.jit(fn)(p, extra, *inputs)
        want = jax.jit(getattr(forward, mode))(changed, *inputs)
        assert relative(outs, want) < 1e-5 and states["b"].shape == (5,) and states["a"].shape == (6,)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(p)))


def test_what_else_reads_a_value_ends_the_chain():
    """A squeeze-and-excite gate, a second reader, or another branch is not normalisation."""
    p = {"w": kernel(3, 4), "v": kernel(4, 4), "scale": jnp.ones(4), "gate": array(4, 4), "b": array(4)}

    def gated(p, x):  # the gate differs from image to image
        y = conv(x, p["w"]) * p["scale"]
        return conv(y * jax.nn.sigmoid(y.mean((1, 2)) @ p["gate"])[:, None, None] + p["b"], p["v"]).mean((1, 2))

    found, _ = sites(jprune.trace(gated, p, IMAGES))
    assert found["w"].norm == ("scale",) and found["v"].norm == ()

    def preactivated(p, x):  # h is normalised for the branch and carried past it as it is
        h = conv(x, p["w"])
        return (h + conv(jax.nn.relu(h * p["scale"] + p["b"]), p["v"])).mean((1, 2))

    found, _ = sites(jprune.trace(preactivated, p, IMAGES))
    assert found["w"].norm == () and found["w"].stem and not found["w"].bypassed and found["v"].bypassed
    fn = graft(jprune.trace(preactivated, p, IMAGES), found, lambda s, x, y, e: (2 * y if s.leaf == "w" else y, None))
    same_numbers(fn(p, {}, IMAGES)[0], preactivated({**p, "w": 2 * p["w"]}, IMAGES), terms=200)


def test_branches_that_can_only_be_passed_one_at_a_time_are_not_bypassed():
    p = {k: kernel(3, 3) for k in "abc"}

    def two_ways(p, x):
        return (conv(x, p["a"]) * conv(x, p["b"]) + conv(x, p["a"] * 0 + p["c"])).mean((1, 2))

    def inception(p, x):
        return jnp.concatenate([conv(x, p["a"]), conv(x, p["b"])], -1).mean((1, 2))

    def parallel(p, x):  # neither is the other's shortcut
        return (conv(x, p["a"]) + conv(x, p["b"])).mean((1, 2))

    for fn in (inception, parallel):
        found = sites(jprune.trace(fn, {k: p[k] for k in "ab"}, IMAGES))[0].values()
        assert len(found) == 2 and not any(s.bypassed or s.shortcut for s in found)
    assert "c" not in sites(jprune.trace(two_ways, p, IMAGES))[0]  # its kernel is computed, so it is no leaf


def test_module_libraries():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x))).mean((1, 2))

    definition, state = nnx.split(Net(nnx.Rngs(0)))
    found, _ = sites(jprune.trace(lambda s, x: nnx.merge(definition, s)(x), state, IMAGES))
    (site,) = found.values()
    assert site.leaf == "conv/kernel/value"
    assert {"conv/bias/value", "norm/scale/value", "norm/bias/value"} < set(site.norm)

    class Eqx(eqx.Module):
        conv: eqx.nn.Conv2d
        scale: jax.Array

        def __call__(self, x):
            return jax.nn.relu(self.conv(x) * self.scale[:, None, None]).mean((1, 2))

    module = Eqx(eqx.nn.Conv2d(3, 4, 3, key=KEY), 1.5 * jnp.ones(4))
    params, static = eqx.partition(module, eqx.is_array)

    def fn(p, x):
        return jax.vmap(eqx.combine(p, static))(x)

    x = jnp.moveaxis(IMAGES, 3, 1)
    graph = jprune.trace(fn, params, x)
    found, _ = sites(graph)
    assert found["conv/weight"].norm == ("conv/bias", "scale")  # through the reshapes that vmap makes
    doubled = graft(graph, found, lambda s, x, y, e: (2 * y, None))
    same_numbers(jax.jit(doubled)(params, {}, x)[0], 2 * jax.jit(fn)(params, x), terms=200)


def test_what_cannot_be_grafted_is_named():
    p = {"stack": jnp.stack([kernel(3, 3)] * 2), "w": kernel(3, 3)}

    def looped(p, x):
        x = lax.scan(lambda x, w: (conv(x, w), None), x, p["stack"])[0]
        return conv(x, p["w"]).mean((1, 2))

    def twice(p, x):
        return conv(conv(x, p["w"]), p["w"]).mean((1, 2))

    @jax.custom_jvp
    def own(x, w):
        return conv(x, w)

    own.defjvp(lambda xs, ts: (own(*xs), conv(ts[0], xs[1]) + conv(xs[0], ts[1])))

    def leaving(p, x):  # remat ends between the convolution and its scale
        return (jax.checkpoint(lambda x: conv(x, p["w"]))(x) * p["scale"]).mean((1, 2))

    cases = [(looped, p, "stack", "loop", looped), (twice, {"w": p["w"]}, "w", "2 times", twice),
             (lambda p, x: own(x, p["w"]).mean((1, 2)), {"w": p["w"]}, "w", "custom derivative", own),
             (leaving, {"w": p["w"], "scale": jnp.ones(3)}, "w", "rematerialisation", leaving)]  # fmt: skip
    for fn, params, leaf, why, _ in cases:
        graph = jprune.trace(fn, params, IMAGES)
        with pytest.raises(SiteError, match=f"(?s){leaf!r}.*{why}.*test_sites.py:\\d+"):
            select(graph, [leaf])
    with pytest.raises(SiteError, match="'v' is no convolution's kernel"):
        select(jprune.trace(looped, p, IMAGES), ["v"])
    graph = jprune.trace(looped, p, IMAGES)
    assert set(select(graph, ["w"])) == {"w"}  # the others stay usable
    with pytest.raises(ValueError, match="'w' is missing"):
        graft(graph, select(graph, ["w"]), keep_it)({"stack": p["stack"]}, {}, IMAGES)


def test_normalisation_as_numbers():
    """factor * convolution + shift, read off the function."""
    model = resnet.small((1,), widths=(4,))
    variables = lively(jax.eval_shape(model.init, KEY, IMAGES))
    graph = jprune.trace(model.apply, variables, IMAGES)
    p, s = (variables[k]["stage1_block1"]["bn2"] for k in ("params", "batch_stats"))
    factor, shift = folded(graph, sites(graph)[0], variables, IMAGES)["params/stage1_block1/conv2/kernel"]
    np.testing.assert_allclose(factor, p["scale"] / jnp.sqrt(s["var"] + 1e-5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shift, p["bias"] - s["mean"] * factor, rtol=1e-4, atol=1e-5)
    p, x = first_weights(), jnp.moveaxis(IMAGES, 3, 1)
    graph = jprune.trace(channels_first, p, x)
    factor, shift = folded(graph, sites(graph)[0], p, x)["b"]
    np.testing.assert_allclose(factor, jnp.ones(5), rtol=1e-6)
    np.testing.assert_allclose(shift, p["bias_b"], rtol=1e-6)


def test_linen_branches_with_other_kinds_of_normalisation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(2)(nn.Conv(4, (3, 3), name="grouped")(x))  # statistics of each image: not per channel
            return nn.Conv(4, (3, 3), name="bare", use_bias=False)(nn.relu(x)).mean((1, 2))

    variables = lively(jax.eval_shape(Net().init, KEY, IMAGES))
    found, _ = sites(jprune.trace(Net().apply, variables, IMAGES))
    assert found["params/grouped/kernel"].norm == ("params/grouped/bias",)
    assert found["params/bare/kernel"].norm == ()
