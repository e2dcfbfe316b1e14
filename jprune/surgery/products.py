"""Adapters at the matrix products of any traced function: its results replaced, its inputs gated, nothing rewritten.

At a tap the traced equation computes y = x W. There y becomes join(tap, x, y, product, extra): `product(x)` is the
equation on another x, and `extra` is whatever belongs to this tap (low-rank factors, gates, keys), sliced layer by
layer where the weights are stacked over a scan. W itself is never touched, so the gradient by the extras costs no array
of its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jprune.surgery.decision import check_names
from jprune.surgery.mask import gated
from jprune.surgery.sites import evaluated
from jprune.tracing import layout as L
from jprune.tracing import operand as moves
from jprune.tracing.errors import suggest
from jprune.tracing.primitives import DENSE_CONTRACTIONS
from jprune.tracing.structure import Tap

if TYPE_CHECKING:
    from jprune.graph import Graph

Join = Callable[[Tap, Any, Any, Callable[[Any], Any], Any], Any]


class TapError(ValueError):
    """A tap that cannot be adapted; names it, why, and the user's source line."""


def adapt(graph: Graph, taps: Iterable[str], join: Join) -> Callable[..., Any]:
    """fn(params, extras, *inputs) -> outputs: the traced function with these products' results replaced.

    Jit-able, differentiable in params and extras, and as the traced function is scanned or rematerialised, so is it.

    Args:
      graph: of `fn(params, *inputs)`.
      taps: ids of matrix products or convolutions.
      join: (tap, x, y, product, extra) -> replacement of y, of y's shape (it is cast to y's dtype). extras is {tap id:
        any pytree of arrays}; where `tap.layers` is L, all of them have a leading axis L and join sees one layer.

    Raises:
      TapError: no such tap, another operation, or one inside a custom derivative, which would be lost.
    """
    chosen = {t: _tap(graph, t) for t in taps}
    at: dict[Any, list[Tap]] = {}
    for tap in chosen.values():
        at.setdefault(tap.use.path, []).append(tap)
    watched = {t: (tap.use.path, tap.scan_path) for t, tap in chosen.items()}

    def observe(path: Any, eqn: Any, ins: list[Any], outs: list[Any], states: dict[str, Any]) -> list[Any]:
        y = outs[0]
        for tap in at[path]:
            k = tap.use.data_operand

            def product(x: Any, k: int = k) -> Any:
                operands = [x if i == k else v for i, v in enumerate(ins)]
                return eqn.primitive.bind(*operands, **eqn.params)

            new = join(tap, ins[k], y, product, states[tap.id])
            if new.shape != y.shape:
                raise TapError(f"the replacement at {tap.id!r} has shape {new.shape}, the tap's result {y.shape}")
            y = new.astype(y.dtype)
        return [y]

    def adapted(params: Any, extras: Mapping[str, Any], *inputs: Any) -> Any:
        if set(extras) != set(chosen):
            raise TapError(
                f"extras are needed for exactly the adapted taps; {sorted(set(extras) ^ set(chosen))[:3]} differ"
            )
        for t, tap in chosen.items():
            for x in jax.tree.leaves(extras[t]) if tap.layers is not None else ():
                if x.shape[:1] != (tap.layers,):
                    raise TapError(f"an extra of {t!r} has shape {x.shape}; its {tap.layers} layers come first")
        return evaluated(graph, params, inputs, observe, watched, dict(extras))[0]

    return adapted


def _tap(graph: Graph, name: str) -> Tap:
    tap = graph.taps.get(name)
    if tap is None:
        raise TapError(f"there is no tap {name!r}{suggest(name, graph.taps)}")
    if tap.primitive not in DENSE_CONTRACTIONS:
        raise TapError(f"tap {name!r} is {tap.primitive}, no matrix product or convolution, at {tap.where}")
    path = tap.use.path
    if any((*path[:i], rule) in graph.analysis.jaxprs for i in range(len(path)) for rule in ("jvp", "fwd")):
        raise TapError(f"tap {name!r} lies in a function with a derivative of its own, at {tap.where}: adapt around it")
    return tap


# -- gates ---------------------------------------------------------------------------------------------------------


