"""Evaluating a traced jaxpr again: at pruned sizes (replay), or as it is while statistics are collected (taps).

Sizes that equations carry as parameters (target shapes, slice bounds, group counts, ...) are rewritten from the
axis layouts, so the user's function runs on smaller leaves without an edit. States of statistics are threaded
through loops and branches: per layer where the tapped parameter is stacked, accumulated where it is shared. Results
of watched equations may also be replaced (jprune.surgery.sites).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jprune.tracing import layout as L
from jprune.tracing.layout import Layout
from jprune.tracing.walk import Eqn, Path, Rule

Layouts = Callable[[Path], tuple[list[tuple[Layout, ...]], list[tuple[Layout, ...]]]]
States = dict[str, Any]
Observer = Callable[[Path, Eqn, list[Any], list[Any], States], "list[Any] | None"]


@jax.tree_util.register_pytree_node_class
class Segments:
    """A value whose layers (along one axis) come in runs of different widths."""

    def __init__(self, symbol: str, parts: Sequence[Any]):
        self.symbol = symbol
        self.parts = list(parts)

    def tree_flatten(self) -> tuple[list[Any], str]:
        """The runs, so that calls, branches and loops can be given such a value."""
        return self.parts, self.symbol

    @classmethod
    def tree_unflatten(cls, symbol: str, parts: Sequence[Any]) -> Segments:
        """From the runs."""
        return cls(symbol, parts)


class Sizes:
    """The pruned sizes around one equation, for the rules' `rewrite`."""

    def __init__(
        self,
        layouts: tuple[Any, Any],
        widths: Mapping[str, Any],
        args: Sequence[Any],
        eqn: Eqn,
        keep: Mapping[str, Any] | None = None,
        index: Any = None,
    ):
        self._ins, self._outs = layouts
        self._widths = widths
        self._args = args
        self._eqn = eqn
        self._keep = keep or {}
        self.index = index  # what the rule knew of constant operands when it followed the equation

    def in_shape(self, k: int) -> tuple[int, ...]:
        """Shape of operand k as it is now."""
        return tuple(self._args[k].shape)

    def out_shape(self, k: int) -> tuple[int, ...]:
        """Shape that result k must have."""
        return tuple(int(L.width(a, self._widths)) for a in self._outs[k])

    def full_in_shape(self, k: int) -> tuple[int, ...]:
        """Shape of operand k when it was traced."""
        return tuple(self._eqn.invars[k].aval.shape)

    def full_out_shape(self, k: int) -> tuple[int, ...]:
        """Shape of result k when it was traced."""
        return tuple(self._eqn.outvars[k].aval.shape)

    def prefix(self, k: int, axis: int, position: int) -> int:
        """Kept positions before `position` on an axis of operand k."""
        return self._prefix(self._ins[k][axis], position)

    def out_prefix(self, k: int, axis: int, position: int) -> int:
        """Kept positions before `position` on an axis of result k."""
        return self._prefix(self._outs[k][axis], position)

    def _prefix(self, layout: Layout, position: int) -> int:
        if L.is_reordered(layout):
            return int((self._kept(layout) < position).sum())
        return L.prefix(layout, position, self._widths)

    def kept(self, k: int, axis: int) -> np.ndarray:
        """The traced positions of an axis of operand k that are left, in order."""
        return self._kept(self._ins[k][axis])

    def out_kept(self, k: int, axis: int) -> np.ndarray:
        """The traced positions of an axis of result k that are left, in order."""
        return self._kept(self._outs[k][axis])

    def _kept(self, layout: Layout) -> np.ndarray:
        """Where layers keep different units, the first ones stand for them: no order depends on those (see discover)."""

        def units(g: str) -> np.ndarray:
            k = self._keep[g]
            return k if np.ndim(k) == 1 else np.arange(k.shape[-1]) < self._widths[g]

        keep = {g: units(g).astype(np.float32) for g in L.groups_in(layout) if g in self._keep}
        return np.flatnonzero(L.spread(layout, keep))


