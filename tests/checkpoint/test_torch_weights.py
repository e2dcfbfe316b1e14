"""torchvision's and timm's weights in the zoo's modules: the same logits; and what is said about files that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from laws import relative
from safetensors.numpy import save_file

import jprune
from jprune.budget import Target, uniform
from jprune.checkpoint import from_torch, load_torch
from jprune.importance import magnitude
from jprune.models import (
    build,
    densenet,
    mobilenet,
    rebuild,
    resnet,
    shufflenet,
    unet,
    vgg,
    vit,
)

# -- without torch: small networks, names and shapes written out ---------------------------------------------------


def tensors(shapes, seed=0):
    """Random tensors of these shapes; a name that ends in '.bn' stands for the five of a BatchNorm."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        if name.endswith("bn"):
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                out[f"{name.removesuffix('.bn')}.{leaf}"] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            out[f"{name.removesuffix('.bn')}.num_batches_tracked"] = np.array(7)
        else:
            out[name] = rng.normal(size=shape).astype(np.float32)
    return out


RESNET = resnet.small((1, 1), 5, widths=(4, 6))
RESNET_SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "bn1.bn": (4,),
    "layer1.0.conv1.weight": (4, 4, 3, 3),
    "layer1.0.bn1.bn": (4,),
    "layer1.0.conv2.weight": (4, 4, 3, 3),
    "layer1.0.bn2.bn": (4,),
    "layer2.0.conv1.weight": (6, 4, 3, 3),
    "layer2.0.bn1.bn": (6,),
    "layer2.0.conv2.weight": (6, 6, 3, 3),
    "layer2.0.bn2.bn": (6,),
    "layer2.0.downsample.0.weight": (6, 4, 1, 1),
    "layer2.0.downsample.1.bn": (6,),
    "fc.weight": (5, 6),
    "fc.bias": (5,),
}
THIN_VGG = vgg.VGG(vgg.VGGConfig(((3,), (5,)), (7,), 4, True, 2, (1, 2)))
VGG_SHAPES = {
    "features.0.weight": (3, 3, 3, 3),
    "features.0.bias": (3,),
    "features.1.bn": (3,),
    "features.4.weight": (5, 3, 3, 3),
    "features.4.bias": (5,),
    "features.5.bn": (5,),
    "classifier.0.weight": (7, 20),
    "classifier.0.bias": (7,),
    "classifier.3.weight": (4, 7),
    "classifier.3.bias": (4,),
}
THIN_VIT = vit.vit(6, 1, 2, 4, 5, mlp=7)
VIT_SHAPES = {
    "cls_token": (1, 1, 6),
    "pos_embed": (1, 5, 6),
    "patch_embed.proj.weight": (6, 1, 4, 4),
    "patch_embed.proj.bias": (6,),
    "blocks.0.norm1.weight": (6,),
    "blocks.0.norm1.bias": (6,),
    "blocks.0.attn.qkv.weight": (18, 6),
    "blocks.0.attn.qkv.bias": (18,),
    "blocks.0.attn.proj.weight": (6, 6),
    "blocks.0.attn.proj.bias": (6,),
    "blocks.0.norm2.weight": (6,),
    "blocks.0.norm2.bias": (6,),
    "blocks.0.mlp.fc1.weight": (7, 6),
    "blocks.0.mlp.fc1.bias": (7,),
    "blocks.0.mlp.fc2.weight": (6, 7),
    "blocks.0.mlp.fc2.bias": (6,),
    "norm.weight": (6,),
    "norm.bias": (6,),
    "head.weight": (5, 6),
    "head.bias": (5,),
}


def used_once(variables, given):
    """Whether the leaves hold the tensors' values, each exactly once."""
    ours = np.sort(np.concatenate([np.ravel(x) for x in jax.tree.leaves(variables)]))
    theirs = np.concatenate([np.ravel(x) for n, x in given.items() if not n.endswith("num_batches_tracked")])
    return ours.shape == theirs.shape and bool((ours == np.sort(theirs)).all())