def consumers(graph: Graph, groups: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{tap id: those of these groups that its input's features are made of}: where gating removes their units.

    Raises:
      KeepError, NotPrunable: no such group.
      TapError: no product or convolution consumes a group.
    """
    groups = list(groups)
    check_names(graph, dict.fromkeys(groups))
    out = {}
    for t, tap in graph.taps.items():
        own = {g for layout in tap.in_layouts for g in L.groups_in(layout)}
        found = tuple(g for g in groups if g in own)
        if found and tap.primitive in DENSE_CONTRACTIONS:
            out[t] = found
    if lost := set(groups).difference(*out.values()):
        raise TapError(f"no matrix product or convolution consumes group {sorted(lost)[0]!r}: it has no input to gate")
    return out


def gates(tap: Tap, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """One vector per feature axis of the tap's input, from {group id: value per unit}; None where nothing applies.

    With a leading axis over the tap's layers where it has them: an extra for `adapt`, applied by `gate`.
    """
    out = []
    for layout in tap.in_layouts:
        own = {g: jnp.asarray(values[g], jnp.float32) for g in set(L.groups_in(layout)) if g in values}
        if not own:
            out.append(None)
            continue
        v = L.spread(layout, own, jnp, jnp.ones((1,), jnp.float32))
        out.append(jnp.broadcast_to(v, (tap.layers, v.shape[-1])) if tap.layers is not None else v)
    return tuple(out)


def gate(tap: Tap, x: Any, vectors: Sequence[Any]) -> Any:
    """The tap's input times its gates; a gate of 0 also removes NaN and infinity."""
    for axis, v in zip(tap.use.data_features, vectors, strict=True):
        if v is not None:
            x = gated(x, v.astype(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)]))
    return x


