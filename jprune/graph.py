"""The one object users hold: trace a function once, then mask, compact, replay, cost, plan, calibrate, explain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jprune.surgery import compact as _compact
from jprune.surgery import compact_like as _compact_like
from jprune.surgery import mask as _mask
from jprune.surgery import resize as _resize
from jprune.surgery.decision import Decision, Keep, decide
from jprune.surgery.plan import Plan, plan_of
from jprune.surgery.replay import Replay
from jprune.tracing import cost as _cost
from jprune.tracing import explain as _explain
from jprune.tracing import taps as _taps
from jprune.tracing.analyse import analyse
from jprune.tracing.cost import Cost, LayerCost
from jprune.tracing.inputs import Inputs
from jprune.tracing.layout import Layout
from jprune.tracing.polymorphism import difference
from jprune.tracing.structure import Group, Layouts, Leaf, Tap, contractions_of, taps_of
from jprune.tracing.walk import Analysis, Path, Rule, Val, user_line


class Graph:
    """Dependency groups, cost and taps of one traced function: what is known of it, and what can be done with that.

    Static, without arrays but folded constants, and hashable by identity. `jprune.trace` makes it. The methods take
    parameters in and give parameters (or functions, numbers, statistics) out.

    Attributes:
      groups: prunable groups by id.
      leaves: every leaf of the variables by path.
      contractions: terms of the cost polynomial.
      output_layouts: layouts of each output's axes.
      unsupported: primitives without a rule -> source lines.
      loops_counted_once: lines of while loops (their trip count is unknown, so their cost is counted once).
      inputs: what was traced with, and which sizes of it may change.
      example_inputs: shapes and dtypes of the inputs traced with.
      jaxpr, analysis, layout, rules, scan_symbols: the traced program, the walk over it and how to read both.
    """

    def __init__(
        self,
        closed: Any,
        analysis: Analysis,
        leaves: Mapping[str, Leaf],
        groups: Mapping[str, Group],
        layout: Layouts,
        scan_symbols: Mapping[Path, str],
        in_tree: Any,
        out_tree: Any,
        param_treedef: Any,
        used_invars: Sequence[bool],
        outputs: Sequence[Val],
        const_vals: Sequence[Val],
        inputs: Sequence[tuple[str, Val]],
        again: Callable[[Sequence[tuple[int, ...]]], Analysis],
        example_inputs: tuple[Any, ...],
    ):
        self.groups = dict(groups)
        self.leaves = dict(leaves)
        self.unsupported = {k: tuple(sorted(set(v))) for k, v in analysis.unsupported.items()}
        self.loops_counted_once = tuple(
            sorted({user_line(e) for e in analysis.eqns.values() if e.primitive.name == "while"})
        )
        self.jaxpr, self.analysis, self.layout, self.rules = closed, analysis, layout, analysis.rules
        self.scan_symbols = dict(scan_symbols)
        self.in_tree, self.out_tree, self.param_treedef = in_tree, out_tree, param_treedef
        self.used_invars = tuple(used_invars)
        self.const_vals, self.output_vals = tuple(const_vals), tuple(outputs)
        self.example_inputs = example_inputs
        self.output_layouts = tuple(tuple([layout(t) for t in v.tags]) for v in outputs)
        self.contractions = tuple(contractions_of(analysis, layout, self.scan_symbols))
        self._layouts_at: dict[Path, Any] = {}
        self.inputs = Inputs(
            inputs, layout, lambda shapes, sizes: difference(analysis, again(shapes), self.layouts_at, sizes)
        )

    @functools.cached_property
    def taps(self) -> dict[str, Tap]:
        """Every place a leaf meets data, by tap id."""
        return taps_of(self.analysis, self.leaves, self.layouts_at, self.scan_symbols)

    def layouts_at(self, path: Path) -> tuple[list[tuple[Layout, ...]], list[tuple[Layout, ...]]]:
        """Axis layouts of the operands and results of the equation at a call path."""
        found = self._layouts_at.get(path)
        if found is None:
            ins, outs = (
                [tuple([self.layout(t) for t in v.tags]) for v in vals] for vals in self.analysis.records[path]
            )
            found = self._layouts_at[path] = (ins, outs)
        return found

    def select_used(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The arguments of the traced jaxpr: those leaves and inputs that an output depends on."""
        return [x for x, used in zip([*leaves, *inputs], self.used_invars, strict=True) if used]

    def decide(
        self, keep: Keep | Decision, *, allow_inexact: bool = False, allow_empty: bool = False, stacked: str = "pad"
    ) -> Decision:
        """Check a keep set against this graph and hold what else there is to decide.

        Every method that takes a keep set takes the decision in its place, so that this is said once. A bare keep set
        means these defaults.

        Args:
          keep: {group id: bool (size,) or (layers, size)}; True = keep, absent groups stay whole.
          allow_inexact: prune groups whose removal is not the same as zeroing them.
          allow_empty: allow a group to lose all its units.
          stacked: what becomes of scan layers that keep different numbers of units: "pad" fills the narrower ones with
            zeros up to the widest, "bucket" makes a list with one array per run of equally wide layers, "unstack" a list
            with one array per layer.

        Raises:
          KeepError: the keep set does not fit the graph.
          NotPrunable: it cuts what is frozen or, without `allow_inexact`, inexact.
        """
        return decide(self, keep, allow_inexact, allow_empty, stacked)

    def _sized(self, keep: Keep | Decision | None) -> Decision:
        """A decision about sizes, or about values that are sliced already: nothing to be inexact about."""
        return decide(self, keep or {}, True, True)

    def mask(self, params: Any, keep: Keep | Decision) -> Any:
        """Same shapes, zeros (or soft gates) at the units to remove; jit-able and differentiable in `keep`."""
        return _mask.mask(self, params, decide(self, keep).keep if isinstance(keep, Decision) else keep)

    def compact(
        self,
        params: Any,
        keep: Keep | Decision,
        *,
        verify: str | None = "shape",
        inputs: Sequence[Any] | None = None,
    ) -> Any:
        """Really smaller parameters.

        Args:
          params: the traced tree (jax arrays, numpy arrays or `ShapeDtypeStruct`s).
          keep: the keep set, or a decision.
          verify: "shape" re-evaluates the pruned function's shapes; "numeric" compares it with the masked function on
            `inputs` (arrays) and raises on a mismatch; None trusts.

        Raises:
          KeepError: the keep set does not fit the graph, or the leaves are not those that were traced.
          NotPrunable: it cuts what is frozen or, unless the decision allows it, inexact.
          ValueError: the verification failed, or a mesh axis does not divide a new size.
        """
        decision = decide(self, keep)
        small = _compact.compact(decision, params)
        if verify is not None:
            self._verify(decision, params, small, verify, inputs)
        return small

    def expand(self, small: Any, keep: Keep | Decision) -> Any:
        """Compacted parameters back at their traced shapes, zeros at the removed positions."""
        return _compact.expand(self._sized(keep), small)

    def restack(self, small: Any, keep: Keep | Decision, *, source: str, target: str) -> Any:
        """Compacted parameters whose uneven layers are arranged the `source` way, arranged the `target` way."""
        kept = self._sized(keep).keep
        return _compact.compact(
            decide(self, kept, True, True, target), _compact.expand(decide(self, kept, True, True, source), small)
        )

    def padding_waste(self, keep: Keep | Decision) -> float:
        """Share of the MACs that stacked="pad" spends on zeros, in [0, 1).

        Up to about 0.05 one padded scan is the simplest; above that "bucket", with the widths of the layers rounded by
        the allocation's `multiple_of` so that few runs of layers differ.
        """
        decision = self._sized(keep)
        padded, exact = (self.cost(widths=decision.widths(stacked)).macs for stacked in ("pad", "unstack"))
        return (padded - exact) / max(padded, 1)

    def compact_like(self, tree: Any, keep: Keep | Decision, *, init: Callable[[Any], Any] | None = None) -> Any:
        """Slice a tree that mirrors the parameters: optimizer states, averages, gradients.

        Give `init`, the function of the variables that made the tree (`lambda v: tx.init(v["params"])`), to have the
        shapes compared with those it makes of the compacted variables. KeepError where a leaf cannot be sliced.
        """
        return _compact_like.compact_like(self._sized(keep), tree, init)

    def replay(self, keep: Keep | Decision | None = None) -> Replay:
        """The pruned function `(small_params, *inputs) -> outputs` itself."""
        return Replay(decide(self, keep or {}))

    def plan(self, keep: Keep | Decision) -> Plan:
        """The decision as plain data, to save and to apply to other copies of the weights."""
        return plan_of(decide(self, keep))

    def widths(self, keep: Keep | Decision | None = None) -> dict[str, Any]:
        """Units kept per group; groups that lose nothing included."""
        return {**{g: info.size for g, info in self.groups.items()}, **self._sized(keep).widths()}

    def resize(self, shapes: Any, widths: Mapping[str, Any]) -> Any:
        """Shapes of all leaves at any group widths, larger ones too: {group id: units}; for a model that starts anew.

        `jprune.models.rebuild(module, graph.resize(variables, widths))` is the zoo's module of these widths.

        Raises:
          KeepError: an unknown group, a width that is no integer above 0, or one width per layer.
        """
        return _resize.resize(self, shapes, widths)

    def cost(self, keep: Keep | Decision | None = None, *, widths: Mapping[str, Any] | None = None) -> Cost:
        """Exact cost at a keep set, or at given widths (numbers or vectors per layer; also traced, real ones)."""
        if widths is None:
            widths = self._sized(keep).widths()
        for g in widths:
            if g not in self.groups:
                decide(self, {g: np.ones(1, bool)})
        return _cost.evaluate(self, widths)

    def layer_costs(self, keep: Keep | Decision | None = None) -> list[LayerCost]:
        """MACs and widths of every convolution and matrix product, in program order."""
        return _cost.per_layer(self, self._sized(keep).widths())

    def marginal_cost(self, widths: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """Per group, what its last unit costs: {"macs", "params", "state", "bytes", "activation_bytes"}."""
        return _cost.marginal(self, widths or {})

    def calibrate(
        self,
        params: Any,
        batches: Iterable[Any],
        reducers: Mapping[str, _taps.Reducer],
        taps: Iterable[str] | None = None,
        side: str = "in",
        progress: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Statistics of activations, streamed over batches: {tap id: {reducer name: result}}."""
        return _taps.calibrate(self, params, batches, reducers, taps, side, progress)

    def explain(self, path: str | None = None, axis: int | None = None) -> str:
        """Groups, members and every unprunable axis with its reason and source line, as text."""
        return _explain.explain(self, path, axis)

    def summary(self) -> str:
        """Counts: groups, prunable units, and unprunable parameters by reason."""
        return _explain.summary(self)

    def cost_table(self, keep: Keep | Decision | None = None) -> Any:
        """A rich table of cost per layer, before and (with `keep`) after."""
        return _explain.cost_table(self, self.layer_costs(), self.layer_costs(keep) if keep else None)

    def dense(self, params: Any, *inputs: Any) -> Any:
        """The traced function, unpruned."""
        return Replay(Decision(self, {}))(params, *inputs)

    def verify(self, params: Any, keep: Keep | Decision, *inputs: Any) -> float:
        """Largest difference between the pruned and the masked function, relative to the outputs' largest entry."""
        decision = decide(self, keep)
        small = _compact.compact(decision, params)
        got = jax.tree.leaves(Replay(decision)(small, *inputs))
        want = jax.tree.leaves(self.dense(_mask.mask(self, params, decision.keep), *inputs))
        error = scale = 0.0
        for k, (g, w) in enumerate(zip(got, want, strict=True)):
            w = _compact.take(w, "output", _compact.indices_of(self.output_layouts[k], decision.slots, None))
            g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
            if not np.isfinite(w).all():
                raise ValueError(
                    "the masked function gives NaN or infinity (NAN_REFERENCE): it divides by what was masked"
                )
            error = max(error, float(np.abs(g - w).max(initial=0.0)))
            scale = max(scale, float(np.abs(w).max(initial=0.0)))
        return error / max(scale, np.finfo(np.float64).tiny)

    def _verify(self, decision: Decision, params: Any, small: Any, how: str, inputs: Any) -> None:
        if how == "shape":
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
            jax.eval_shape(Replay(decision), shapes, *self.example_inputs)
        elif how == "numeric":
            if inputs is None:
                raise ValueError("verify='numeric' needs inputs=(...), the arrays to compare on")
            error = self.verify(params, decision, *inputs)
            if not error <= 1e-4:
                raise ValueError(
                    f"the pruned function differs from the masked one by {error:.2e} of its output's scale"
                )
        else:
            raise ValueError(f"verify must be 'shape', 'numeric' or None, not {how!r}")


def trace(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    output_free: Sequence[tuple[str, int]] = (),
    rules: Mapping[str, Rule] | None = None,
    fold_constants: bool = False,
    is_param: Callable[[str], bool] | None = None,
) -> Graph:
    """Look at `fn(params, *inputs)` once and learn which axes are tied, what they cost and where to read activations.

    Nothing is computed: `params` and `inputs` may be arrays or `jax.ShapeDtypeStruct`s. Any traceable function
    qualifies (linen `apply`, nnx `split`/`merge`, Equinox, Haiku, plain code); give it in evaluation mode.

    The Python code of `fn` runs once per call, as it may read what has changed since. Of `module.apply` of a linen module
    (also within `functools.partial`) and of a jitted function jax remembers the trace per shapes, types and
    configuration, so that tracing again, at other batch sizes known before or for another purpose, costs the walk alone.

    Args:
      fn: the function; its first argument is the tree to prune (all collections of it).
      params: the variables.
      *inputs: example inputs. Keep the batch larger than 1 to be able to replay at other batch sizes.
      output_free: (output path, axis) pairs the caller allows to shrink; other outputs keep their sizes. State that
        is returned under its own path (updated running statistics) shrinks with its leaf.
      rules: extra rules by primitive name, for this trace only (see `register_rule`).
      fold_constants: evaluate subgraphs of constants (rotary tables, position grids) and slice them like parameters,
        so that they do not freeze the axes they meet.
      is_param: which leaf paths count as parameters; by default those under "params/", or all if there are none.

    Raises:
      TraceError: the function is not traceable, or the parameters are not arrays.
    """
    parts = analyse(fn, params, inputs, output_free, rules, fold_constants, is_param)  # which refuses what is no array
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)), tuple(inputs))
    return Graph(**parts, example_inputs=shapes)
