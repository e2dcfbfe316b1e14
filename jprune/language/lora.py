"""Low-rank adapters on any traced function: y = W x + s B A x at chosen matrix products, with W frozen.

    lora = init(key, graph, config)                      {tap id: {"a": (r, in), "b": (out, r)}} and s, B = 0
    run = adapted(graph)                                 run(params, lora, *inputs)
    params = merge(graph, params, lora)                  W + s B A in float32, then in W's own dtype

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021), with s = alpha / rank. Nothing of W's shape is
formed in either pass. Stacked layers have stacked factors; where their ranks differ, the rest of the rows of A and
columns of B is zero, and stays so under every optimiser that leaves a parameter without gradient where it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from jprune.graph import Graph
from jprune.language.blocks import Block, blocks
from jprune.surgery.products import Product, TapError, adapt, consumers, gate, gates, product
from jprune.tracing import layout as L
from jprune.tracing.paths import flatten, with_leaves
from jprune.tracing.structure import Tap

Ranks: TypeAlias = Mapping[str, Any]
Scale: TypeAlias = float | tuple[float, ...]  # one, or one per layer of a stack


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Lora(Mapping[str, Any]):
    """Low-rank factors with their scales: a mapping {tap id: {"a": (r, in), "b": (out, r)}}, and a tree of those arrays.

    Scales are no leaves: under `jax.jit` they are constants, gradients and optimizer states have none, and whatever maps
    over the tree keeps them. So nothing that is done to the factors can lose them.

    Attributes:
      factors: of each tap; stacked layers have a leading axis.
      scales: s of each tap, or one per layer of its stack.

    Raises:
      ValueError: scales of other taps, or that are not finite.
    """

    factors: Mapping[str, Mapping[str, Any]]
    scales: Mapping[str, Scale]

    def __post_init__(self):
        if set(self.factors) != set(self.scales):
            other = sorted(set(self.factors) ^ set(self.scales))[0]
            raise ValueError(f"every adapter needs its scale, and only those: {other!r} has one without the other")
        for t, s in self.scales.items():
            if not np.isfinite(s).all():
                raise ValueError(f"the scale of {t!r} is {s}: it must be finite")

    def __getitem__(self, tap: str) -> Any:
        return self.factors[tap]

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def scale(self, tap: Tap) -> Float32[Array, "*layers"]:
        """s of a tap, or s of every layer of its stack."""
        return jnp.broadcast_to(
            jnp.asarray(self.scales[tap.id], jnp.float32), () if tap.layers is None else (tap.layers,)
        )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children in the order of the names, as of a dict."""
        names = tuple(sorted(self.factors))
        children = [(jax.tree_util.DictKey(t), self.factors[t]) for t in names]
        return children, (names, tuple(self.scales[t] for t in names))

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Lora:
        """The inverse; children may be anything."""
        new = object.__new__(cls)
        object.__setattr__(new, "factors", dict(zip(aux[0], children, strict=True)))
        object.__setattr__(new, "scales", dict(zip(*aux, strict=True)))
        return new


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What adapters look like.

    Attributes:
      rank: r, unless `ranks` says otherwise.
      alpha: the scale is alpha / rank, for adapters of other ranks too; `init` puts it into the adapters.
      dropout: share of the inputs' entries that an adapter does not see in training (where a key is given).
      ranks: {tap id: rank, or one per layer of a stack}; `layer_ranks` makes it from one rank per layer.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    ranks: Ranks | None = None

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank {self.rank} and dropout {self.dropout}: a rank is at least 1, dropout in [0, 1)")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank


class _Extra(NamedTuple):
    factors: Any  # {"a", "b", "scale"}, or None at a tap that is only gated
    gates: Any
    key: Any


def targets(graph: Graph) -> tuple[str, ...]:
    """The matrix products of a decoder's blocks: those whose inputs or outputs are FFN channels or attention heads.

    In a LLaMA the seven of every layer; where one key-value head serves all queries, k has nothing prunable and is left
    out. Raises BlockError where the function is no decoder.
    """
    groups = set().union(*map(_groups, blocks(graph)))
    return tuple(t for t, tap in graph.taps.items() if tap.primitive == "dot_general" and groups & _met(tap))


def layer_ranks(graph: Graph, ranks: Sequence[int]) -> dict[str, Any]:
    """One rank per layer of a decoder, for `LoraConfig.ranks`: {tap id: rank, or the ranks of all stacked layers}.

    Raises:
      ValueError: another number of layers.
    """
    found = blocks(graph)
    depth = sum(b.layers or 1 for b in found)
    if len(ranks) != depth:
        raise ValueError(f"{len(ranks)} ranks are given for {depth} layers")
    starts = np.cumsum([0, *(b.layers or 1 for b in found)])
    at = {g: k for k, b in enumerate(found) for g in _groups(b)}
    out: dict[str, Any] = {}
    for t in targets(graph):
        k = next(at[g] for g in _met(graph.taps[t]) if g in at)
        own = tuple(int(r) for r in ranks[starts[k] : starts[k + 1]])
        out[t] = own[0] if found[k].layers is None else own
    return out


def _groups(block: Block) -> set[str]:
    return {g for g in (block.ffn, block.kv, block.query, block.value) if g is not None}


def _met(tap: Tap) -> set[str]:
    return {g for layout in (*tap.in_layouts, *tap.out_layouts) for g in L.groups_in(layout)}