def test_a_resnet_takes_every_tensor_once(tmp_path):
    given = tensors(RESNET_SHAPES)
    save_file(given, tmp_path / "model.safetensors")
    variables = load_torch(RESNET, tmp_path / "model.safetensors")
    assert used_once(variables, given)
    params, stats = variables["params"], variables["batch_stats"]
    block = params["stage2_block1"]
    np.testing.assert_array_equal(
        block["shortcut_conv"]["kernel"][0, 0], given["layer2.0.downsample.0.weight"][..., 0, 0].T
    )
    np.testing.assert_array_equal(block["conv1"]["kernel"][0, 2, 1], given["layer2.0.conv1.weight"][:, 1, 0, 2])
    np.testing.assert_array_equal(block["bn2"]["scale"], given["layer2.0.bn2.weight"])
    np.testing.assert_array_equal(stats["stem_bn"]["mean"], given["bn1.running_mean"])
    np.testing.assert_array_equal(stats["stem_bn"]["var"], given["bn1.running_var"])
    np.testing.assert_array_equal(params["head"]["kernel"], given["fc.weight"].T)
    initial = jax.eval_shape(RESNET.init, jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (variables, initial))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_flattened_feature_map_is_reordered(library):
    given = tensors(VGG_SHAPES)
    weight = given["classifier.0.weight"]
    if library == "timm":  # its head is made of convolutions
        names = {"classifier.0": "pre_logits.fc1", "classifier.3": "head.fc"}
        given = {
            names.get(n.rpartition(".")[0], n.rpartition(".")[0]) + "." + n.rpartition(".")[2]: x
            for n, x in given.items()
        }
        given["pre_logits.fc1.weight"] = weight.reshape(7, 5, 2, 2)
    variables = from_torch(THIN_VGG, given)
    assert used_once(variables, given)
    kernel = np.asarray(variables["params"]["dense1"]["kernel"]).reshape(2, 2, 5, 7)
    np.testing.assert_array_equal(kernel, weight.reshape(7, 5, 2, 2).transpose(2, 3, 1, 0))


@pytest.mark.parametrize("fused", [True, False])
def test_heads_are_cut_out_of_the_fused_kernel(fused):
    given = tensors(VIT_SHAPES)
    module = THIN_VIT.clone(config=dataclasses.replace(THIN_VIT.config, fused=fused))
    variables = from_torch(module, given)
    assert used_once(variables, given)
    attention = variables["params"]["block1_attn"]
    weight, bias = given["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.bias"]
    for k, name in enumerate(("query", "key", "value")):
        part = jax.tree.map(lambda x, k=k: x[..., k, :, :], attention["qkv"]) if fused else attention[name]
        for h in range(2):
            rows = slice(6 * k + 3 * h, 6 * k + 3 * h + 3)
            np.testing.assert_array_equal(part["kernel"][:, h], weight[rows].T)
            np.testing.assert_array_equal(part["bias"][h], bias[rows])
    np.testing.assert_array_equal(attention["proj"]["kernel"][1, 2], given["blocks.0.attn.proj.weight"][:, 5])
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)  # one channel; four patches and the token
    assert jax.eval_shape(module.apply, variables, images).shape == (2, 5)


def test_half_precision_stays():
    given = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors(VIT_SHAPES).items()}
    assert {x.dtype for x in jax.tree.leaves(from_torch(THIN_VIT, given))} == {jnp.dtype(jnp.bfloat16)}


