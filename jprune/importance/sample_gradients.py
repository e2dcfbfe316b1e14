"""Gradients of every sample's own loss: whole leaves, or only chosen entries of leaves that are too large to keep N times.

The second-order methods for single weights build their Fisher matrices from them. One sample is one slice of the batch
of length 1, so any function qualifies; what mixes samples (BatchNorm in training mode) belongs in evaluation mode.
Chunks of samples run side by side, chunk after chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jprune.tracing.errors import suggest
from jprune.tracing.paths import flatten, with_leaves

Losses: TypeAlias = Callable[[Any, Any], Any]
SampleGradients: TypeAlias = dict[str, Float[Array, "samples ..."]]

_ENTRIES = 2**24  # of gradients that a chunk of the usual size may hold: 64 MiB


def sample_gradients(
    losses: Losses, variables: Any, paths: Sequence[str], batch: Any, *, chunk: int | None = None
) -> SampleGradients:
    """{path: float32 gradient of every sample's loss, (samples, *leaf shape)} of the named leaves.

        >>> gradients = sample_gradients(lambda v, x: (x @ v["w"]) ** 2, {"w": jnp.array([1.0, 2.0])}, ["w"], jnp.eye(2))
        >>> print(gradients["w"])  # 2 (x w) x
        [[2. 0.]
         [0. 4.]]

    Args:
      losses: (variables, batch) -> float loss of every sample, (samples,).
      variables: whatever `losses` takes; only the named leaves are differentiated.
      paths: of the leaves, as `jprune.tracing.paths` writes them.
      batch: a pytree whose leaves all have the samples on axis 0.
      chunk: samples that run side by side; None: as many as hold 64 MiB of gradients.

    A sample's gradient comes out of the backward pass in the leaf's dtype and is float32 from there on.

    Raises:
      ValueError: a path that is no leaf or no float leaf, batch leaves of different lengths, losses of another shape
        than (samples,), or a chunk below 1.
    """
    size = _checked(losses, variables, paths, batch, chunk)
    chunk = _chunk(variables, paths, size, chunk)
    return _whole(losses, tuple(paths), chunk, variables, batch)


def entry_gradients(
    losses: Losses, variables: Any, index: Mapping[str, Any], batch: Any, *, chunk: int | None = None
) -> tuple[dict[str, Float[Array, "samples n"]], dict[str, Float[Array, ...]]]:
    """Float32 gradients of chosen entries of several leaves for every sample, and the mean gradients of whole leaves.

    The entries are gathered chunk by chunk: memory is that of the result, of one gradient of every named leaf for the
    mean, and of `chunk` gradients; never (samples, leaf).

        >>> losses = lambda v, x: (x @ v["w"]) ** 2
        >>> entries, mean = entry_gradients(losses, {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1])}, jnp.eye(2))
        >>> print(entries["w"].ravel(), mean["w"])
        [0. 4.] [1. 2.]

    Args:
      index: {path: entries of the flattened leaf, (n,) integers}; may be traced: an entry that a leaf does not have is
        then NaN.

    The other arguments and errors are those of `sample_gradients`; ValueError too for an index that is not (n,) integers
    of the leaf's own entries.
    """
    size = _checked(losses, variables, tuple(index), batch, chunk)
    leaves = dict(flatten(variables))
    checked = {p: _index(p, i, int(np.prod(leaves[p].shape))) for p, i in index.items()}
    return _gathered(losses, _chunk(variables, tuple(index), size, chunk), variables, checked, batch)


def block_gradients(
    losses: Losses, variables: Any, path: str, index: Any, batch: Any, *, chunk: int | None = None
) -> tuple[Float[Array, "samples n"], Float[Array, ...]]:
    """`entry_gradients` of one leaf: ((samples, n) gradients of the flat entries `index`, the leaf's mean gradient)."""
    entries, mean = entry_gradients(losses, variables, {path: index}, batch, chunk=chunk)
    return entries[path], mean[path]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _whole(losses: Losses, paths: tuple[str, ...], chunk: int, variables: Any, batch: Any) -> SampleGradients:
    one = _gradient(losses, variables, paths)
    return _each(lambda samples: (jax.vmap(one)(samples), None), batch, chunk)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _gathered(losses: Losses, chunk: int, variables: Any, index: Mapping[str, Any], batch: Any) -> Any:
    one = _gradient(losses, variables, tuple(index))

    def entries(samples: Any) -> Any:
        gradients = jax.vmap(one)(samples)
        flat = {p: g.reshape(len(g), -1).at[:, index[p]].get(mode="fill") for p, g in gradients.items()}
        return flat, {p: jnp.sum(g, axis=0) for p, g in gradients.items()}

    each, total = _each(entries, batch, chunk)
    size = jax.tree.leaves(batch)[0].shape[0]
    return each, {p: g / size for p, g in total.items()}


def _gradient(losses: Losses, variables: Any, paths: Sequence[str]) -> Callable[[Any], dict[str, Array]]:
    """Sample -> {path: float32 gradient of its loss}."""
    leaves = dict(flatten(variables))

    def loss(weights: Mapping[str, Any], sample: Any) -> Any:
        batch = jax.tree.map(lambda x: x[None], sample)
        return losses(with_leaves(variables, weights), batch)[0].astype(jnp.float32)

    def gradient(sample: Any) -> dict[str, Array]:
        found = jax.grad(loss)({p: leaves[p] for p in paths}, sample)
        return {p: g.astype(jnp.float32) for p, g in found.items()}

    return gradient


def _each(of: Callable[[Any], tuple[Any, Any]], batch: Any, chunk: int) -> tuple[Any, Any]:
    """`of` chunk after chunk: its first results one after the other along axis 0, its second results summed."""
    size = jax.tree.leaves(batch)[0].shape[0]
    rounds = size // chunk

    def step(total: Any, samples: Any) -> tuple[Any, Any]:
        each, some = of(samples)
        return jax.tree.map(jnp.add, total, some), each

    full = jax.tree.map(lambda x: x[: rounds * chunk].reshape(rounds, chunk, *x.shape[1:]), batch)
    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], full))[1]
    total, each = lax.scan(step, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), full)
    each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
    if size == rounds * chunk:
        return each, total
    last, some = of(jax.tree.map(lambda x: x[rounds * chunk :], batch))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), each, last), jax.tree.map(jnp.add, total, some)


