"""Our dependency groups beside those of Torch-Pruning, an independent implementation, on the same networks.

Compared are partitions: which output and input channels, by torch's layer names and indices, fall together.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.checkpoint.torch import tables, torch_names
from jprune.models import build, densenet, vit

pytestmark = pytest.mark.reference


def peers():
    from experiments.peers import peer

    return peer("torch"), peer("torchvision").models, peer("timm"), peer("torch_pruning")


def their_groups(model, side, head):
    """Torch-Pruning's groups: per group, {(layer, "out" or "in"): [(unit, channel)]} of convolutions and linear layers."""
    torch, _, _, pruning = peers()
    model.eval()
    loose = [(p, p.dim() - 1) for n, p in model.named_parameters() if "." not in n]  # class token, position embedding
    names = {module: name for name, module in model.named_modules()}
    dependencies = pruning.DependencyGraph().build_dependency(
        model, torch.randn(1, 3, side, side), unwrapped_parameters=loose or None
    )
    groups = []
    for group in dependencies.get_all_groups(ignored_layers=[head(model)]):
        members = collections.defaultdict(list)
        for item in group:
            module = item.dep.target.module
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                way = "out" if dependencies.is_out_channel_pruning_fn(item.dep.handler) else "in"
                assert len(item.root_idxs) == len(item.idxs)
                members[names[module], way] += zip(item.root_idxs, item.idxs, strict=True)
        groups.append(dict(members))
    return groups


def traced(module, side, channels=3):
    """(graph, {leaf path: torch's name of the layer}) of kernels."""
    x = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    named = torch_names(next(iter(tables(module).values())), variables)
    layers = {path: name.removesuffix(".weight") for name, path in named.items() if path.endswith("/kernel")}
    return jprune.trace(module.apply, variables, x), layers


def our_groups(graph, layers):
    """The same of our groups."""
    groups = []
    for group in graph.groups.values():
        members = collections.defaultdict(list)
        for m in group.members:
            if m.path in layers:
                way = {1: "out", 2: "in"}[len(graph.leaves[m.path].shape) - m.axis]
                members[layers[m.path], way] += [(u, int(p)) for u, row in enumerate(m.positions) for p in row]
        groups.append(dict(members))
    return groups


def units(groups):
    """The partition: for every unit, the (layer, way, channel) that go with it."""
    out = collections.Counter()
    for members in groups:
        by_unit = collections.defaultdict(set)
        for (layer, way), pairs in members.items():
            for unit, channel in pairs:
                by_unit[unit].add((layer, way, channel))
        out.update(frozenset(channels) for channels in by_unit.values())
    return out


def layers_together(groups):
    """Per group, the layers whose outputs and whose inputs it cuts, and its number of units."""
    return {(frozenset(members), max(1 + u for pairs in members.values() for u, _ in pairs)) for members in groups}


CASES = {  # name: (torchvision.models -> model, its last layer, ours)
    "resnet18": (lambda tv: tv.resnet18(), lambda m: m.fc, build("resnet18")),
    "resnet50": (lambda tv: tv.resnet50(), lambda m: m.fc, build("resnet50")),
    "mobilenet_v2": (lambda tv: tv.mobilenet_v2(), lambda m: m.classifier[1], build("mobilenet_v2")),
    "densenet121": (lambda tv: tv.densenet121(), lambda m: m.classifier, densenet.densenet121()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_partition_of_channels_is_that_of_torch_pruning(name):
    make, head, module = CASES[name]
    theirs = their_groups(make(peers()[1]), 64, head)
    graph, layers = traced(module, 64)
    ours = our_groups(graph, layers)
    assert all(g.exact for g in graph.groups.values())
    assert len(ours) == len(theirs) and layers_together(ours) == layers_together(theirs)
    assert units(ours) == units(theirs)


def test_every_channel_of_a_vision_transformer_they_prune_we_prune():
    """Their fused kernel is one axis of 3 x heads x size; ours has an axis for each, so the units are others."""
    timm = peers()[2]
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10, qkv_bias=True
    )
    theirs = collections.Counter()
    for members in their_groups(model, 32, lambda m: m.head):
        for (layer, way), pairs in members.items():
            if way == "out":
                theirs[layer] += len({channel for _, channel in pairs})
    graph, layers = traced(vit.vit(48, 2, 4, 8, 10), 32)
    ours = collections.Counter({layers[path]: prunable_outputs(graph, path) for path in layers})
    assert len(theirs) == 1 + 4 * 2  # patches; query-key-value, projection and two layers of the MLP in each block
    for layer, channels in theirs.items():
        assert ours[layer] >= channels, layer
    assert sum(ours.values()) >= sum(theirs.values())


def prunable_outputs(graph, path):
    """How many of a kernel's outputs belong to a unit of any group."""
    shape = graph.leaves[path].shape
    first = {"qkv": 1}.get(path.split("/")[-2], len(shape) - 1)
    owned = np.zeros(shape[first:], bool)
    for group in graph.groups.values():
        for m in group.members:
            if m.path == path and m.axis >= first:
                index = [slice(None)] * owned.ndim
                index[m.axis - first] = m.positions.reshape(-1)
                owned[tuple(index)] = True
    return int(owned.sum())
