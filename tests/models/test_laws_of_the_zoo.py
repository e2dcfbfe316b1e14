"""The laws on every network of the zoo: what is pruned computes what is masked, and no group is tested on dead signals.

Small images, so that the sizes of maps do not matter but all widths are the real ones; the large networks are slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import check_laws, lively, relative, subset

import jprune
from jprune.models import MODELS, build, densenet, shufflenet

SMALL = {  # name: image
    "resnet20_pad": (8, 8, 3),
    "resnet_digits": (8, 8, 1),
    "vit_digits": (8, 8, 1),
    "unet_small": (16, 16, 3),
}
LARGE = {  # name: (image, relative tolerance)
    "resnet20": ((8, 8, 3), 1e-5),
    "resnet32": ((8, 8, 3), 1e-5),
    "resnet32_pad": ((8, 8, 3), 1e-5),
    "resnet56": ((8, 8, 3), 1e-4),
    "resnet56_pad": ((8, 8, 3), 1e-4),
    "resnet110": ((8, 8, 3), 1e-4),
    "resnet110_pad": ((8, 8, 3), 1e-4),
    "resnet18": ((32, 32, 3), 1e-5),
    "resnet34": ((32, 32, 3), 1e-5),
    "resnet50": ((32, 32, 3), 1e-4),
    "vgg16_bn": ((32, 32, 3), 1e-5),
    "vgg19_bn": ((32, 32, 3), 1e-5),
    "vgg16_bn_imagenet": ((224, 224, 3), 1e-5),
    "vgg19_bn_imagenet": ((224, 224, 3), 1e-5),
    "mobilenet_v2": ((32, 32, 3), 1e-4),
    "mobilenet_v2_small": ((16, 16, 3), 1e-4),
    "shufflenet_v2": ((32, 32, 3), 1e-4),
    "shufflenet_v2_small": ((16, 16, 3), 1e-4),
    "densenet_small": ((8, 8, 3), 1e-5),
    "densenet121": ((32, 32, 3), 1e-4),
    "vit_small": ((32, 32, 3), 1e-5),
    "vit_base": ((224, 224, 3), 1e-5),
}


def lively_model(module, image, seed=0):
    """(function, variables, input) of a network with random weights that keep its signals alive."""
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, *image)), jnp.float32)
    return module.apply, lively(jax.eval_shape(module.init, jax.random.key(0), x), seed), x


def test_every_network_is_tested():
    assert set(SMALL) | set(LARGE) == set(MODELS) and not set(SMALL) & set(LARGE)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_obey_the_laws(name):
    f, variables, x = lively_model(build(name, 10), SMALL[name])
    check_laws(f, variables, (x,), gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        densenet.densenet((2, 2), 6, 8, 10, small_images=True),
        shufflenet.shufflenet_v2(10, 0.5, small_images=True, units=(2, 2, 2)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_narrow_networks_obey_the_laws(module):
    f, variables, x = lively_model(module, (8, 8, 3))
    check_laws(f, variables, (x,), gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_obey_the_laws(name):
    image, tolerance = LARGE[name]
    f, variables, x = lively_model(build(name, 10), image)
    check_laws(f, variables, (x,), gradients=False, tolerance=tolerance)


def every_group_alone(name, image, tolerance=1e-5):
    """A random proper subset of one group at a time; the reference is compiled once, as masks change no shapes.

    One narrow group among many moves the output little, but still a hundred times more than the tolerance.
    """
    f, variables, x = lively_model(build(name, 10), image, seed=1)
    graph = jprune.trace(f, variables, x)
    whole = jax.jit(f)
    dense = whole(variables, x)
    rng = np.random.default_rng(2)
    for g in graph.groups:
        keep = subset(graph, rng, groups={g})
        want = whole(graph.mask(variables, keep), x)
        got = jax.jit(graph.replay(keep))(graph.compact(variables, keep), x)
        assert relative(got, want) <= tolerance, g
        assert relative(dense, want) > 1e-3, f"masking {g} changes nothing: the test is blind"


def test_every_group_alone():
    every_group_alone("resnet_digits", (8, 8, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_digits", "unet_small", "densenet_small"])
def test_every_group_of_other_networks_alone(name):
    every_group_alone(name, MODELS[name].image)