# -- matrix products as matrices -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A tap as a matrix that maps inputs to outputs, however its leaf is stored.

    Attributes:
      tap: the tap.
      batch, inputs, outputs: sizes of the weight operand's axes that are shared with the data, summed over, and new
        in the result; each in the operand's order, which is the order of the matrix's rows and columns.
    """

    tap: Tap
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the axes before the matrix's own: the layers of a stacked leaf, then the shared axes."""
        return self.batch if self.tap.layers is None else (self.tap.layers, *self.batch)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return math.prod(self.outputs), math.prod(self.inputs)

    @functools.cached_property
    def _axes(self) -> tuple[Any, ...]:
        """Axes of the weight operand (shared, summed, new) and the data's partners of the first two."""
        contract, batch = self.tap.use.eqn.params["dimension_numbers"]
        w, d = self.tap.use.leaf_operand, self.tap.use.data_operand
        summed = sorted(zip(contract[w], contract[d], strict=True))
        shared = tuple(zip(batch[w], batch[d], strict=True))
        used = {i for i, _ in (*summed, *shared)}
        rank = len(self.tap.use.eqn.invars[w].aval.shape)
        new = tuple(i for i in range(rank) if i not in used)
        return tuple(i for i, _ in shared), tuple(i for i, _ in summed), new, shared, tuple(summed)

    def matrix(self, leaf: Any) -> Shaped[Array, "*lead out in"]:
        """The matrix in an array of the leaf's shape (weights, their gradient, their mask), in its dtype."""
        x = moves.operand(self.tap.use.moves, leaf)
        return self._laid(x) if self.tap.layers is None else jax.vmap(self._laid)(x)

    def map(self, fn: Callable[..., Any], leaves: Sequence[Any], *rows: Any) -> Any:
        """fn(matrices (out, in), *rows), for one index of `lead` after the other; results stacked over `lead`.

        Args:
          fn: of a list of the matrices in `leaves`, and of what else there is one of per matrix.
          leaves: arrays of the leaf's shape.
          *rows: pytrees of arrays with the leading axes `lead`.
        """
        before, after = moves.split(self.tap.use.moves)
        stacks = [moves.operand(before, leaf) for leaf in leaves]

        def one_layer(xs: Any) -> Any:
            matrices = [self._laid(moves.operand(after, x)) for x in xs[0]]
            run = _over(len(self.batch), lambda ys: fn(ys[0], *ys[1]))
            return run((matrices, xs[1]))

        return _over(self.tap.layers is not None, one_layer)((stacks, rows))

    def units(self, side: str, sums: Float[Array, "*lead n"], group: str) -> Float[Array, "*layers units"]:
        """Sums per row (side "out") or per column ("in") of the matrices, added up over what each unit owns."""
        layouts, sizes = (self.tap.out_layouts, self.outputs) if side == "out" else (self._in_layouts, self.inputs)
        axis = next(k for k, layout in enumerate(layouts) if group in L.groups_in(layout))
        n = 0 if self.tap.layers is None else 1
        v = jnp.sum(sums, axis=tuple(range(n, sums.ndim - 1)))
        v = v.reshape(*v.shape[:n], *sizes)
        v = jnp.sum(v, axis=tuple(n + k for k in range(len(sizes)) if k != axis))
        return jnp.sum(v[..., L.unit_positions(layouts[axis], group)], axis=-1)

    @property
    def _in_layouts(self) -> tuple[L.Layout, ...]:
        """The layouts of `inputs`."""
        of = dict(zip(self.tap.use.data_features, self.tap.in_layouts, strict=True))
        return tuple(of[d] for _, d in self._axes[4])

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of the weight operand in the order of `batch`, `outputs`, `inputs`."""
        shared, summed, new, _, _ = self._axes
        return (*shared, *new, *summed)

    def _laid(self, x: Any) -> Any:
        """A weight operand of one layer, as (*batch, out, in)."""
        return jnp.transpose(x, self._order).reshape(*self.batch, *self.shape)

    def samples(self, x: Any) -> Float[Array, "*batch samples in"]:
        """The data that meets the weights as one row per sample, float32, in the order of the matrix's columns."""
        _, _, _, shared, summed = self._axes
        first, last = tuple(d for _, d in shared), tuple(d for _, d in summed)
        rest = tuple(i for i in range(x.ndim) if i not in (*first, *last))
        x = jnp.transpose(x, (*first, *rest, *last)).astype(jnp.float32)
        return x.reshape(*self.batch, -1, self.shape[1])

    def leaf_like(self, matrix: Float[Array, "*lead out in"], shape: tuple[int, ...]) -> Any:
        """The array of the leaf's shape whose matrix this is."""
        order = self._order
        layers = () if self.tap.layers is None else (self.tap.layers,)
        sizes = self.tap.use.eqn.invars[self.tap.use.leaf_operand].aval.shape
        x = matrix.reshape(*layers, *(sizes[i] for i in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        x = jnp.transpose(x, (*range(len(layers)), *(len(layers) + i for i in back)))
        return moves.leaf_like(self.tap.use.moves, x, shape)

    def down(self, x: Any, a: Float[Array, "*batch r in"]) -> Any:
        """x times a matrix with this product's inputs: (shared, the data's other axes, r), float32."""
        _, _, _, shared, summed = self._axes
        a = a.astype(x.dtype).reshape(*self.batch, -1, *self.inputs)
        n = len(self.batch)
        numbers = (
            (tuple(i for _, i in summed), tuple(n + 1 + k for k in range(len(summed)))),
            (tuple(i for _, i in shared), tuple(range(n))),
        )
        return lax.dot_general(x, a, numbers, precision=self._precision, preferred_element_type=jnp.float32)

    def up(self, h: Any, b: Float[Array, "*batch out r"], dtype: Any) -> Any:
        """The result of `down` times a matrix with this product's outputs, laid out as the tap's result; float32."""
        n = len(self.batch)
        b = b.astype(dtype).reshape(*self.batch, *self.outputs, -1)
        shared = tuple(range(n))
        left, right = h.astype(dtype), b
        if self.tap.use.data_operand == 1:  # the weights' axes come first in the result
            left, right = right, left
        numbers = (((left.ndim - 1,), (right.ndim - 1,)), (shared, shared))
        return lax.dot_general(left, right, numbers, precision=self._precision, preferred_element_type=jnp.float32)

    @property
    def _precision(self) -> Any:
        return self.tap.use.eqn.params["precision"]


def _over(depth: int, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """fn at every index of the leading axes, one after the other."""
    return fn if not depth else functools.partial(lax.map, _over(depth - 1, fn))


def product(graph: Graph, name: str) -> Product:
    """A tap as a matrix.

    Raises:
      TapError: no such tap, no matrix product, or weights that are computed from the leaf by more than layout changes.
    """
    tap = _tap(graph, name)
    if tap.primitive != "dot_general":
        raise TapError(f"tap {name!r} is {tap.primitive}, no matrix product, at {tap.where}")
    if reason := moves.check(tap.use.moves, tap.layers):
        raise TapError(f"tap {name!r} has no matrix: {reason}, at {tap.where}")
    (contract, batch), w = tap.use.eqn.params["dimension_numbers"], tap.use.leaf_operand
    sizes = tap.use.eqn.invars[w].aval.shape
    used = (*contract[w], *batch[w])
    return Product(
        tap,
        tuple(sizes[i] for i in batch[w]),
        tuple(sizes[i] for i in sorted(contract[w])),
        tuple(n for i, n in enumerate(sizes) if i not in used),
    )
