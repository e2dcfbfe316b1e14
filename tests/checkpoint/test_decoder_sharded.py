"""A decoder on four simulated devices: read in parts from both formats, pruned, saved, and read again on the same mesh."""

from four_devices import run_script

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from decoders import prompt, tiny, weights
import jprune
from jprune import checkpoint
from jprune.models import rebuild
from jprune.models.llama import Llama, stack_layers
from jprune.models.llama_placement import placement
from jprune.tracing.paths import flatten

folder = sys.argv[1]
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

place = placement(mesh)

def placed(tree):
    return all(x.sharding.is_equivalent_to(place(p, x), x.ndim) for p, x in flatten(tree))

def same(a, b):
    return all(bool((np.asarray(x) == np.asarray(y)).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

shapes = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in {
    "params/layer0/mlp/gate/kernel": (8, 6), "params/layers/mlp/down/kernel": (3, 6, 8), "params/layer1/attn/q/kernel": (8, 4, 2),
    "params/layer1/attn/k/kernel": (8, 3, 2), "params/layer1/attn/q/bias": (4, 2), "params/embed/embedding": (10, 8)}.items()}
specs = [tuple(place(n, s).spec) for n, s in shapes.items()]
expected = [(None, "model"), (None, "model", None), (None, "model", None), (), ("model", None), ()]
c = tiny("llama", dtype="bfloat16", max_positions=64)
v = weights(c)
ids, mask = prompt()
checkpoint.save_hf(v, c, folder + "/hf")
out = {"divided": specs == expected}
for scanned in (False, True):
    name = "scanned " if scanned else ""
    _, w, _ = checkpoint.load_hf(folder + "/hf", sharding=place, scanned=scanned)
    want = stack_layers(v) if scanned else v
    out[name + "read"] = placed(w) and same(w, want)
    own = f"{folder}/own{scanned}"
    checkpoint.save(own, w)
    again, _ = checkpoint.load(own, sharding=place)
    out[name + "native"] = placed(again) and same(again, want)
    module = Llama(c, scanned)
    graph = jprune.trace(module.apply, w, ids)
    keep = {g: np.arange(48) % 3 > 0 for g, i in graph.groups.items() if i.size == 48}
    small = graph.compact(w, keep)
    out[name + "pruned"] = placed(small) and same(small, graph.compact(want, keep))
    checkpoint.save_hf(small, rebuild(module, small).config, f"{folder}/small{scanned}")
    config, back, _ = checkpoint.load_hf(f"{folder}/small{scanned}", sharding=place, scanned=scanned)
    out[name + "written"] = placed(back) and same(back, small) and config.ffn == (32,) * 3
    got = jax.jit(Llama(config, scanned).apply)(back, ids, mask)
    one = jax.jit(Llama(config, scanned).apply)(jax.tree.map(np.asarray, back), ids, mask)
    out[name + "logits"] = float(np.abs(got - one).max() / np.abs(one).max()) < 0.02
print(json.dumps(out))
"""


def test_four_devices(tmp_path):
    found = run_script(SCRIPT, tmp_path)
    assert len(found) == 11 and all(found.values()), found