def without(given, name):
    return {n: x for n, x in given.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: without(t, "layer1.0.bn2.running_var"),
            r"'layer1\.0\.bn2\.running_var' of a ResNet is missing: build",
        ),
        (lambda t: without(t, "conv1.weight"), r"'conv1\.weight' of a ResNet is missing: build the module"),
        (
            lambda t: {**t, "layer3.0.conv1.weight": t["fc.weight"]},
            r"'layer3\.0\.conv1\.weight' has no place in this ResNet",
        ),
        (
            lambda t: {**t, "fc.weight": t["fc.weight"][:4]},
            r"'fc\.weight' of shape \(4, 6\).*'params/head/kernel'.*classes",
        ),
        (lambda t: {**t, "fc.bias": t["fc.bias"][:4]}, r"'fc\.bias' of shape \(4,\)"),
        (lambda t: {**t, "bn1.weight": t["bn1.weight"][:3]}, r"'bn1\.weight' of shape \(3,\).*scale' of shape \(4,\)"),
        (
            lambda t: {**t, "layer2.0.conv1.weight": t["layer2.0.conv1.weight"].transpose(1, 0, 2, 3)},
            r"'layer2\.0\.conv1\.weight' of shape \(4, 6, 3, 3\)",
        ),
        (lambda t: {**t, "layer1.0.conv1.weight": t["layer1.0.conv1.weight"][0]}, r"of shape \(4, 3, 3\) does not fit"),
        (
            lambda t: {**t, "conv1.weight": t["conv1.weight"][0]},
            r"'conv1\.weight' has shape \(3, 3, 3\), not that of a conv",
        ),
        (lambda t: {**t, "fc.bias": t["fc.bias"].astype(np.int8)}, r"'fc\.bias' is int8, not floating.*quantisation"),
        (lambda t: {f"model.{n}": x for n, x in t.items()}, r"all names begin with 'model\.': take it off"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_torch(RESNET, change(tensors(RESNET_SHAPES)))


def test_position_embeddings_say_how_many_tokens():
    given = tensors(VIT_SHAPES)
    with pytest.raises(ValueError, match="'pos_embed' of a ViT is missing"):
        from_torch(THIN_VIT, without(given, "pos_embed"))
    with pytest.raises(ValueError, match=r"'pos_embed' has shape \(5, 6\), not \(1, tokens, width\)"):
        from_torch(THIN_VIT, {**given, "pos_embed": given["pos_embed"][0]})
    with pytest.raises(ValueError, match="'cls_token' has no place in this ViT"):
        from_torch(vit.vit(6, 1, 2, 4, 5, mlp=7, pool="mean"), given)


def test_models_without_counterpart():
    with pytest.raises(ValueError, match=r"no PyTorch names are known for UNet, only for ResNet, .*ViT: write"):
        from_torch(unet.unet(4), {})
    with pytest.raises(ValueError, match=r"block1 has a convolution on its shortcut.*without projection"):
        from_torch(mobilenet.mobilenet_v2(10, small_images=True, projection=True), {})


def test_files_that_are_no_safetensors(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"model\.pth is a pickle, which can run code.*safetensors\.torch\.save_file"):
        load_torch(RESNET, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="there is no file"):
        load_torch(RESNET, tmp_path / "model.safetensors")


# -- beside torch --------------------------------------------------------------------------------------------------


def peers():
    from experiments.peers import peer

    return peer("torch"), peer("torchvision").models, peer("timm")


def thin_vgg(tv):
    """VGG-16 with a thin head: at its full width it takes half a gigabyte and shows no more."""
    torch = peers()[0]
    model = tv.VGG(tv.vgg16_bn().features, num_classes=10, init_weights=False)
    model.classifier = torch.nn.Sequential(
        torch.nn.Linear(512 * 49, 64), torch.nn.ReLU(), torch.nn.Dropout(),
        torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(48, 10),
    )  # fmt: skip
    return model


VIT = (48, 2, 4, 8, 10)  # stream, depth, heads, patch, classes
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
THIN_HEAD = dataclasses.replace(vgg.vgg(16, 10, imagenet=True).config, hidden=(64, 48))

CASES = {  # name: ((torchvision.models, timm) -> model, ours, side of the images: 60 has even and odd maps)
    "resnet18": (lambda tv, timm: tv.resnet18(), build("resnet18"), 60),
    "resnet34": (lambda tv, timm: tv.resnet34(num_classes=10), resnet.imagenet(34, 10), 60),
    "resnet50": (lambda tv, timm: tv.resnet50(), build("resnet50"), 60),
    "timm resnet18": (lambda tv, timm: timm.create_model("resnet18"), build("resnet18"), 60),
    "timm resnet50": (lambda tv, timm: timm.create_model("resnet50"), build("resnet50"), 60),
    "vgg16_bn": (lambda tv, timm: thin_vgg(tv), vgg.VGG(THIN_HEAD), 224),
    "mobilenet_v2": (lambda tv, timm: tv.mobilenet_v2(), build("mobilenet_v2"), 60),
    "timm mobilenetv2_100": (lambda tv, timm: timm.create_model("mobilenetv2_100"), build("mobilenet_v2"), 60),
    "shufflenet_v2_x0_5": (lambda tv, timm: tv.shufflenet_v2_x0_5(), shufflenet.shufflenet_v2(1000, 0.5), 60),
    "densenet": (
        lambda tv, timm: tv.DenseNet(8, (2, 3, 2, 2), 16, num_classes=10),
        densenet.densenet((2, 3, 2, 2), 8, 16, 10),
        60,
    ),
    "vit_b_16 of torchvision, small": (
        lambda tv, timm: tv.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10),
        vit.vit(*VIT, mlp=96),
        32,
    ),
    "timm vit_tiny_patch16_224": (
        lambda tv, timm: timm.create_model("vit_tiny_patch16_224"),
        vit.vit(192, 12, 3, 16, 1000),
        224,
    ),
    "timm vit, mean of the patches": (
        lambda tv, timm: timm.models.VisionTransformer(class_token=False, global_pool="avg", **TIMM_VIT),
        vit.vit(*VIT, pool="mean", fused=False),
        32,
    ),
}


