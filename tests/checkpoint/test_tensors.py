"""safetensors files: round trips, names from elsewhere, and damaged files."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jprune.checkpoint import load_safetensors, save_safetensors


def test_round_trip_with_strides_scalars_and_bfloat16(tmp_path):
    tree = {
        "params": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "scale": jnp.bfloat16(1.5)},
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 2), np.int32),
    }
    save_safetensors(tmp_path / "sub" / "w.safetensors", tree, {"model": "toy"})
    back, metadata = load_safetensors(tmp_path / "sub" / "w.safetensors")
    assert metadata == {"model": "toy"} and os.listdir(tmp_path / "sub") == ["w.safetensors"]
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_names_with_dots_are_cut_on_request(tmp_path):
    save_file({"layer1.0.weight": np.ones(2), "fc.bias": np.zeros(1)}, tmp_path / "t.safetensors")
    tree, metadata = load_safetensors(tmp_path / "t.safetensors", separator=".")
    assert list(tree["layer1"]["0"]) == ["weight"] and tree["fc"]["bias"].shape == (1,) and metadata == {}
    assert set(load_safetensors(tmp_path / "t.safetensors")[0]) == {"layer1.0.weight", "fc.bias"}


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]])
def test_names_that_are_prefixes_of_others_are_refused(tmp_path, names):
    save_file({name: np.ones(1) for name in names}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="both an array and a prefix"):
        load_safetensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [np.ones(1)]}, "a is a list"),
        ({"a/b": np.ones(1)}, "key 'a/b'"),
        ({1: np.ones(1)}, "key 1"),
        (3, "the tree"),
    ],
)
def test_what_a_flat_file_cannot_hold_is_named(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        save_safetensors(tmp_path / "t.safetensors", tree)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [0, 5, 40, 4000])
def test_truncated_files_are_named(tmp_path, length):
    file = tmp_path / "t.safetensors"
    save_safetensors(file, {"a": np.ones((64, 64), np.float32)})
    os.truncate(file, length)
    with pytest.raises(ValueError, match=r"t.safetensors is truncated or not a safetensors file"):
        load_safetensors(file)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_safetensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_text("hello, this is text")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_safetensors(tmp_path / "t.safetensors")