class Evaluator:
    """Runs the equations of one graph on real (or traced) values.

    Args:
      rules: the rules the graph was traced with.
      layouts: axis layouts of operands and results by call path; None when nothing is pruned.
      folded: constants evaluated while tracing, by call path, already sliced.
      jaxprs: derivative jaxprs made while tracing, by call path.
      widths: group widths and symbol sizes; numbers.
      segments: symbol of a scan -> [(first layer, last layer + 1, widths of this run)] where layers differ.
      scan_symbols: symbol of the scan equation at a call path.
      observe: called after each equation that is watched, to update `states`; results it returns replace the
        equation's own.
      tap_paths: state id -> (call path of the equation it watches, call path of the scan it is stacked over or None).
      keep: the units that stay, of groups that lose some.
      indices: what rules knew of constant operands (the positions a gather takes), by call path.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        layouts: Layouts | None = None,
        folded: Mapping[Path, Sequence[Any]] | None = None,
        jaxprs: Mapping[Path, Any] | None = None,
        widths: Mapping[str, Any] | None = None,
        segments: Mapping[str, Any] | None = None,
        scan_symbols: Mapping[Path, str] | None = None,
        observe: Observer | None = None,
        tap_paths: Mapping[str, tuple[Path, Path | None]] | None = None,
        states: States | None = None,
        keep: Mapping[str, Any] | None = None,
        indices: Mapping[Path, Any] | None = None,
    ):
        self.rules = rules
        self.layouts = layouts
        self.folded = folded or {}
        self.jaxprs = jaxprs or {}
        self.widths = dict(widths or {})
        self.segments = segments or {}
        self.scan_symbols = scan_symbols or {}
        self.observe = observe
        self.tap_paths = tap_paths or {}
        self.states: States = states if states is not None else {}
        self.keep = keep or {}
        self.indices = indices or {}
        self._watched = {path for path, _ in self.tap_paths.values()}

    def _with(
        self,
        *,
        states: States | None = None,
        widths: Mapping[str, Any] | None = None,
        segments: Mapping[str, Any] | None = None,
    ) -> Evaluator:
        return Evaluator(
            self.rules,
            self.layouts,
            self.folded,
            self.jaxprs,
            self.widths if widths is None else widths,
            self.segments if segments is None else segments,
            self.scan_symbols,
            self.observe,
            self.tap_paths,
            self.states if states is None else states,
            self.keep,
            self.indices,
        )

    def with_states(self, states: States) -> Evaluator:
        """The same evaluation with other statistics states (inside a loop body or a branch)."""
        return self._with(states=dict(states))

    def states_below(self, path: Path) -> tuple[States, States]:
        """(accumulated, stacked) states whose equations lie inside the equation at `path`."""
        carried, stacked = {}, {}
        for key, (tap, scan) in self.tap_paths.items():
            if key in self.states and tap[: len(path)] == path:
                (stacked if scan == path else carried)[key] = self.states[key]
        return carried, stacked

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path) -> list[Any]:
        """Evaluate one (open or closed) jaxpr whose equations have call paths below `path`."""
        if hasattr(jaxpr, "jaxpr"):
            jaxpr, consts = jaxpr.jaxpr, jaxpr.consts
        env: dict[Any, Any] = {
            var: self._held(c, (*path, "const", k))
            for k, (var, c) in enumerate(zip(jaxpr.constvars, consts, strict=True))
        }
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any, k: int, at: Path) -> Any:
            return self._held(v.val, (*at, "literal", k)) if isinstance(v, jex.Literal) else env[v]

        for i, eqn in enumerate(jaxpr.eqns):
            here = (*path, i)
            if here in self.folded:
                outs = self._folded_at(here)
            else:
                ins = [read(v, k, here) for k, v in enumerate(eqn.invars)]
                outs = self._eval(eqn, ins, here)
                if here in self._watched and self.observe is not None:
                    replaced = self.observe(here, eqn, ins, outs, self.states)
                    outs = outs if replaced is None else replaced
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v, k, path) for k, v in enumerate(jaxpr.outvars)]

    def _folded_at(self, path: Path) -> list[Any]:
        """Constants evaluated while tracing, at the sizes that the inputs have now."""
        outs = list(self.folded[path])
        if self.layouts is None or not any(k.startswith("@in") for k in self.widths):
            return outs
        return [resized(x, lay, self.widths) for x, lay in zip(outs, self.layouts(path)[1], strict=True)]

    def _held(self, value: Any, key: Path) -> Any:
        """A constant that a jaxpr holds itself, or its slice."""
        return self.folded[key][0] if key in self.folded else value

    def _eval(self, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
        rule = self.rules.get(eqn.primitive.name)
        if rule is not None and rule.evaluate is not None:
            cut = {x.symbol for x in args if isinstance(x, Segments)}
            if cut and not cut & {s for p, s in self.scan_symbols.items() if p[: len(path)] == path}:
                return self._per_segment(eqn, args, path)
            return rule.evaluate(self, eqn, args, path)
        if any(isinstance(x, Segments) for x in args):
            return self._per_segment(eqn, args, path)
        params = eqn.params
        if rule is not None and (rule.rewrite or rule.perform) and self.layouts is not None:
            sizes = Sizes(self.layouts(path), self.widths, args, eqn, self.keep, self.indices.get(path))
            if rule.perform is not None:
                with _name_stack(eqn):
                    done = rule.perform(eqn, args, sizes)
                if done is not None:
                    return done
            if rule.rewrite is not None:
                params = rule.rewrite(eqn, sizes)
        subfuns, params = _bind_params(eqn, params)
        with _name_stack(eqn), _context(eqn):
            out = eqn.primitive.bind(*subfuns, *args, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    # -- layers of different widths -----------------------------------------------------------------------------

    def segment(self, symbol: str, j: int) -> Evaluator:
        """The evaluation restricted to run j of the layers of one scan."""
        lo, hi, widths = self.segments[symbol][j]
        rest = {k: v for k, v in self.segments.items() if k != symbol}
        return self._with(widths={**self.widths, **widths, symbol: hi - lo}, segments=rest)

    def layers_of(self, symbol: str, value: Any, layout: tuple[Layout, ...], j: int) -> Any:
        """Run j of a value: its segment, the rows of its layer axis, or the value itself if it has none."""
        if isinstance(value, Segments):
            return value.parts[j]
        lo, hi, _ = self.segments[symbol][j]
        axis = layer_axis(layout, symbol)
        return value if axis is None else jax.lax.slice_in_dim(value, lo, hi, axis=axis)

    def rows_of(self, symbol: str, value: Any, j: int) -> Any:
        """Run j of an operand that a scan runs over: its leading axis is that of the layers, whatever it holds."""
        if isinstance(value, Segments):
            return value.parts[j]
        lo, hi, _ = self.segments[symbol][j]
        return jax.lax.slice_in_dim(value, lo, hi, axis=0)

    def join(self, symbol: str, parts: Sequence[Any], layout: tuple[Layout, ...]) -> Any:
        """One array of all layers where the runs agree in shape, else the runs side by side."""
        axis = layer_axis(layout, symbol)
        if axis is None:
            raise ValueError(
                "an operation mixes layers of different widths; compact with stacked='pad' so that all layers agree"
            )
        rest = {tuple(n for i, n in enumerate(p.shape) if i != axis) for p in parts}
        return jnp.concatenate(parts, axis=axis) if len(rest) == 1 else Segments(symbol, parts)

    def _per_segment(self, eqn: Eqn, args: list[Any], path: Path) -> list[Any]:
        symbol = next(x.symbol for x in args if isinstance(x, Segments))
        assert self.layouts is not None
        ins, outs = self.layouts(path)
        runs = []
        for j in range(len(self.segments[symbol])):
            part = [self.layers_of(symbol, x, ins[k], j) for k, x in enumerate(args)]
            runs.append(self.segment(symbol, j)._eval(eqn, part, path))
        return [self.join(symbol, [r[k] for r in runs], outs[k]) for k in range(len(eqn.outvars))]


def resized(constant: Any, layouts: tuple[Layout, ...], widths: Mapping[str, Any]) -> Any:
    """A constant that is the same along the inputs' axes, at the sizes these have now."""
    for axis, lay in enumerate(layouts):
        if len(lay) == 1 and isinstance(lay[0], L.Fixed) and str(lay[0].symbol).startswith("@in"):
            n = widths.get(str(lay[0].symbol), lay[0].size)
            if n != constant.shape[axis]:
                shape = (*constant.shape[:axis], n, *constant.shape[axis + 1 :])
                first = constant[(slice(None),) * axis + (slice(0, 1),)]
                constant = (
                    np.broadcast_to(first, shape)
                    if isinstance(constant, np.ndarray)
                    else jnp.broadcast_to(first, shape)
                )
    return constant


def layer_axis(layout: tuple[Layout, ...], symbol: str) -> int | None:
    """The axis that runs over the layers of this scan."""
    for i, a in enumerate(layout):
        if len(a) == 1 and isinstance(a[0], L.Fixed) and a[0].symbol == symbol:
            return i
    return None


def _bind_params(eqn: Eqn, params: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    bound = eqn.primitive.get_bind_params(params)
    # older jax returns (subfuns, params), newer jax puts the functions into the params
    return (list(bound[0]), bound[1]) if isinstance(bound, tuple) else ([], bound)


def _context(eqn: Eqn) -> Any:
    """What was set around the equation when it was traced: where it is computed, metadata for the compiler."""
    context = getattr(eqn, "ctx", None)
    return context.manager if context is not None else contextlib.nullcontext()


def _name_stack(eqn: Eqn) -> Any:
    name = str(getattr(eqn.source_info, "name_stack", ""))
    return jax.named_scope(name) if name else contextlib.nullcontext()
