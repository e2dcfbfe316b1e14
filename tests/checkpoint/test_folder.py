"""Folders: what is written comes back to the bit, and nothing else is accepted."""

import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jprune.checkpoint import load, save

# A read that fails leaves others behind, whose threads complain, in a later test, that orbax has closed its event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TREE = {
    "params": {
        "conv": {"kernel": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.ones(4, jnp.bfloat16)},
        "stack": [jnp.int32(3), np.array([True, False])],
    },
    "batch_stats": {"mean": jnp.full((4,), jnp.nan)},
}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: str(x.dtype), a) == jax.tree.map(lambda x: str(x.dtype), b)


def test_round_trip(tmp_path):
    save(tmp_path / "m", TREE, {"widths": {"conv": 4}, "accuracy": 0.5})
    tree, metadata = load(tmp_path / "m")
    assert_same_bits(tree, TREE)
    assert metadata == {"widths": {"conv": 4}, "accuracy": 0.5}
    contents = json.loads((tmp_path / "m" / "metadata.json").read_text())
    assert contents["leaves"]["params/conv/bias"] == {"shape": [4], "dtype": "bfloat16"}
    assert set(contents) == {"format", "version", "leaves", "metadata"}


@settings(max_examples=8, deadline=None)
@given(
    st.dictionaries(
        st.text("abz_0", min_size=1, max_size=4),
        st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(["float32", "float16", "int8", "uint32"])),
        min_size=1,
        max_size=4,
    )
)
def test_any_flat_tree_comes_back(tmp_path_factory, shapes):
    rng = np.random.default_rng(0)
    tree = {k: jnp.asarray(rng.integers(0, 99, shape), dtype) for k, (shape, dtype) in shapes.items()}
    folder = tmp_path_factory.mktemp("h") / "m"
    save(folder, tree)
    assert_same_bits(load(folder)[0], tree)


class Pair(NamedTuple):
    first: jax.Array
    second: tuple


def test_like_gives_the_containers_back(tmp_path):
    tree = Pair(jnp.ones(3), (jnp.zeros((2, 2)), {"k": jnp.arange(5)}))
    save(tmp_path / "m", tree)
    assert isinstance(load(tmp_path / "m")[0], dict)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert_same_bits(load(tmp_path / "m", like=abstract)[0], tree)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.ones(3)}, "has the leaf 'b', which"),
        ({"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(1)}, "has no leaf 'c'"),
        ({"a": jnp.ones(4), "b": jnp.ones(2)}, r"'a' has shape \(3,\) in .* and \(4,\)"),
    ],
)
def test_a_tree_of_another_form_is_named(tmp_path, like, message):
    save(tmp_path / "m", {"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m", like=like)


def test_leaves_are_read_into_the_asked_sharding(tmp_path):
    save(tmp_path / "m", TREE)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    split = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree, _ = load(tmp_path / "m", sharding=lambda path, leaf: split if path == "params/conv/kernel" else whole)
    assert tree["params"]["conv"]["kernel"].sharding == split and tree["batch_stats"]["mean"].sharding == whole
    assert load(tmp_path / "m", sharding=whole)[0]["params"]["stack"][0].sharding == whole


def test_an_existing_folder_is_only_replaced_when_asked(tmp_path):
    save(tmp_path / "m", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="overwrite=True"):
        save(tmp_path / "m", {"a": jnp.zeros(2)})
    assert load(tmp_path / "m")[0]["a"].shape == (3,)
    save(tmp_path / "m", {"a": jnp.zeros(2)}, overwrite=True)
    assert load(tmp_path / "m")[0]["a"].shape == (2,)
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path / "m", {"a": jnp.ones(3)})

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full_disk)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="no space"):
            save(tmp_path / name, {"a": jnp.zeros(2)}, overwrite=True)
    assert os.listdir(tmp_path) == ["m"] and load(tmp_path / "m")[0]["a"].shape == (3,)


@pytest.mark.parametrize(
    ("tree", "metadata", "message"),
    [
        ({"a": "text"}, {}, "leaf 'a' is a str"),
        ({"a": jnp.ones((0, 3))}, {}, r"'a' has shape \(0, 3\)"),
        ({}, {}, "no leaves"),
        ({"a": jnp.ones(1)}, {"model": object()}, "not JSON"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, tree, metadata, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "m", tree, metadata)
    assert os.listdir(tmp_path) == []


def test_missing_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint folder .*nothing: check the path"):
        load(tmp_path / "nothing")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="orbax is not a checkpoint written by jprune"):
        load(tmp_path / "orbax")
    (tmp_path / "orbax" / "metadata.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="its format is 'other'"):
        load(tmp_path / "orbax")
    (tmp_path / "orbax" / "metadata.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"metadata.json is damaged"):
        load(tmp_path / "orbax")


@pytest.mark.parametrize("what", ["data", "tree", "shape", "leaf"])
def test_damaged_folders_are_named(tmp_path, what):
    rng = np.random.default_rng(0)
    save(tmp_path / "m", {"a": rng.standard_normal((64, 64)), "b": rng.standard_normal(3)})
    variables, file = tmp_path / "m" / "variables", tmp_path / "m" / "metadata.json"
    if what == "data":
        largest = max((p for p in variables.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif what == "tree":
        os.truncate(variables / "_METADATA", 20)
    else:
        contents = json.loads(file.read_text())
        if what == "shape":
            contents["leaves"]["a"]["shape"] = [64, 32]
        else:
            contents["leaves"]["c"] = {"shape": [1], "dtype": "float32"}
        file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"{tmp_path}/m is damaged: copy it again"):
        load(tmp_path / "m")
