"""One pass over calibration text: how far each block turns the residual stream, and how strongly each channel fires.

Everything CFSP, Wanda-sp, FLAP and their relatives ask of the data is collected together, so that one pass serves any
sparsity and any score. Sums are made in float32 on the device, batch by batch, and added up in float64 on the host:
streamed or at once is the same, and tokens may be counted in billions. Whole windows of text: padding would count.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.progress import track

from jprune.graph import Graph, trace
from jprune.language.blocks import Block, BlockError, Layer, blocks, layers
from jprune.tracing.probes import Point, Probe, probed
from jprune.tracing.structure import Tap
from jprune.tracing.taps import is_empty

METRICS = ("angular", "cosine", "mse", "mae")


class Moments(NamedTuple):
    """Of each feature of an activation over all tokens, float64: sum of squares, mean, population variance."""

    x2: np.ndarray
    mean: np.ndarray
    var: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BlockStats:
    """What calibration says of every layer, in the order they run.

    Attributes:
      tokens: how many positions were seen.
      change: {metric: (layers,) mean over tokens} between the stream before and behind each block: "angular", the angle
        over pi; "cosine", 1 - cos; "mse" and "mae", per channel.
      ffn: of the input of each MLP's last product.
      attention: of the input of each attention's last product; None where there is no attention.
    """

    tokens: int
    change: dict[str, np.ndarray]
    ffn: tuple[Moments, ...]
    attention: tuple[Moments | None, ...]

    @property
    def x2(self) -> tuple[np.ndarray, ...]:
        """Per layer the sum of squares of each FFN channel, (F,)."""
        return tuple(m.x2 for m in self.ffn)

    @property
    def z_mean(self) -> tuple[np.ndarray, ...]:
        """Per layer the mean of each FFN channel, (F,)."""
        return tuple(m.mean for m in self.ffn)

    @property
    def z_var(self) -> tuple[np.ndarray, ...]:
        """Per layer the variance of each FFN channel, (F,)."""
        return tuple(m.var for m in self.ffn)

    def __add__(self, other: BlockStats) -> BlockStats:
        """The statistics of both texts together."""
        n, k = self.tokens, other.tokens
        change = {name: (n * m + k * other.change[name]) / (n + k) for name, m in self.change.items()}
        ffn = tuple(_joined(a, n, b, k) for a, b in zip(self.ffn, other.ffn, strict=True))
        attention = tuple(
            None if a is None or b is None else _joined(a, n, b, k)
            for a, b in zip(self.attention, other.attention, strict=True)
        )
        return BlockStats(n + k, change, ffn, attention)


def _joined(a: Moments, n: int, b: Moments, k: int) -> Moments:
    delta = b.mean - a.mean
    total = n + k
    var = (n * a.var + k * b.var) / total + delta**2 * (n / total) * (k / total)
    return Moments(a.x2 + b.x2, a.mean + delta * (k / total), var)


def turned(
    before: Float[Array, "*rest channels"], after: Float[Array, "*rest channels"]
) -> dict[str, Float[Array, " *rest"]]:
    """Per token how much a vector changed: {metric: value}, float32 (CFSP, section 3.1).

    The angle is 2 atan2(|u - v|, |u + v|) of the unit vectors u and v, which keeps its digits where arccos loses half
    of them. A zero vector has no direction and counts as cos = 0.5, the convention of the paper's code.
    """
    h, g = before.astype(jnp.float32), after.astype(jnp.float32)
    sizes = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (h, g)]
    empty = (sizes[0] == 0) | (sizes[1] == 0)
    u, v = (x / jnp.where(empty, 1.0, s) for x, s in zip((h, g), sizes, strict=True))
    apart, together = (jnp.linalg.norm(x, axis=-1) for x in (u - v, u + v))
    none = empty[..., 0]
    return {
        "angular": jnp.where(none, 1 / 3, 2 / jnp.pi * jnp.arctan2(apart, together)),
        "cosine": jnp.where(none, 0.5, apart**2 / 2),
        "mse": jnp.mean((g - h) ** 2, axis=-1),
        "mae": jnp.mean(jnp.abs(g - h), axis=-1),
    }


def step_of(
    graph: Graph, found: Sequence[Block] | None = None
) -> tuple[Callable[..., tuple[Any, Any]], dict[str, Any]]:
    """One step of calibration and the state of no tokens, to jit, shard or compile ahead of time oneself.

    Args:
      graph: of a decoder.
      found: its blocks; None: `blocks(graph)`.

    Returns:
      (step, states): step(states, params, *inputs) -> (outputs, states). States add up over calls, in float32;
      `stats_of(graph, states, found)` reads them.
    """
    found = blocks(graph) if found is None else found
    probes = {}
    for i, b in enumerate(found):
        probes[f"{i} change"] = _change(b)
        probes[f"{i} ffn"] = _moments(graph.taps[b.down])
        if b.out is not None:
            probes[f"{i} attention"] = _moments(graph.taps[b.out])
    return probed(graph, probes)


def _change(b: Block) -> Probe:
    def update(state: Any, before: Any, after: Any) -> Any:
        count, sums = state
        if not before.size:
            return state
        new = turned(*(_features_last(x, b.features) for x in (before, after)))
        count = count + int(np.prod(new["mae"].shape))
        return count, {name: sums[name] + jnp.sum(v) for name, v in new.items()}

    zero = jnp.zeros((), jnp.float32)
    return Probe((b.start, b.end), (jnp.zeros((), jnp.int32), dict.fromkeys(METRICS, zero)), update, b.scan, b.layers)


def _moments(tap: Tap) -> Probe:
    """Count, sum of squares, mean and sum of squared deviations, merged as Chan, Golub and LeVeque do."""
    axes = tap.use.data_features
    shape = tap.use.eqn.invars[tap.use.data_operand].aval.shape
    n = int(np.prod([shape[a] for a in axes]))

    def update(state: Any, value: Any) -> Any:
        count, squares, mean, deviations = state
        if not value.size:  # the mean of nothing is undefined
            return state
        x = _features_last(value, axes).astype(jnp.float32)
        rest = tuple(range(x.ndim - 1))
        k = int(np.prod(x.shape[:-1]))
        own = jnp.mean(x, axis=rest)
        delta, total = own - mean, (count + k).astype(jnp.float32)
        deviations = deviations + jnp.sum((x - own) ** 2, axis=rest) + delta**2 * (count * (k / total))
        return count + k, squares + jnp.sum(x * x, axis=rest), mean + delta * (k / total), deviations

    zero = jnp.zeros((n,), jnp.float32)
    point = Point(tap.use.path, tap.use.data_operand, False)
    return Probe((point,), (jnp.zeros((), jnp.int32), zero, zero, zero), update, tap.scan_path, tap.layers)


def _features_last(x: Any, axes: Sequence[int]) -> Any:
    rest = [i for i in range(x.ndim) if i not in axes]
    x = jnp.transpose(x, (*rest, *axes))
    return x if len(axes) == 1 else x.reshape(*x.shape[: len(rest)], -1)


def stats_of(graph: Graph, states: Any, found: Sequence[Block] | None = None) -> BlockStats:
    """The statistics in the states of `step_of`.

    Raises:
      ValueError: no tokens, or blocks that saw different numbers of them.
    """
    found = blocks(graph) if found is None else found
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(states))
    order = layers(found)
    place = {id(b): i for i, b in enumerate(found)}

    def read(layer: Layer, what: str) -> Any:
        state = host.get(f"{place[id(layer.block)]} {what}")
        return state if layer.row is None else jax.tree.map(lambda x: x[layer.row], state)

    counts = {int(read(layer, "change")[0]) for layer in order}
    if counts == {0}:
        raise ValueError("calibration saw no tokens; pass at least one batch")
    if len(counts) > 1:
        raise ValueError(
            f"the blocks saw different numbers of tokens, {sorted(counts)}: some run in a loop of their own"
        )
    (tokens,) = counts
    rows = [read(layer, "change")[1] for layer in order]

    def moments(layer: Layer, what: str) -> Moments | None:
        state = read(layer, what)
        return None if state is None else Moments(state[1], state[2], state[3] / state[0])

    ffn = [m for layer in order if (m := moments(layer, "ffn")) is not None]
    return BlockStats(
        tokens,
        {name: np.array([r[name] for r in rows]) / tokens for name in METRICS},
        tuple(ffn),
        tuple(moments(layer, "attention") for layer in order),
    )


def block_stats(
    graph: Graph,
    params: Any,
    batches: Iterable[Any],
    found: Sequence[Block] | None = None,
    progress: bool = False,
) -> BlockStats:
    """Statistics of every block of a decoder over batches of text.

    Args:
      graph: of fn(params, *inputs), a decoder.
      params: its (unpruned) parameters, sharded or not.
      batches: of inputs, each a tuple like the traced inputs, or the one array where there is one input.
      found: the graph's blocks; None: `blocks(graph)`.
      progress: show a bar.

    Raises:
      ValueError: no batches, or only empty ones.
      BlockError: the blocks cannot be told.
    """
    found = blocks(graph) if found is None else found
    step = _compiled(graph, tuple(found))
    inputs = (b if isinstance(b, tuple) else (b,) for b in track(batches, "calibrating", disable=not progress))
    return _total(graph, (step(params, b) for b in inputs if not is_empty(graph, b)), found)


@functools.lru_cache(maxsize=4)
def _compiled(graph: Graph, found: tuple[Block, ...]) -> Callable[..., Any]:
    """(params, inputs) -> sums of one batch; kept, so that another pass compiles nothing."""
    run, zero = step_of(graph, found)
    return jax.jit(lambda params, inputs: run(zero, params, *inputs)[1])


def _total(graph: Graph, sums: Iterable[Any], found: Sequence[Block]) -> BlockStats:
    """Sums of batches added up on the host, each read when the next is already under way."""
    total: BlockStats | None = None
    waiting: Any = None
    for states in itertools.chain(sums, [None]):
        if waiting is not None:
            new = stats_of(graph, waiting, found)
            total = new if total is None else total + new
        waiting = states
    if total is None:
        raise ValueError("calibration got no batches, or only empty ones; pass at least one with tokens")
    return total


# -- one layer at a time -----------------------------------------------------------------------------------------------

Revise = Callable[[int, Graph, Any, BlockStats], Any]


def layerwise_stats(
    embed: Callable[[Any], Any],
    block: Callable[..., Any] | Sequence[Callable[..., Any]],
    params: Iterable[Any],
    batches: Iterable[Any],
    revise: Revise | None = None,
    hold: str = "device",
    progress: bool = False,
) -> BlockStats:
    """The same statistics with one layer's weights on the device at a time, for models larger than the device.

    Args:
      embed: batch -> stream in front of the first layer, (batch, tokens, channels).
      block: (parameters of a layer, stream) -> stream; one function, or one per layer.
      params: of every layer in turn, in host memory or wherever they are; an iterator is enough.
      batches: of token ids; the streams of all of them are kept.
      revise: (layer, its graph, its parameters, its statistics) -> the parameters the streams go on with: pruned ones
        make the next layer see the pruned layers before it.
      hold: where the streams wait, "device" or "host".
      progress: show a bar.

    Raises:
      ValueError: no batches, only empty ones, or another place to hold.
      BlockError: a function that is not one block.
    """
    if hold not in ("device", "host"):
        raise ValueError(f"hold is 'device' or 'host', not {hold!r}")
    keep: Any = np.asarray if hold == "host" else jnp.asarray
    streams = [keep(embed(b)) for b in batches if 0 not in np.shape(b)]
    if not streams:
        raise ValueError("calibration got no batches, or only empty ones; pass at least one with tokens")
    made: dict[Any, tuple[Graph, tuple[Block, ...], Any, Any]] = {}
    rows = []
    for i, host in enumerate(track(params, "calibrating", disable=not progress)):
        fn = block if callable(block) else block[i]
        own = jax.device_put(host)
        graph, found, step, plain = _one_layer(fn, own, streams[0], made)

        rows.append(_total(graph, _through(step, own, streams, keep if revise is None else None), found))
        if revise is not None:
            new = revise(i, graph, own, rows[-1])
            streams = [keep(plain(new, h)) for h in streams]
    return BlockStats(
        rows[0].tokens,
        {name: np.concatenate([r.change[name] for r in rows]) for name in METRICS},
        tuple(m for r in rows for m in r.ffn),
        tuple(m for r in rows for m in r.attention),
    )


def _through(step: Any, params: Any, streams: list[Any], keep: Any) -> Iterator[Any]:
    """Sums of one layer over all streams, which become those behind the layer if there is a `keep` for them."""
    for k, h in enumerate(streams):
        out, states = step(params, h)
        if keep is not None:
            streams[k] = keep(out)
        yield states


def _one_layer(fn: Callable[..., Any], params: Any, h: Any, made: dict[Any, Any]) -> Any:
    """(graph, blocks, step, function) of a layer; layers of the same function and shapes share them."""
    key = (fn, jax.tree.structure(params), tuple((x.shape, x.dtype) for x in jax.tree.leaves(params)), h.shape[1:])
    if key not in made:
        graph = trace(fn, params, h)
        found = blocks(graph)
        if len(found) != 1 or found[0].layers is not None:
            raise BlockError(
                f"one layer's function holds {len(layers(found))} blocks: give the function of a single one"
            )
        run, zero = step_of(graph, found)
        made[key] = graph, found, jax.jit(lambda params, h: run(zero, params, h)), jax.jit(fn)
    return made[key]
