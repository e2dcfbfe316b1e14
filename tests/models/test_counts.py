"""MACs, parameters, groups and units of every network of the zoo, against numbers computed by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jprune
from jprune.models import MODELS, build, densenet, mobilenet, resnet, shufflenet, unet, vgg, vit


@functools.lru_cache(64)  # many networks are in several of the tables
def graph_of(module, image):
    """The graph of a module for two images, from shapes alone."""
    x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    return jprune.trace(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)


SMALL, LARGE = (32, 32, 3), (224, 224, 3)

COUNTS = {  # name: (module, image, MACs of one image, parameters)
    "resnet20_pad": (resnet.cifar(20, 10, "pad"), SMALL, 40_551_040, 269_722),
    "resnet20": (resnet.cifar(20), SMALL, 40_813_184, 272_474),
    "resnet32_pad": (resnet.cifar(32, 10, "pad"), SMALL, 68_862_592, 464_154),
    "resnet32": (resnet.cifar(32), SMALL, 69_124_736, 466_906),
    "resnet56_pad": (resnet.cifar(56, 10, "pad"), SMALL, 125_485_696, 853_018),
    "resnet56": (resnet.cifar(56), SMALL, 125_747_840, 855_770),
    "resnet110_pad": (resnet.cifar(110, 10, "pad"), SMALL, 252_887_680, 1_727_962),
    "resnet110": (resnet.cifar(110), SMALL, 253_149_824, 1_730_714),
    "vgg16_bias": (vgg.vgg(16, bias=True), SMALL, 313_201_664, 14_728_266),
    "vgg16": (vgg.vgg(16), SMALL, 313_201_664, 14_724_042),
    "vgg16_bias_100": (vgg.vgg(16, 100, bias=True), SMALL, 313_247_744, 14_774_436),
    "vgg16_100": (vgg.vgg(16, 100), SMALL, 313_247_744, 14_770_212),
    "vgg19_bias": (vgg.vgg(19, bias=True), SMALL, 398_136_320, 20_040_522),
    "vgg19": (vgg.vgg(19), SMALL, 398_136_320, 20_035_018),
    "vgg19_bias_100": (vgg.vgg(19, 100, bias=True), SMALL, 398_182_400, 20_086_692),
    "vgg19_100": (vgg.vgg(19, 100), SMALL, 398_182_400, 20_081_188),
    "vgg19_four_pools": (vgg.vgg(19, 100, bias=True, pools=(1, 2, 3, 5)), SMALL, 511_428_608, 20_086_692),
    "mobilenet_small": (mobilenet.mobilenet_v2(10, small_images=True), SMALL, 87_976_448, 2_236_682),
    "mobilenet_projection": (
        mobilenet.mobilenet_v2(10, small_images=True, projection=True),
        SMALL,
        91_154_944,
        2_296_922,
    ),
    "shufflenet_small": (shufflenet.shufflenet_v2(10, small_images=True), SMALL, 45_002_112, 1_263_854),
    "resnet18_small_stem": (resnet.imagenet(18, 10, small_stem=True), SMALL, 555_422_720, 11_173_962),
    "resnet18": (resnet.imagenet(18), LARGE, 1_814_073_344, 11_689_512),
    "resnet34": (resnet.imagenet(34), LARGE, 3_663_761_408, 21_797_672),
    "resnet50": (resnet.imagenet(50), LARGE, 4_089_184_256, 25_557_032),
    "mobilenet": (mobilenet.mobilenet_v2(), LARGE, 300_774_272, 3_504_872),
    "shufflenet": (shufflenet.shufflenet_v2(), LARGE, 144_907_992, 2_278_604),
    "shufflenet_half": (shufflenet.shufflenet_v2(multiplier=0.5), LARGE, 40_476_448, 1_366_792),
    "vgg16_imagenet": (vgg.vgg(16, 1000, imagenet=True), LARGE, 15_470_264_320, 138_365_992),
    "vgg19_imagenet": (vgg.vgg(19, 1000, imagenet=True), LARGE, 19_632_062_464, 143_678_248),
    "densenet121": (densenet.densenet121(), LARGE, 2_834_161_664, 7_978_856),
}


def quick_first(names):
    """The names, the deepest networks' tests as slow ones."""
    deep = ("densenet121", "resnet110")
    return [pytest.param(n, marks=pytest.mark.slow) if n in deep else n for n in names]


@pytest.mark.parametrize("name", quick_first(COUNTS))
def test_counts_are_the_networks(name):
    module, image, macs, params = COUNTS[name]
    cost = graph_of(module, image).cost()
    assert (cost.macs, cost.params) == (2 * macs, params)


def vit_counts(depth, stream, heads, mlp, tokens, patch, classes, token):
    """MACs and parameters of a vision transformer, from its definition."""
    patches = tokens - token
    per_block = tokens * (4 * stream**2 + 2 * stream * mlp) + 2 * tokens**2 * stream
    macs = patches * 3 * patch**2 * stream + depth * per_block + stream * classes
    block = 4 * (stream**2 + stream) + 2 * stream * mlp + mlp + stream + 4 * stream
    params = 3 * patch**2 * stream + stream + tokens * stream + token * stream
    return macs, params + depth * block + 2 * stream + stream * classes + classes


