"""`rebuild` of a pruned tree is the replayed function, or says why it cannot be; never another function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from laws import lively, relative, same_numbers, subset

import jprune
from jprune.models import MODELS, build, densenet, mobilenet, rebuild, resnet, shufflenet, unet, vgg, vit

SMALL, LARGE = (32, 32, 3), (64, 64, 3)
VIT_TERMS = 192 + 2 * (48 + 12 + 64 + 48 + 48 + 192)  # products behind an output: patches, then two blocks of 48
THIN_VGG = vgg.VGG(vgg.VGGConfig(((6,), (8, 8), (10,)), (12, 14), 7, True, 4, (1, 2, 3)))
TWO_HEADS = vit.ViT(vit.ViTConfig(8, 24, (vit.ViTBlock(2, 4, 4, 20), vit.ViTBlock(4, 6, 6, 12)), 5))

CASES = {  # every family, every option of its config; deep zoo entries stand for more of the same blocks
    "resnet20": (resnet.cifar(20), SMALL),
    "resnet_digits": (build("resnet_digits"), (8, 8, 1)),
    "resnet18": (resnet.imagenet(18, 10), LARGE),
    "resnet50": (resnet.imagenet(50, 10), LARGE),
    "resnet18_small_stem": (resnet.imagenet(18, 10, small_stem=True), SMALL),
    "vgg16": (vgg.vgg(16), SMALL),
    "vgg_three_pools": (vgg.VGG(dataclasses.replace(THIN_VGG.config, hidden=(), pool_to=1, pools=(2, 3))), SMALL),
    "vgg_imagenet_head": (THIN_VGG, SMALL),
    "mobilenet": (mobilenet.mobilenet_v2(10), LARGE),
    "mobilenet_projection": (mobilenet.mobilenet_v2(10, small_images=True, projection=True), SMALL),
    "shufflenet": (shufflenet.shufflenet_v2(10, units=(4, 3, 2)), LARGE),
    "shufflenet_small": (shufflenet.shufflenet_v2(10, small_images=True, multiplier=0.5, units=(2, 3, 2)), SMALL),
    "densenet": (densenet.densenet((2, 3, 2, 2), 8, 16, 10), LARGE),
    "densenet_small": (densenet.densenet((2, 2, 2), 6, 8, 10, small_images=True), SMALL),
    "vit_digits": (build("vit_digits"), (8, 8, 1)),
    "vit_token": (vit.vit(48, 2, 4, 8, 10), SMALL),
    "vit_unequal_blocks": (TWO_HEADS, SMALL),
    "vit_separate": (vit.vit(48, 2, 4, 8, 10, fused=False), SMALL),
    "unet": (unet.unet(8), SMALL),
    "unet_resize": (unet.unet(4, 4, upsample="nearest"), SMALL),
}


def setting(module, image, seed=0):
    """(variables, images, graph) with lively random values."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, *image)), jnp.float32)
    variables = lively(jax.eval_shape(module.init, jax.random.key(0), x), seed)
    return variables, x, jprune.trace(module.apply, variables, x)


def shapes(tree):
    return jax.tree.map(lambda a: (tuple(a.shape), str(a.dtype)), tree)


def check_rebuilt(module, image, groups=None):
    """The rebuilt module applies to what replay ran, and re-initialises to its shapes."""
    variables, x, graph = setting(module, image)
    keep = subset(graph, np.random.default_rng(1), groups)
    small = graph.compact(variables, keep)
    rebuilt = rebuild(module, small)
    want = jax.jit(graph.replay(keep))(small, x)
    assert relative(jax.jit(rebuilt.apply)(small, x), want) <= 1e-4
    assert relative(jax.jit(module.apply)(variables, x), want) > 1e-2, "pruning changed nothing: the test is blind"
    assert shapes(jax.eval_shape(rebuilt.init, jax.random.key(1), x)) == shapes(small)
    return rebuilt, small, keep


LONG = {
    "resnet18",
    "resnet18_small_stem",
    "resnet50",
    "mobilenet",
    "mobilenet_projection",
    "shufflenet",
    "densenet",
    "vgg16",
    "unet_resize",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CASES])
def test_rebuilt_module_is_the_replayed_function(name):
    check_rebuilt(*CASES[name])


def test_every_family_of_the_zoo_is_among_the_cases():
    assert {type(build(n)) for n in MODELS} == {type(m) for m, _ in CASES.values()}