def own_scales(lora: Any) -> Lora:
    """The adapters; ValueError if they are factors alone, whose scale nobody knows."""
    if not isinstance(lora, Lora):
        raise ValueError(f"adapters are a Lora, which init and load_peft make, not a {type(lora).__name__}: wrap factors as "
                         "Lora(factors, {tap id: alpha / rank})")  # fmt: skip
    return lora


def products(graph: Graph, taps: Sequence[str]) -> dict[str, Product]:
    """The taps as matrices.

    Raises:
      TapError: no matrix product, or a leaf used more than once, whose uses could not be merged one by one.
    """
    out = {t: product(graph, t) for t in taps}
    for t, p in out.items():
        uses = [o for o, tap in graph.taps.items() if tap.leaf == p.tap.leaf]
        if len(uses) > 1:
            raise TapError(f"leaf {p.tap.leaf!r} is used {len(uses)} times ({', '.join(uses)}): an adapter at {t!r} "
                           "alone could not be merged into it")  # fmt: skip
    return out


def init(key: jax.Array, graph: Graph, config: LoraConfig | None = None, taps: Sequence[str] | None = None) -> Lora:
    """Fresh float32 factors: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B = 0; with the scale of `config`.

    Args:
      key: PRNG key.
      graph: of the function.
      config: ranks and scale.
      taps: which products; by default `targets(graph)`.

    Raises:
      ValueError: ranks of other taps, below 0, or not one per layer.
    """
    config = config or LoraConfig()
    chosen = products(graph, targets(graph) if taps is None else taps)
    if unknown := set(config.ranks or ()) - set(chosen):
        raise ValueError(f"ranks name {sorted(unknown)[0]!r}, which gets no adapter")
    out = {}
    for k, (t, p) in enumerate(chosen.items()):
        ranks = np.asarray((config.ranks or {}).get(t, config.rank))
        layers = p.tap.layers
        if ranks.shape not in ((), (layers,)) or ranks.min() < 0:
            raise ValueError(f"ranks[{t!r}] is {ranks.tolist()}: give one of at least 0, or one per layer ({layers})")
        r, (o, i) = int(ranks.max()), p.shape
        a = jax.random.uniform(jax.random.fold_in(key, k), (*p.lead, r, i), jnp.float32, -1, 1) * i**-0.5
        if ranks.ndim:
            used = np.arange(r) < ranks.reshape(-1, *[1] * len(p.lead))
            a = a * used[..., None]
        out[t] = {"a": a, "b": jnp.zeros((*p.lead, o, r), jnp.float32)}
    return Lora(out, dict.fromkeys(out, float(config.scale)))


def adapted(graph: Graph, dropout: float = 0.0) -> Callable[..., Any]:
    """run(params, lora, *inputs, masks=None, key=None): the traced function with adapters; jit-able.

    `masks` {group id: (size,) or (layers, size)} multiply the inputs of the products that consume those groups, which
    removes a masked unit as slicing would: MLP channels in front of the down projection, heads in front of the
    output projection. `key` switches on `dropout`, the share of the inputs' entries that an adapter does not see.

    Raises:
      TapError: `masks` name a group that nothing consumes, or a tap has no adapter.
    """

    def run(params: Any, lora: Lora, *inputs: Any, masks: Mapping[str, Any] | None = None, key: Any = None) -> Any:
        chosen = products(graph, list(own_scales(lora)))
        gated = consumers(graph, masks) if masks else {}

        def join(tap: Any, x: Any, y: Any, again: Callable[[Any], Any], extra: _Extra) -> Any:
            if extra.gates is not None:
                x = gate(tap, x, extra.gates)
                y = again(x)
            if extra.factors is None:
                return y
            if extra.key is not None:
                kept = jax.random.bernoulli(extra.key, 1 - dropout, x.shape)
                x = jnp.where(kept, x / (1 - dropout), 0).astype(x.dtype)
            p = chosen[tap.id]
            f = extra.factors
            return y.astype(jnp.float32) + f["scale"] * p.up(p.down(x, f["a"]), f["b"], x.dtype)

        def extra(n: int, t: str) -> _Extra:
            own = None
            if key is not None and dropout and t in lora:
                own = jax.random.fold_in(key, n)
                layers = graph.taps[t].layers
                own = own if layers is None else jax.random.split(own, layers)
            factors = {**lora[t], "scale": lora.scale(graph.taps[t])} if t in lora else None
            return _Extra(factors, gates(graph.taps[t], masks or {}) if t in gated else None, own)

        taps = list(dict.fromkeys([*lora, *gated]))
        return adapt(graph, taps, join)(params, {t: extra(n, t) for n, t in enumerate(taps)}, *inputs)

    return run


def merge(graph: Graph, params: Any, lora: Lora) -> Any:
    """The parameters with W + s B A, added in float32 and cast to W's dtype; jit-able."""
    old = dict(flatten(params))
    new = {}
    for p in products(graph, list(own_scales(lora))).values():
        f, w = lora[p.tap.id], old[p.tap.leaf]
        delta = jnp.matmul(f["b"], f["a"], precision=lax.Precision.HIGHEST)
        s = lora.scale(p.tap)
        delta = delta * s.reshape(*s.shape, *[1] * (delta.ndim - s.ndim))
        wide = jnp.asarray(w, jnp.float32) + p.leaf_like(delta, w.shape)
        new[p.tap.leaf] = wide.astype(w.dtype)
    return with_leaves(params, new)
