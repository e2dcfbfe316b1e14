"""Plans: a round trip through JSON, other copies of the weights, damaged and foreign files, writing whole or not at all."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import normal

import jprune
from jprune.surgery import plan as plans
from jprune.surgery.plan import Plan

LAYERS = 3


def network(p, x):
    def layer(h, w):
        up, gain, down = w
        return h + (jax.nn.relu(h @ up) * gain) @ down, None

    h = jax.lax.scan(layer, x @ p["stem"], (p["up"], p["gain"].T, p["down"]))[0]
    return jax.nn.relu(h @ p["wide"]) @ p["head"]


def weights(seed):
    shapes = {
        "stem": (5, 6),
        "up": (LAYERS, 6, 8),
        "gain": (8, LAYERS),  # layers on the last axis
        "down": (LAYERS, 8, 6),
        "wide": (6, 7),
        "head": (7, 2),
    }
    return {k: normal(seed + i, *s) for i, (k, s) in enumerate(shapes.items())}


PARAMS, X = weights(0), normal(90, 4, 5)
GRAPH = jprune.trace(network, PARAMS, X)
KEEP = {
    "down:2": np.arange(6) != 2,
    "up:2": np.arange(8)[None] < np.array([[5], [8], [2]]),  # uneven: padded up to 8
    "wide:1": np.arange(7) % 2 == 0,
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.json"
    GRAPH.plan(KEEP).save(path)
    return path


def test_a_plan_survives_a_file(saved):
    assert set(GRAPH.groups) == set(KEEP)
    plan = GRAPH.plan(KEEP)
    again = Plan.load(saved)
    assert again == plan and again.version == jprune.__version__
    assert json.loads(saved.read_text())["format"] == plans.FORMAT
    assert again.widths() == {"down:2": 5, "up:2": [5, 8, 2], "wide:1": 4}
    assert again.groups["wide:1"] == [0, 2, 4, 6]
    assert_same(again.apply(PARAMS), GRAPH.compact(PARAMS, KEEP))


def test_a_plan_needs_no_graph_and_fits_every_copy(saved):
    other = weights(50)
    plan = Plan.load(saved)
    want = GRAPH.compact(other, KEEP)
    assert_same(plan.apply(other), want)
    assert_same(plan.apply(jax.tree.map(np.asarray, other)), want)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), other)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    assert plan.apply(structs) == shapes
    assert_same(jax.jit(plan.apply)(other), want)
    np.testing.assert_allclose(
        jax.jit(GRAPH.replay(KEEP))(plan.apply(other), X),
        jax.jit(network)(GRAPH.mask(other, KEEP), X),
        rtol=1e-4,
        atol=1e-5,
    )
    extra = plan.apply({**other, "step": jnp.ones(3)})  # what was not traced passes through
    np.testing.assert_array_equal(extra["step"], np.ones(3))


def test_even_layers_and_whole_groups():
    keep = {"up:2": np.stack([np.roll(np.arange(8) < 4, k) for k in range(LAYERS)]), "wide:1": np.ones(7, bool)}
    plan = GRAPH.plan(keep)
    assert set(plan.leaves) == {"up", "gain", "down"}
    assert all("-1" not in json.dumps(e["axes"]) for e in plan.leaves.values())
    assert_same(plan.apply(PARAMS), GRAPH.compact(PARAMS, keep))
    assert GRAPH.plan({}).apply(PARAMS) is not None and GRAPH.plan({}).leaves == {}


def test_foreign_weights_are_refused_by_name(saved):
    plan = Plan.load(saved)
    small = plan.apply(PARAMS)
    with pytest.raises(jprune.KeepError, match=r"leaf 'down' has shape .*, but the plan was made for \(3, 8, 6\)"):
        plan.apply(small)  # a second time
    with pytest.raises(jprune.KeepError, match="slices leaf 'wide', which these parameters lack"):
        plan.apply({k: v for k, v in PARAMS.items() if k != "wide"})
    with pytest.raises(jprune.KeepError, match=r"lack"):
        plan.apply({"params": PARAMS})


def damaged(saved, change):
    data = json.loads(saved.read_text())
    change(data)
    saved.write_text(json.dumps(data))
    return saved


def axis_of(data, leaf, axis):
    return data["leaves"][leaf]["axes"][axis]


DAMAGE = {
    "an index out of range": lambda d: axis_of(d, "wide", "1").append(7),
    "a negative index": lambda d: axis_of(d, "wide", "1").insert(0, -1),
    "an index twice": lambda d: axis_of(d, "wide", "1").append(6),
    "a padded index out of range": lambda d: axis_of(d, "up", "2")[1].__setitem__(0, 8),
    "a ragged table": lambda d: axis_of(d, "up", "2")[1].pop(),
    "a layer too few": lambda d: axis_of(d, "up", "2").pop(),
    "a fraction for an index": lambda d: axis_of(d, "wide", "1").__setitem__(0, 0.5),
    "text for an index": lambda d: axis_of(d, "wide", "1").__setitem__(0, "0"),
    "an axis that is not there": lambda d: d["leaves"]["wide"]["axes"].update({"2": [0]}),
    "no shape": lambda d: d["leaves"]["wide"].pop("shape"),
    "no layer axis": lambda d: d["leaves"]["up"].update({"layer_axis": None}),
    "leaves in a list": lambda d: d.update({"leaves": []}),
    "another axis of the group left whole": lambda d: d["leaves"]["head"].update({"axes": {}, "made_of": {}}),
    "another axis of the group cut differently": lambda d: axis_of(d, "head", "0").__setitem__(0, 1),
    "a leaf left out": lambda d: d["leaves"].pop("head"),
    "the group cut differently": lambda d: d["groups"]["wide:1"].__setitem__(0, 1),
    "an axis counted from the end": lambda d: d["leaves"]["wide"].update({"axes": {"-1": axis_of(d, "wide", "1")}}),
    "the layers as an axis to cut": lambda d: d["leaves"]["up"].update({"layer_axis": 2}),
    "true for an index": lambda d: axis_of(d, "wide", "1").__setitem__(0, False),
    "a group of another size": lambda d: d["leaves"]["wide"]["made_of"]["1"][0].__setitem__(1, 5),
    "a group that is not there": lambda d: d["leaves"]["wide"]["made_of"]["1"][0].__setitem__(0, "x:1"),
    "groups in a list": lambda d: d.update({"groups": [1]}),
    "no groups": lambda d: d.pop("groups"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_plans_are_refused(saved, name):
    with pytest.raises(ValueError, match=r"plan\.json' is not a pruning plan"):
        Plan.load(damaged(saved, DAMAGE[name]))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"plan"', b"\xff\xfe\x00", b'{"a": 1}'])
def test_files_that_are_no_plans_are_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json' is not a pruning plan"):
        Plan.load(saved)


def test_cut_files_are_refused(saved):
    whole = saved.read_bytes()
    for n in range(0, len(whole), 97):
        saved.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="is not a pruning plan"):
            Plan.load(saved)


def test_a_newer_format_says_so(saved):
    def newer(data):
        data["format"] = 9
        data["tensors"] = data.pop("leaves")  # whatever it holds

    with pytest.raises(ValueError, match="plan format 9; this version reads 2: update jprune"):
        Plan.load(damaged(saved, newer))


def test_writing_is_whole_or_not_at_all(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(path, text):
        path.write_bytes(text[:10].encode())
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(pathlib.Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            GRAPH.plan({}).save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]
    GRAPH.plan({}).save(saved)
    assert Plan.load(saved).leaves == {} and os.listdir(saved.parent) == [saved.name]
    with pytest.raises(FileNotFoundError):
        GRAPH.plan({}).save(saved.parent / "missing" / "plan.json")


def test_a_plan_is_checked_like_any_decision():
    params = {"A": normal(0, 4, 6), "B": normal(1, 6, 3)}
    graph = jprune.trace(lambda p, x: jax.nn.softmax(x @ p["A"]) @ p["B"], params, normal(2, 3, 4))
    keep = {"A:1": np.arange(6) < 4}
    with pytest.raises(jprune.NotPrunable, match="allow_inexact"):
        graph.plan(keep)
    assert graph.plan(graph.decide(keep, allow_inexact=True)).widths() == {"A:1": 4}


def test_plans_of_concatenated_and_partly_cut_axes_come_back(tmp_path):
    def net(p, x):
        h = jnp.concatenate([jax.nn.relu(x @ p["a"]), jax.nn.relu(x @ p["b"])], axis=1)
        return h @ p["c"]

    params = {"a": normal(0, 3, 4), "b": normal(1, 3, 5), "c": normal(2, 9, 2)}
    graph = jprune.trace(net, params, normal(3, 2, 3))
    for keep in ({"a:1": np.arange(4) > 0}, {"a:1": np.arange(4) > 0, "b:1": np.arange(5) != 2}):
        graph.plan(keep).save(tmp_path / "plan.json")
        assert_same(Plan.load(tmp_path / "plan.json").apply(params), graph.compact(params, keep))