@pytest.mark.parametrize("name", ["resnet110", "vgg16_bn_imagenet", "mobilenet_v2", "shufflenet_v2", "vit_base"])
def test_an_unpruned_tree_gives_the_same_shapes(name):
    module = build(name)
    x = jax.ShapeDtypeStruct((2, *MODELS[name].image), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    rebuilt = rebuild(module, variables)
    assert rebuild(module, variables["params"]) == rebuilt
    assert shapes(jax.eval_shape(rebuilt.init, jax.random.key(0), x)) == shapes(variables)


def test_twice_pruned():
    """The second pruning starts from the rebuilt module; the vision transformer keeps its trained constants."""
    module = CASES["vit_token"][0]
    variables, _, graph = setting(*CASES["vit_token"])
    small = graph.compact(variables, subset(graph, np.random.default_rng(1)))
    first = rebuild(module, small)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, *SMALL)), jnp.float32)
    graph = jprune.trace(first.apply, small, x)
    keep = subset(graph, np.random.default_rng(4))
    smaller = graph.compact(small, keep)
    want = jax.jit(graph.replay(keep))(smaller, x)
    assert rebuild(first, smaller) == rebuild(module, smaller)
    assert relative(jax.jit(rebuild(first, smaller).apply)(smaller, x), want) <= 1e-4


# -- what a config cannot say --------------------------------------------------------------------------------------


def test_pad_shortcuts_say_what_no_array_shows():
    module = resnet.small((1, 1), 10, "pad", (8, 16))
    variables, _, graph = setting(module, SMALL)
    padded = [g for g in graph.groups if graph.groups[g].size in (4,)]
    assert len(padded) == 2  # the zero channels before and after the carried ones
    keep = subset(graph, np.random.default_rng(0), padded)
    with pytest.raises(ValueError, match=r"stage2_block1 pads 8 channels.*graph\.replay.*projection"):
        rebuild(module, graph.compact(variables, keep))
    check_rebuilt(module, SMALL, set(graph.groups) - set(padded))


def test_group_norm_widths_want_replay():
    module = unet.unet(8, norm="group")
    variables, _, graph = setting(module, SMALL)
    assert graph.groups["params/up1_raise/kernel:3"].exact  # no norm behind the upsampling
    check_rebuilt(module, SMALL, {"params/up1_raise/kernel:3", "params/up2_raise/kernel:3"})
    for g in graph.groups:
        if "_raise" not in g:
            small = graph.compact(variables, subset(graph, np.random.default_rng(0), {g}))
            with pytest.raises(ValueError, match=r"GroupNorm .*_norm\d.*graph\.replay"):
                rebuild(module, small)


def test_an_emptied_group_wants_replay():
    module = densenet.densenet((2, 2), 4, 8, 5, small_images=True)
    variables, _, graph = setting(module, SMALL)
    gone = graph.compact(
        variables, graph.decide({"params/block1_layer2_conv2/kernel:3": np.zeros(4, bool)}, allow_empty=True)
    )
    with pytest.raises(ValueError, match=r"leaf '.*' has no elements.*graph\.replay"):
        rebuild(module, gone)


# -- vision transformers with one kernel for query, key and value -------------------------------------------------


def test_unfuse_is_the_same_function_and_frees_the_head_sizes():
    module, image = CASES["vit_token"]
    variables, x, graph = setting(module, image)
    apart, split = vit.unfuse(module, variables)
    same_numbers(jax.jit(apart.apply)(split, x), jax.jit(module.apply)(variables, x), terms=VIT_TERMS)
    assert set(variables["params"]["block1_attn"]) == {"qkv", "proj"}  # the input is untouched
    sizes = {"params/block1_attn/key/kernel:2", "params/block1_attn/value/kernel:2"}
    assert not sizes & set(graph.groups) and sizes <= set(jprune.trace(apart.apply, split, x).groups)
    rebuilt, _, keep = check_rebuilt(apart, image, sizes)
    block = rebuilt.config.blocks[0]
    assert (block.head, block.value_head) == tuple(keep[g].sum() for g in sorted(sizes))
    assert block.head != block.value_head and block.scale_head == 12


def test_unfuse_after_pruning():
    rebuilt, small, _ = check_rebuilt(*CASES["vit_unequal_blocks"])
    apart, split = vit.unfuse(rebuilt, small)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, *SMALL)), jnp.float32)
    same_numbers(jax.jit(apart.apply)(split, x), jax.jit(rebuilt.apply)(small, x), terms=VIT_TERMS)
    assert vit.unfuse(apart, split) == (apart, split)
    assert "params" not in vit.unfuse(rebuilt, small["params"])[1]


