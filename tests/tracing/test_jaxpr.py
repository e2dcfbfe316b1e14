"""When a function is looked at again: never for an immutable module's method at known shapes, always where it may differ."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jprune

CALLS: list[str] = []
X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


class Net(nn.Module):
    """A linear map, which says that its Python code ran."""

    factor: Any = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, shift: float = 0.0) -> jax.Array:
        CALLS.append("net")
        return nn.Dense(5)(jnp.tanh(nn.Dense(6)(x * self.factor)) + shift)


def variables(net: nn.Module) -> Any:
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((3, 4)))


def runs(fn: Any, v: Any, x: Any = X) -> int:
    """How often the module's code runs in one trace."""
    CALLS.clear()
    assert list(jprune.trace(fn, v, x).groups) == ["params/Dense_1/kernel:1"]
    return len(CALLS)


def test_an_immutable_modules_method_is_looked_at_once_per_shapes_and_settings():
    net = Net()
    v = variables(net)
    assert runs(net.apply, v) == 1
    assert runs(net.apply, v) == 0
    assert runs(net.apply, v, jax.ShapeDtypeStruct((7, 4), jnp.float32)) == 1
    assert runs(net.apply, v, jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)) == 1
    assert runs(functools.partial(net.apply, shift=1.0), v) == 1
    assert runs(functools.partial(net.apply, shift=1.0), v) == 0
    for other in (2.0, 1, True):  # equal to the first in Python, but of other types: no other jaxpr may stand for it
        assert runs(functools.partial(net.apply, shift=other), v) == 1
    assert runs(Net(factor=1).apply, v) == 1
    assert runs(net.apply, v) == 0


def test_another_configuration_of_jax_is_another_jaxpr():
    net = Net()
    v = variables(net)
    products = []
    for precision in ("float32", "bfloat16", "float32"):
        with jax.default_matmul_precision(precision):
            graph = jprune.trace(net.apply, v, X)
        products.append({str(c.eqn.params["precision"]) for c in graph.contractions})
    assert products[0] == products[2] != products[1]


def test_what_a_plain_function_closes_over_may_change():
    net = Net()
    v = variables(net)
    state = {"scale": 1.0}

    def fn(v: Any, x: jax.Array) -> jax.Array:
        out: Any = net.apply(v, x)
        return out * state["scale"]

    before = jprune.trace(fn, v, X)
    state["scale"] = 0.5
    after = jprune.trace(fn, v, X)
    assert "0.5" in str(after.jaxpr) and "0.5" not in str(before.jaxpr)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Frozen itself, but what it holds need not be."""

    scale: Any

    def apply(self, v: Any, x: jax.Array) -> jax.Array:
        CALLS.append("holder")
        scale = self.scale[0] if isinstance(self.scale, list) else getattr(self.scale, "value", self.scale)
        return jnp.tanh(x @ v["a"]) @ v["b"] * scale


class Box:
    """Mutable, with a hash: that of an object."""

    value = 1.0


@pytest.mark.parametrize(("scale", "again"), [(1.0, 0), ([1.0], 1), (Box(), 1), (jnp.ones(5), 1)])
def test_a_frozen_object_is_remembered_only_if_all_it_holds_is_fixed(scale: Any, again: int):
    fn = Holder(scale)
    v = {"a": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((6, 5), jnp.float32)}
    jprune.trace(fn.apply, v, X)
    CALLS.clear()
    if isinstance(scale, list):
        scale[0] = 0.25
    if isinstance(scale, Box):
        scale.value = 0.25
    graph = jprune.trace(fn.apply, v, X)
    assert len(CALLS) == again
    assert ("0.25" in str(graph.jaxpr)) == isinstance(scale, list | Box)


def test_a_jitted_function_is_looked_at_as_jax_does():
    net = Net()
    v = variables(net)
    fn = jax.jit(lambda v, x: net.apply(v, x))
    assert runs(fn, v) == 1
    assert runs(fn, v) == 0