def randomise(torch, model, seed=0):
    """Weights and statistics far from the initial ones, so that no two layers and no two channels are alike."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var") or (name.endswith("weight") and x.ndim == 1):
                x.uniform_(0.5, 1.5)
            elif name.endswith("weight"):
                x.normal_(0, (2 / x[0].numel()) ** 0.5)
            elif x.is_floating_point():
                x.normal_(0, 0.4)
    return model.eval()


def loaded(name, path):
    """(module, variables, images, torch's logits) of a case whose weights went through a file."""
    torch, tv, timm = peers()
    from safetensors.torch import save_file as save

    make, module, side = CASES[name]
    model = randomise(torch, make(tv, timm))
    save(model.state_dict(), path)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        want = model(x).numpy()
    return module, load_torch(module, path), jnp.asarray(x.permute(0, 2, 3, 1).numpy()), want


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_torch(name, tmp_path):
    module, variables, x, want = loaded(name, tmp_path / "model.safetensors")
    apply = jax.jit(module.apply)
    assert relative(apply(variables, x), want) <= 1e-4
    # and the statistics matter: without the file's, the logits are others
    if "batch_stats" in variables:
        for leaf, wrong in (("mean", 0.0), ("var", 1.0)):
            other = jax.tree_util.tree_map_with_path(
                lambda p, a, leaf=leaf, wrong=wrong: jnp.full_like(a, wrong) if p[-1].key == leaf else a, variables
            )
            assert relative(apply(other, x), want) > 1e-2


@pytest.mark.reference
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet", "vit_b_16 of torchvision, small", "timm vit, mean of the patches"]
)
def test_loaded_and_pruned_by_magnitude(name, tmp_path):
    module, variables, x, want = loaded(name, tmp_path / "model.safetensors")
    graph = jprune.trace(module.apply, variables, x)
    keep = uniform(graph, magnitude(graph, variables), Target.macs(0.5)).keep
    small = graph.compact(variables, keep)
    got = jax.jit(graph.replay(keep))(small, x)
    assert relative(jax.jit(rebuild(module, small).apply)(small, x), got) <= 1e-4
    assert relative(jax.jit(module.apply)(graph.mask(variables, keep), x), got) <= 1e-4
    assert relative(got, want) > 1e-2