def test_a_fused_config_of_two_head_sizes_is_refused():
    module = vit.ViT(vit.ViTConfig(8, 16, (vit.ViTBlock(2, 8, 4, 16),), 5))
    with pytest.raises(ValueError, match="heads of 8 and value heads of 4 do not fit one kernel: use fused=False"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


# -- other trees ---------------------------------------------------------------------------------------------------


def abstract(name):
    module = build(name)
    image = jax.ShapeDtypeStruct((1, *MODELS[name].image), jnp.float32)
    return module, jax.eval_shape(module.init, jax.random.key(0), image)


@pytest.mark.parametrize(
    ("module", "tree", "message"),
    [
        ("resnet20", "vgg16_bn", "no 'stage1_block1'"),
        ("resnet56", "resnet20", "no 'stage1_block4'"),
        ("resnet20", "resnet56", "leaf 'batch_stats/stage1_block4/bn1/mean' is none of this ResNet"),
        ("resnet18", "resnet50", "leaf 'batch_stats/stage1_block1/bn3/mean' is none of this ResNet"),
        ("vgg16_bn", "resnet20", "no 'block1_conv1'"),
        ("vgg16_bn", "vgg19_bn", "leaf 'batch_stats/block3_bn4/mean' is none of this VGG"),
        ("vgg16_bn_imagenet", "vgg16_bn", "no 'dense1'"),
        ("mobilenet_v2", "shufflenet_v2", "no 'block1'"),
        ("shufflenet_v2", "mobilenet_v2", "no 'stage1_unit1'"),
        ("densenet_small", "resnet20", "no 'block1_layer1_conv1'"),
        ("vit_small", "resnet20", "no 'block1_attn'"),
        ("vit_base", "vit_small", "no 'block5_attn'"),
        ("unet_small", "vgg16_bn", "no 'down1_conv1'"),
    ],
)
def test_another_models_tree_names_a_leaf(module, tree, message):
    with pytest.raises(ValueError, match=message):
        rebuild(abstract(module)[0], abstract(tree)[1])


def test_a_tree_whose_widths_disagree_names_the_leaf():
    module, tree = abstract("resnet20")
    tree["params"]["stage1_block1"]["bn1"]["scale"] = jax.ShapeDtypeStruct((15,), jnp.float32)
    with pytest.raises(ValueError, match=r"stage1_block1/bn1/scale' has shape \(15,\).*\(16,\)"):
        rebuild(module, tree)
    module, tree = abstract("resnet20")
    tree["params"]["stage1_block2"]["conv2"]["kernel"] = jax.ShapeDtypeStruct((3, 3, 16, 15), jnp.float32)
    with pytest.raises(ValueError, match="widths of this ResNet do not fit each other"):
        rebuild(module, tree)
    module, tree = abstract("resnet20")
    del tree["batch_stats"]["stem_bn"]["mean"]
    with pytest.raises(ValueError, match="no leaf 'batch_stats/stem_bn/mean'"):
        rebuild(module, tree)


def test_things_that_are_no_tree():
    module = build("resnet20")
    with pytest.raises(ValueError, match="the variables are a list"):
        rebuild(module, [1, 2])
    with pytest.raises(ValueError, match="'stage1_block1/conv1/kernel' is a dict, not an array"):
        rebuild(module, {"stage1_block1": {"conv1": {"kernel": {}}}})
    with pytest.raises(ValueError, match=r"Dense is not a model of the zoo.*graph\.replay"):
        rebuild(nn.Dense(3), {})


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match="no model 'resnet21' in the zoo: did you mean resnet"):
        build("resnet21")
    with pytest.raises(ValueError, match=r"did you mean densenet121, .*vit_small"):
        build("???")


def test_bad_arguments_of_the_constructors():
    for make, message in (
        (lambda: resnet.cifar(21), "depth 6n \\+ 2"),
        (lambda: resnet.imagenet(19), "18, 34 or 50"),
        (lambda: resnet.small((1,), shortcut="none"), "'projection' or 'pad'"),
        (lambda: vgg.vgg(11), "16 or 19"),
        (lambda: shufflenet.shufflenet_v2(multiplier=2.0), "not 2.0"),
        (lambda: vit.vit(10, 1, 3, 4, 5), "3 heads do not divide"),
        (lambda: vit.vit(12, 1, 3, 4, 5, pool="max"), "'token' or 'mean'"),
        (lambda: unet.unet(norm="layer"), "'batch' or 'group'"),
        (
            lambda: jax.eval_shape(vgg.vgg(16, imagenet=True).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))),
            "224 pixels",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