@pytest.mark.parametrize(
    ("name", "image", "arguments"),
    [
        ("vit_base", LARGE, (12, 768, 12, 3072, 197, 16, 1000, 1)),
        ("vit_small", SMALL, (4, 64, 4, 128, 64, 4, 10, 0)),
    ],
)
def test_vit_counts(name, image, arguments):
    cost = graph_of(build(name), image).cost()
    macs, params = vit_counts(*arguments)
    assert (cost.macs, cost.params) == (2 * macs, params)


VIT = (48, 2, 4, 8, 10)  # stream, depth, heads, patch, classes
GROUPS = {  # name: (module, image, groups, units)
    "resnet20_pad": (resnet.cifar(20, 10, "pad"), SMALL, 14, 16 * 4 + 3 * (32 + 64) + 16 + 32),
    "resnet20": (resnet.cifar(20), SMALL, 12, 4 * (16 + 32 + 64)),
    "resnet56_pad": (resnet.cifar(56, 10, "pad"), SMALL, 32, 16 * 10 + 9 * (32 + 64) + 16 + 32),
    "resnet56": (resnet.cifar(56), SMALL, 30, 10 * (16 + 32 + 64)),
    "resnet18": (resnet.imagenet(18), LARGE, 12, 3 * (64 + 128 + 256 + 512)),
    "resnet50": (
        resnet.imagenet(50),
        LARGE,
        37,
        64 + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512) + 256 + 512 + 1024 + 2048,
    ),
    "vgg19": (vgg.vgg(19), SMALL, 16, 2 * (64 + 128) + 4 * (256 + 512 + 512)),
    "vgg16_imagenet": (vgg.vgg(16, imagenet=True), LARGE, 15, 2 * (64 + 128) + 3 * (256 + 512 + 512) + 2 * 4096),
    "mobilenet": (
        mobilenet.mobilenet_v2(10, small_images=True),
        SMALL,
        25,
        # stem, expansions, outputs of the stages, last convolution
        32 + 6 * (16 + 2 * 24 + 3 * 32 + 4 * 64 + 3 * 96 + 3 * 160) + (16 + 24 + 32 + 64 + 96 + 160 + 320) + 1280,
    ),
    "densenet121": (densenet.densenet121(), LARGE, 1 + 2 * 58 + 3, 64 + 58 * (128 + 32) + 128 + 256 + 512),
    "vit": (vit.vit(*VIT, mlp=96, fused=False), SMALL, 9, 48 + 2 * (4 + 12 + 12 + 96)),
    "vit_fused": (vit.vit(*VIT, mlp=96), SMALL, 7, 48 + 2 * (4 + 12 + 96)),
    "unet": (unet.unet(8), SMALL, 12, 2 * (8 + 16 + 32) + 3 * (16 + 8)),
    # each convolution of width w is 4 norm groups of w / 4 positions; upsampled widths have no norm
    "unet_group": (unet.unet(8, norm="group"), SMALL, 22, 10 * 4 + (2 + 4 + 8) * 2 + (4 + 2) * 2 + 16 + 8),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", quick_first(GROUPS))
def test_groups_are_those_found_by_hand(name):
    module, image, groups, units = GROUPS[name]
    graph = graph_of(module, image)
    assert (len(graph.groups), sum(g.size for g in graph.groups.values())) == (groups, units)


def test_shufflenet_units():
    """A width of 116 is halved once and no further by whole pairs, so a few units next to each cut stay frozen."""
    graph = graph_of(shufflenet.shufflenet_v2(10, small_images=True), SMALL)
    assert sum(g.size for g in graph.groups.values()) >= 3535


PRIMITIVES = {  # a release of jax that renames one has to fail here, and not freeze half of a model
    "add", "broadcast_in_dim", "concatenate", "conv_general_dilated", "convert_element_type", "copy",
    "custom_jvp_call", "div", "dot_general", "erfc", "exp", "jit", "max", "min", "mul", "neg", "pad", "reduce_max",
    "reduce_sum", "reduce_window_max", "reduce_window_sum", "reshape", "rsqrt", "slice", "squeeze", "stop_gradient",
    "sub", "transpose", "unstack",
}  # fmt: skip


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and the ones inside it."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    names |= primitives(inner)
    return names


@pytest.mark.smoke
@pytest.mark.parametrize("name", quick_first(MODELS))
def test_every_group_is_exact_and_every_primitive_known(name):
    graph = graph_of(build(name), MODELS[name].image)
    assert graph.groups and all(g.exact for g in graph.groups.values()), graph.summary()
    codes = {reason.code for leaf in graph.leaves.values() for reason in leaf.frozen if reason is not None}
    assert not graph.unsupported and not codes & {"UNSUPPORTED", "OPAQUE", "UNUSED"}, graph.explain()
    assert primitives(graph.jaxpr.jaxpr) <= PRIMITIVES