def _chunk(variables: Any, paths: Sequence[str], size: int, chunk: int | None) -> int:
    if chunk is None:
        leaves = dict(flatten(variables))
        chunk = _ENTRIES // max(sum(int(np.prod(leaves[p].shape)) for p in paths), 1)
    return min(max(chunk, 1), size)


def _checked(losses: Losses, variables: Any, paths: Sequence[str], batch: Any, chunk: int | None) -> int:
    """The number of samples; raises ValueError for what cannot be differentiated sample by sample."""
    leaves = dict(flatten(variables))
    for p in paths:
        if p not in leaves:
            raise ValueError(f"the variables have no leaf {p!r}{suggest(p, leaves)}")
        if not jnp.issubdtype(leaves[p].dtype, jnp.floating):
            raise ValueError(f"{p!r} holds {leaves[p].dtype}: only floating-point leaves have gradients")
    if not paths:
        raise ValueError("no leaf to differentiate: name at least one path")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: it is the number of samples that run side by side, at least 1")
    lengths = {p: np.shape(x)[:1] for p, x in flatten(batch)}
    if len(set(lengths.values())) != 1 or not all(n and n[0] for n in lengths.values()):
        shown = ", ".join(f"{p}: {n[0] if n else 'no axis'}" for p, n in lengths.items()) or "none"
        raise ValueError(
            f"every leaf of the batch has the samples on axis 0, equally many and at least one; got {shown}"
        )
    sample = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), batch)
    out = jax.eval_shape(losses, variables, sample)
    if getattr(out, "shape", None) != (1,) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"the losses of one sample are {out}: give one float loss for every sample, shape (samples,)")
    return next(iter(lengths.values()))[0]


def _index(path: str, index: Any, size: int) -> Int[Array, " n"]:
    if np.ndim(index) != 1 or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise ValueError(f"the index of {path!r} is not a row of integers: it names entries of the flattened leaf")
    if not isinstance(index, Tracer) and np.size(index):
        low, high = int(np.min(index)), int(np.max(index))
        if low < 0 or high >= size:
            raise ValueError(f"the index of {path!r} runs from {low} to {high}: the leaf has {size} entries")
    return jnp.asarray(index)
