"""Compacting trees that travel with the parameters: optimizer moments, running averages, factored statistics."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.surgery.compact import compact, compact_leaf, uneven_scan
from jprune.surgery.decision import Decision, touched
from jprune.tracing import layout as L
from jprune.tracing.errors import KeepError
from jprune.tracing.paths import flatten, path_str
from jprune.tracing.structure import Leaf

REMEDY = "slice it by hand or leave it out of the tree"
DEFAULT_LEAST = 128  # optax.adafactor's min_dim_size_to_factor
ANEW = "start the optimizer anew from the compacted parameters"


def compact_like(decision: Decision, tree: Any, init: Callable[[Any], Any] | None = None) -> Any:
    """Slice every leaf of `tree` that mirrors a parameter, found by the longest common end of the two paths.

    A mirror has the parameter's shape, or that shape behind further axes (a history, an ensemble), or with some axes
    dropped. States of optax in which a leaf is something else are known by their type: the factored moments of
    adafactor, the accumulators of sm3, the memory of L-BFGS. Scalars, random keys, and leaves too small to depend on what
    was cut pass through.

    Args:
      decision: what is kept.
      tree: an optimizer state, averages, gradients; arrays or `ShapeDtypeStruct`s.
      init: makes such a tree from the variables (`lambda v: tx.init(v["params"])`). The result is then compared with what
        it makes of the compacted ones, and it decides what sizes alone leave open.

    Raises:
      KeepError: a leaf's path points at a pruned parameter but its shape does not fit, or fits in several ways that
        would be sliced differently; a leaf that mirrors nothing but is as large as what was cut; a state that cannot be
        sliced; or, with `init`, a result of other shapes.
    """
    want = None
    if init is not None:
        leaves = decision.graph.leaves.values()
        whole = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        small = compact(decision, jax.tree.unflatten(decision.graph.param_treedef, whole))
        want = {path: tuple(x.shape) for path, x in flatten(jax.eval_shape(init, small))}
    task = _Task(decision, want)
    out = task.walk("", tree)
    if want is not None:
        _compare({path: tuple(np.shape(x)) for path, x in flatten(out)}, want)
    return out


def _compare(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    for path in [*got, *want]:
        if got.get(path) != want.get(path):
            has, wanted = (str(shapes[path]) if path in shapes else "absent" for shapes in (got, want))
            raise KeepError(
                f"leaf {path!r} is {has} after slicing and {wanted} in what init makes of the compacted parameters: {ANEW}"
            )


class _Factors(NamedTuple):
    row: Any
    col: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class _Task:
    """One call; `want` has the shapes that `init` gives, if it was given."""

    decision: Decision
    want: Mapping[str, tuple[int, ...]] | None

    def walk(self, prefix: str, tree: Any) -> Any:
        known = {
            "FactoredState": self._factored,
            "ScaleBySM3State": self._sm3,
            "ScaleByLBFGSState": self._lbfgs,
            "GaLoreState": self._galore,
        }

        def one(path: Any, node: Any) -> Any:
            at = _join(prefix, path_str(path))
            special = known.get(type(node).__name__)
            return self._leaf(at, node) if special is None else special(at, node)

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda n: type(n).__name__ in known)

    def _leaf(self, path: str, x: Any) -> Any:
        shape: tuple[int, ...] = tuple(getattr(x, "shape", ()))
        if not shape or all(n == 1 for n in shape) or not self.decision.keep:
            return x
        leaf = _mirror(self.decision, path)
        if leaf is None:
            leaf = self._bare(shape)
        if leaf is None:
            return self._unknown(path, x, shape)
        if not self._is_cut(leaf):
            return x
        if shape == leaf.shape:
            return compact_leaf(self.decision, leaf, x)
        ahead = len(shape) - len(leaf.shape)
        if ahead > 0 and shape[ahead:] == leaf.shape:
            fixed = tuple((L.Fixed(n),) for n in shape[:ahead])
            layer = None if leaf.layer_axis is None else leaf.layer_axis + ahead
            deep = dataclasses.replace(leaf, path=path, shape=shape, layouts=(*fixed, *leaf.layouts), layer_axis=layer)
            return compact_leaf(self.decision, deep, x)
        kept = {
            axes
            for axes in itertools.combinations(range(len(leaf.shape)), len(shape))
            if tuple(leaf.shape[a] for a in axes) == shape
        }
        ways = {
            tuple(leaf.layouts[a] if touched(leaf.layouts[a], self.decision.keep) else None for a in axes): axes
            for axes in kept
        }
        if len(ways) != 1:
            how = "fits it in several ways" if ways else "does not fit it"
            raise _unfit(path, shape, leaf, how)
        return self._axes(path, leaf, x, next(iter(ways.values())))

    def _param(self, path: str) -> Leaf | None:
        """The parameter that a state known by its type speaks of."""
        return _mirror(self.decision, path) or self.decision.graph.leaves.get(".")

    def _is_cut(self, leaf: Leaf) -> bool:
        return any(touched(lay, self.decision.keep) for lay in leaf.layouts)

    def _axes(self, path: str, leaf: Leaf, x: Any, axes: Sequence[int]) -> Any:
        """x, which has only these axes of a leaf, sliced."""
        layouts, keep = tuple(leaf.layouts[a] for a in axes), self.decision.keep
        layer = axes.index(leaf.layer_axis) if leaf.layer_axis in axes else None
        if layer is None and any(keep[g].ndim > 1 for a in layouts for g in L.groups_in(a) if g in keep):
            raise KeepError(
                f"leaf {path!r} has no axis for the layers of {leaf.path!r}, which keep different units: {ANEW}"
            )
        shape = tuple(leaf.shape[a] for a in axes)
        small = dataclasses.replace(leaf, path=path, shape=shape, layouts=layouts, layer_axis=layer)
        return compact_leaf(self.decision, small, x)

    def _bare(self, shape: tuple[int, ...]) -> Leaf | None:
        """The parameter, where the whole tree is one array and paths end in nothing."""
        leaf = self.decision.graph.leaves.get(".")
        return leaf if leaf is not None and shape[-len(leaf.shape) :] == leaf.shape else None

    def _unknown(self, path: str, x: Any, shape: tuple[int, ...]) -> Any:
        """A leaf whose path tells nothing."""
        raw_key = x.dtype == np.uint32 and shape[-1] in (2, 4)
        if raw_key or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if self.want is not None:
            if self.want.get(path) == shape:
                return x
            raise KeepError(
                f"leaf {path!r} of shape {shape} mirrors no parameter by its path, and init makes it "
                f"{self.want.get(path, 'absent')} for the compacted parameters: {ANEW}, or {REMEDY}"
            )
        for leaf in self.decision.graph.leaves.values():
            axes = [n for n, lay in zip(leaf.shape, leaf.layouts, strict=True) if touched(lay, self.decision.keep)]
            if axes and (int(np.prod(shape)) >= int(np.prod(leaf.shape)) or set(axes) & set(shape)):
                raise KeepError(
                    f"leaf {path!r} of shape {shape} mirrors no parameter by its path, but may hold entries of "
                    f"{leaf.path!r}, {leaf.shape}, which is cut (as a flattened state does): pass init=, which tells "
                    f"whether it depends on sizes, or {REMEDY}"
                )
        return x

    # -- states of optax that are known by their type ------------------------------------------------------------

    def _factored(self, path: str, node: Any) -> Any:
        """Adafactor: per parameter the mean squares over its largest axis and over its second largest, or all squares."""
        found = {}
        for (p, row), (_, col), (_, v) in zip(*(flatten(t) for t in (node.v_row, node.v_col, node.v)), strict=True):
            leaf = self._param(_join(path, "v", p))
            if leaf is not None:
                found[p] = leaf, row, col, v
        second = {p: sorted(leaf.shape)[-2] for p, (leaf, *_) in found.items() if len(leaf.shape) > 1}
        whole = {p for p, (leaf, _, _, v) in found.items() if tuple(v.shape) == leaf.shape}
        least = min((n for p, n in second.items() if p not in whole), default=0)
        most = max((n for p, n in second.items() if p in whole), default=0)

        def one(key: Any, row: Any, col: Any, v: Any) -> _Factors:
            p = path_str(key)
            if p not in found:
                return _Factors(
                    *(self._leaf(_join(path, n, p), x) for n, x in zip(("v_row", "v_col", "v"), (row, col, v)))
                )
            leaf = found[p][0]
            if not self._is_cut(leaf):
                return _Factors(row, col, v)
            if p in whole:  # what was too small to factor still is
                return _Factors(row, col, compact_leaf(self.decision, leaf, v))
            return self._factors(_join(path, "v_row", p), leaf, _Factors(row, col, v), most, least)

        out = jax.tree_util.tree_map_with_path(one, node.v_row, node.v_col, node.v)
        rows, cols, v = (
            jax.tree.map(lambda f, k=k: f[k], out, is_leaf=lambda f: isinstance(f, _Factors)) for k in range(3)
        )
        return node._replace(v_row=rows, v_col=cols, v=v)

    def _factors(self, path: str, leaf: Leaf, f: _Factors, most: int, least: int) -> _Factors:
        """The moments of one factored parameter; `most` and `least`: second largest axes that are not, and are, factored."""
        second, first = _two_largest(leaf.shape)
        without = [tuple(a for a in range(len(leaf.shape)) if a != gone) for gone in (first, second)]
        for x, axes in zip((f.row, f.col), without):
            if tuple(x.shape) != tuple(leaf.shape[a] for a in axes):
                raise _unfit(path, tuple(x.shape), leaf, "does not fit it")
        if uneven_scan(self.decision, leaf) is not None and self.decision.stacked != "pad":
            raise KeepError(f"leaf {path!r}: factored moments of layers that keep different numbers of units can be "
                            f"sliced with stacked='pad' only; use that, or {ANEW}")  # fmt: skip
        small = compact_leaf(self.decision, leaf, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
        own = sorted(small)[-2]
        factored = own >= least or (own > most and self._stays_factored(path, small, own, most, least))
        if not factored:
            return _Factors(_placeholder(f.row), _placeholder(f.col), self._product(leaf, f, first, second))
        row, col = (self._axes(path, leaf, x, axes) for x, axes in zip((f.row, f.col), without))
        now_second, now_first = _two_largest(small)
        if (now_second, now_first) == (second, first):
            return _Factors(row, col, f.v)
        if (now_second, now_first) == (first, second):  # the other axis is the largest now
            return _Factors(col, row, f.v)
        raise KeepError(f"leaf {path!r}: the two largest axes of {leaf.path!r}, over which moments are averaged, are others "
                        f"once it is {small}: {ANEW}")  # fmt: skip

    def _stays_factored(self, path: str, small: tuple[int, ...], own: int, most: int, least: int) -> bool:
        """Where the moments do not tell the smallest size that the optimizer factors."""
        if self.want is not None:
            return self.want.get(path) != (1,)
        said = (
            f"leaf {path!r}: a parameter of {small} has factored moments only if the optimizer factors sizes of {own}, and "
            f"the state tells that its smallest size to factor lies above {most} and not above {least}: pass init="
        )
        if most or own < DEFAULT_LEAST <= least:
            raise KeepError(said)
        warnings.warn(f"{said} to be sure; here every matrix is factored, and stays so", stacklevel=2)
        return True

    def _product(self, leaf: Leaf, f: _Factors, first: int, second: int) -> Any:
        """All squares, as the factors estimate them, of what is kept."""
        if isinstance(f.row, jax.ShapeDtypeStruct):
            return compact_leaf(self.decision, leaf, jax.ShapeDtypeStruct(leaf.shape, f.row.dtype))
        xp = np if isinstance(f.row, np.ndarray) else jnp
        mean = xp.mean(f.row, axis=second - (second > first), keepdims=True)
        share = f.row / xp.where(mean == 0, xp.ones((), mean.dtype), mean)
        return compact_leaf(self.decision, leaf, xp.expand_dims(share, first) * xp.expand_dims(f.col, second))

    def _sm3(self, path: str, node: Any) -> Any:
        """SM3: per parameter one vector per axis."""

        def one(key: Any, nu: Any, vectors: Any) -> Any:
            at = _join(path, "mu", path_str(key))
            leaf = self._param(at)
            if leaf is None:
                return [self._leaf(f"{at}/{k}", x) for k, x in enumerate(vectors)]
            if not self._is_cut(leaf):
                return vectors
            if tuple(nu.shape) != leaf.shape or [tuple(x.shape) for x in vectors] != [(n,) for n in leaf.shape]:
                raise _unfit(at, tuple(nu.shape), leaf, "does not fit it")
            return [self._axes(f"{at}/{k}", leaf, x, (k,)) for k, x in enumerate(vectors)]

        return node._replace(
            mu=jax.tree_util.tree_map_with_path(one, node.nu, node.mu), nu=self.walk(_join(path, "nu"), node.nu)
        )

    def _lbfgs(self, path: str, node: Any) -> Any:
        """L-BFGS: its pairs are sliced, and weighed anew by their products; a pair whose curvature turns negative rests."""
        old = node.weights_memory
        new = {n: self.walk(_join(path, n), getattr(node, n)) for n in node._fields if n != "weights_memory"}
        pairs = [[x for _, x in flatten(new[n])] for n in ("diff_params_memory", "diff_updates_memory")]
        if not self.decision.keep or any(isinstance(x, jax.ShapeDtypeStruct) for x in [old, *pairs[0]]):
            return node._replace(**new)
        curvature = sum(
            jnp.sum((jnp.conj(w) * u).real.reshape(old.shape[0], -1), axis=1) for w, u in zip(*pairs, strict=True)
        )
        rests = curvature * old <= 0
        weights = jnp.where(rests, 0, 1 / jnp.where(rests, 1, curvature)).astype(old.dtype)
        return node._replace(**new, weights_memory=np.asarray(weights) if isinstance(old, np.ndarray) else weights)

    def _galore(self, path: str, node: Any) -> Any:
        if not self.decision.keep:
            return node
        raise KeepError(f"{path!r} is a state of GaLore, whose projections mix the units of an axis: {ANEW}")


def _join(*parts: str) -> str:
    return "/".join(p for p in parts if p not in ("", ".")) or "."


def _two_largest(shape: Sequence[int]) -> tuple[int, int]:
    """Axes of second largest and of largest size, ties as optax breaks them."""
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def _placeholder(x: Any) -> Any:
    """The placeholder that adafactor has where it does not factor."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), x.dtype)
    return np.zeros(1, x.dtype) if isinstance(x, np.ndarray) else jnp.zeros(1, x.dtype)


def _unfit(path: str, shape: tuple[int, ...], leaf: Leaf, how: str) -> KeepError:
    return KeepError(f"leaf {path!r} of shape {shape} mirrors {leaf.path!r} of shape {leaf.shape} but {how}; {REMEDY}")


def _mirror(decision: Decision, path: str) -> Leaf | None:
    """The parameter whose path shares the longest end with this one; a shared last key alone is not enough
    unless it is the parameter's whole path or nothing else ends so."""
    keys = path.split("/")
    best: list[Leaf] = []
    length = 0
    for leaf in decision.graph.leaves.values():
        own = leaf.path.split("/")
        n = 0
        while n < min(len(own), len(keys)) and own[-1 - n] == keys[-1 - n]:
            n += 1
        if n == 0 or (n < len(own) and n < 2 and len(own) > 2):
            continue
        if n > length:
            best, length = [leaf], n
        elif n == length:
            best.append(leaf)
    if len(best) > 1:
        whole = [b for b in best if len(b.path.split("/")) == length]
        if len(whole) != 1:
            raise KeepError(
                f"leaf {path!r} could mirror {best[0].path!r} or {best[1].path!r}; rename it or slice it by hand"
            )
        best = whole
    return best[0] if best else None
