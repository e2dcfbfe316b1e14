"""Replay: the traced function itself, run on compacted parameters, with no edit to the code that defined it."""

from __future__ import annotations

from typing import Any

import jax

from jprune.surgery.compact import compact_leaf, indices_of, is_run_list, take, uneven_scan
from jprune.surgery.decision import Decision
from jprune.tracing.errors import KeepError
from jprune.tracing.evaluate import Evaluator, Segments
from jprune.tracing.paths import path_str


class Replay:
    """The pruned function `(small_params, *inputs) -> outputs`; pure, jit-able and differentiable.

    Input dimensions that nothing in the function depends on (the batch, usually) may differ from the traced ones;
    `free_dimensions` lists them as (input path, axis). At each new set of sizes the function is traced once more, to
    make sure that it is the same one: TraceError names the line where Python code made a number of a size.
    """

    def __init__(self, decision: Decision):
        self.decision = decision
        s = decision.graph
        widths = decision.widths("pad")
        self._widths = widths
        folded = {
            path: [
                take(v.const, "constant", indices_of(tuple(s.layout(t) for t in v.tags), decision.slots, None))
                for v in vals
            ]
            for path, vals in s.analysis.folded.items()
        }
        self._folded = folded
        self._consts = [
            take(v.const, "constant", indices_of(tuple(s.layout(t) for t in v.tags), decision.slots, None))
            if v.const is not None
            else c
            for c, v in zip(s.jaxpr.consts, s.const_vals, strict=True)
        ]
        self._expected = {
            path: compact_leaf(decision, leaf, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for path, leaf in s.leaves.items()
        }

    @property
    def free_dimensions(self) -> list[tuple[str, int]]:
        """Input dimensions that may change from call to call."""
        return self.decision.graph.inputs.free_dimensions()

    def __call__(self, small: Any, *inputs: Any) -> Any:
        """Evaluate on compacted parameters and inputs of the traced shapes (but for free dimensions)."""
        s = self.decision.graph
        leaves = self._check_params(small)
        flat, symbols = s.inputs.bind(inputs)
        ev = Evaluator(
            s.rules,
            s.layouts_at,
            self._folded,
            s.analysis.jaxprs,
            {**self._widths, **symbols},
            self.decision.segments,
            s.scan_symbols,
            keep=self.decision.keep,
            indices=s.analysis.indices,
        )
        outs = ev.run(s.jaxpr.jaxpr, self._consts, s.select_used(leaves, flat), ())
        if any(isinstance(o, Segments) for o in outs):
            outs = [o.parts if isinstance(o, Segments) else o for o in outs]
        return jax.tree.unflatten(s.out_tree, outs)

    def _check_params(self, small: Any) -> list[Any]:
        found = {
            path_str(p): x
            for p, x in jax.tree_util.tree_flatten_with_path(
                small, is_leaf=is_run_list if self.decision.segments else None
            )[0]
        }
        out = []
        for path, want in self._expected.items():
            if path not in found:
                runs = any(p.startswith(f"{path}/") for p in found)
                what = (
                    f"is cut into runs of layers, which stacked={self.decision.stacked!r} does not read"
                    if runs
                    else "is missing"
                )
                raise KeepError(f"leaf {path!r} {what}; pass what compact returned for the same decision")
            x = found[path]
            shapes = [tuple(w.shape) for w in want] if isinstance(want, list) else tuple(want.shape)
            got = [tuple(w.shape) for w in x] if isinstance(x, list) else tuple(x.shape)
            if shapes != got:
                raise KeepError(
                    f"leaf {path!r} has shape {got}, but this decision makes {shapes}; "
                    f"compact with the same keep and stacked={self.decision.stacked!r}"
                )
            leaf = self.decision.graph.leaves[path]
            symbol = uneven_scan(self.decision, leaf) if isinstance(x, list) else None
            out.append(Segments(symbol, x) if symbol else x)
        return out
