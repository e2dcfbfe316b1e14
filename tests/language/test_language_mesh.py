"""Calibration, scores, masks and cuts of a decoder on four simulated devices: what one device computes, where it lay."""

import pytest
from four_devices import run_script

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from decoders import tiny, weights
import jprune
from jprune.language.blocks import blocks
from jprune.methods.channels.cfsp import CFSPConfig, cfsp_keep
from jprune.methods.channels.decoder_channels import FINE, channel_scores
from jprune.language.perplexity import perplexity
from jprune.language.statistics import block_stats
from jprune.models import rebuild
from jprune.models.llama import Llama
from jprune.models.llama_placement import placement
from jprune.tracing.paths import flatten

assert jax.device_count() == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
place, rows = placement(mesh), NamedSharding(mesh, P("data"))
config = tiny("llama")
text = np.random.default_rng(0).integers(0, config.vocab, (8, 7)).astype(np.int32)
out = {"close": [], "equal": [], "placed": [], "divided": []}

def close(name, a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        out["close"].append((name, bool(np.isfinite(x).all() and np.abs(x - y).max() <= 1e-5 * np.abs(y).max())))

def same(name, a, b):
    pairs = zip(flatten(a), flatten(b), strict=True)
    out["equal"] += [(name, p, bool(np.array_equal(x, y))) for (p, x), (_, y) in pairs]

def placed(name, tree):
    out["placed"] += [(name, p, x.sharding.is_equivalent_to(place(p, x), x.ndim)) for p, x in flatten(tree)]

name = sys.argv[1]
scanned = name == "scanned"
module = Llama(config, scanned)
one = weights(config, scanned=scanned)
split = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.device_put(x, place(jax.tree_util.keystr(path, simple=True, separator="/"), x)), one)
graph = jprune.trace(module.apply, one, text[:4])
found = blocks(graph)
stats = [
    block_stats(graph, params, [put(text[:4]), put(text[4:])], found)
    for params, put in ((one, jnp.asarray), (split, lambda x: jax.device_put(x, rows)))
]
assert stats[0].tokens == stats[1].tokens == text.size
close("change", stats[1].change, stats[0].change)
close("moments", (stats[1].ffn, stats[1].attention), (stats[0].ffn, stats[0].attention))
for kind in FINE[:-1]:
    close(kind, channel_scores(graph, split, stats[1], found, kind), channel_scores(graph, one, stats[0], found, kind))
options = CFSPConfig(multiple_of=8, uniform_width=scanned)
keep, want = (cfsp_keep(graph, p, s, 0.5, options, found)[0] for p, s in ((split, stats[1]), (one, stats[0])))
same("keep", keep, want)
masked, small = graph.mask(split, keep), graph.compact(split, keep)
same("mask", masked, graph.mask(one, keep))
placed("mask", masked)
same("compact", small, graph.compact(one, keep))
placed("compact", small)
shards = {p: x.addressable_shards[0].data.size / x.size for p, x in flatten(small)}
out["divided"] += [(p, s) for p, s in shards.items() if "mlp" in p or "attn" in p]
pruned = rebuild(module, small)
on_mesh = perplexity(pruned, small, text, 4, sharding=rows)
close("perplexity", on_mesh, perplexity(module, graph.mask(one, keep), text, 4))
# the check below would be blind if pruning changed nothing
out["matters"] = abs(on_mesh / perplexity(module, one, text, 4) - 1)
out["widths"] = sorted({int(n) for k in keep.values() for n in np.atleast_1d(k.sum(-1))})
print(json.dumps(out))
"""


@pytest.fixture(scope="module", params=["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def found(request):
    return {"arrangement": request.param, **run_script(SCRIPT, request.param)}


def test_numbers_are_those_of_one_device(found):
    assert len(found["close"]) > 20 and [row for row in found["close"] if not row[1]] == []
    assert len(found["equal"]) >= 25 and [row for row in found["equal"] if not row[2]] == []
    assert found["matters"] > 1e-3
    assert (len(found["widths"]) > 1) == (found["arrangement"] == "unrolled")


def test_weights_stay_where_they_lay(found):
    assert len(found["placed"]) > 20 and [row for row in found["placed"] if not row[2]] == []
    assert len(found["divided"]) >= 7 and all(share == 0.5 for _, share in found["divided"])
