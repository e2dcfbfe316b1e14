"""Grafting: the traced function again, with every chosen convolution's output replaced by a function of yours.

A site is one use of a convolution's kernel and the point where its result is ready: behind the per-channel arithmetic
that directly follows (bias, BatchNorm in evaluation or in training mode), before anything else sees it. There the
value y becomes join(site, the convolution's input, y, extra), so that gates, bypasses and adapters can be put into any
function without an edit to its code. The result is an ordinary function: it can be jitted, differentiated and traced.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jprune.tracing.errors import suggest
from jprune.tracing.evaluate import Evaluator
from jprune.tracing.flow import Flow, Step
from jprune.tracing.paths import flatten
from jprune.tracing.primitives import SUMS
from jprune.tracing.walk import Path, Val

if TYPE_CHECKING:
    from jprune.graph import Graph

AFFINE = ("add", "sub", "mul", "div", "add_any")
CARRIED = ("convert_element_type", "copy", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "reduce_precision")
ELEMENTWISE = (*AFFINE, "square", "integer_pow", "pow", "sqrt", "rsqrt", "abs", "neg", "max", "stop_gradient", "copy",
               "convert_element_type")  # fmt: skip
CONVOLUTION = "conv_general_dilated"

Join = Callable[["Site", jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class SiteError(ValueError):
    """A convolution that nothing can be grafted onto; names its kernel, why, and the user's source line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One convolution and the point where its result is ready.

    Attributes:
      leaf: path of the kernel.
      eqn: the convolution (its `params` hold strides, padding, layout).
      channel: axis of the channels in its result; kernel_out: in its kernel.
      norm: paths of the leaves met between the convolution and that point, in order.
      stem: no other convolution lies before it.
      shortcut: its result is only added to a branch that starts from the same value.
      bypassed: inputs reach an output without passing through it (in training mode, running statistics are outputs).
      where: the user's source line.
      conv, end: call paths of the convolution and of the equation whose result is replaced.
    """

    leaf: str
    eqn: Any
    norm: tuple[str, ...]
    stem: bool
    shortcut: bool
    bypassed: bool
    where: str
    conv: Path
    end: Path

    @property
    def channel(self) -> int:
        return self.eqn.params["dimension_numbers"].out_spec[1]

    @property
    def kernel_out(self) -> int:
        return self.eqn.params["dimension_numbers"].rhs_spec[0]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """As traced, in the kernel's own layout."""
        return tuple(self.eqn.invars[1].aval.shape)

    @property
    def width(self) -> int:
        """Channels of the result, as traced."""
        return self.kernel_shape[self.kernel_out]

    @property
    def window(self) -> tuple[int, ...]:
        """Spatial sizes of the kernel."""
        return tuple(self.kernel_shape[i] for i in self.eqn.params["dimension_numbers"].rhs_spec[2:])


def sites(graph: Graph) -> tuple[dict[str, Site], dict[str, str]]:
    """({kernel path: site} in program order, {kernel path: why nothing can be grafted there}).

    Works on the trace of either mode: batch statistics are recognised as reductions to one number a channel.
    """
    flow = Flow(graph)
    uses: dict[str, list[Any]] = {}
    for use in graph.analysis.uses.values():
        if use.primitive == CONVOLUTION:
            uses.setdefault(use.leaf, []).append(use)
    order = {path: i for i, path in enumerate(flow.steps)}
    convolved = _convolved(flow)
    found: dict[str, Site] = {}
    refused: dict[str, str] = {}
    ends: dict[str, Val] = {}
    for leaf, (use, *others) in sorted(uses.items(), key=lambda item: order[item[1][0].path]):
        step = flow.steps[use.path]
        if others:
            refused[leaf] = (
                f"it is used {1 + len(others)} times ({use.where}; {others[0].where}): give each use its own"
            )
        elif step.scope != ():
            refused[leaf] = f"it lies in the body of a loop, branch or custom derivative, at {use.where}: unroll that"
        else:
            end, norm = _follow(flow, step)
            last = flow.made_by(end, ())
            assert last is not None
            if last.remat != step.remat:
                refused[leaf] = f"rematerialisation ends between it and its normalisation, at {use.where}"
                continue
            ends[leaf] = end
            found[leaf] = Site(
                leaf,
                step.eqn,
                tuple(norm),
                id(step.ins[0]) not in convolved,
                False,
                _reachable(flow, [end]),
                use.where,
                step.path,
                last.path,
            )
    made = {id(end): flow.steps[found[p].conv] for p, end in ends.items()}
    found = {p: dataclasses.replace(s, shortcut=_is_shortcut(flow, ends[p], made)) for p, s in found.items()}
    # several sites that can each be passed by, but not all at once, are not bypassed: one of them has to stay
    around = [ends[p] for p, s in found.items() if s.bypassed and not s.shortcut]
    if not _reachable(flow, around):
        found = {p: dataclasses.replace(s, bypassed=False) for p, s in found.items()}
    return found, refused


def select(graph: Graph, leaves: Iterable[str]) -> dict[str, Site]:
    """The sites of these kernels.

    Raises:
      SiteError: nothing can be grafted onto one of them, or it is not a convolution's kernel.
    """
    found, refused = sites(graph)
    out = {}
    for leaf in leaves:
        if leaf in refused:
            raise SiteError(f"nothing can be grafted onto the convolution with {leaf!r}: {refused[leaf]}")
        if leaf not in found:
            raise SiteError(f"{leaf!r} is no convolution's kernel{suggest(leaf, found)}")
        out[leaf] = found[leaf]
    return out


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns; SiteError for a pattern that matches none."""
    names = list(names)
    for p in patterns:
        if not fnmatch.filter(names, p):
            raise SiteError(f"the pattern {p!r} matches no convolution{suggest(p, names)}")
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]


def graft(graph: Graph, chosen: Mapping[str, Site], join: Join) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """fn(variables, extras, *inputs) -> (outputs, {kernel path: new state}): the traced function with joins.

    Args:
      graph: of `fn(variables, *inputs)`, in either mode.
      chosen: sites of this graph.
      join: (site, x, y, extras[kernel path]) -> (replacement of y, new state or None). y and its replacement have the
        layout of the convolution's result (`site.channel` is the channel axis).

    Input dimensions that the function does not depend on may differ from the traced ones.
    """
    watched: dict[str, tuple[Path, Path | None]] = {}
    starting: dict[Path, list[str]] = {}
    ending: dict[Path, str] = {}
    for leaf, site in chosen.items():
        watched[leaf], watched[f"{leaf} input"] = (site.end, None), (site.conv, None)
        starting.setdefault(site.conv, []).append(leaf)
        ending[site.end] = leaf

    def grafted(variables: Any, extras: Mapping[str, Any], *inputs: Any) -> tuple[Any, dict[str, Any]]:
        held: dict[str, tuple[Any, tuple[int, ...]]] = {}

        def observe(path: Path, eqn: Any, ins: list[Any], outs: list[Any], states: dict[str, Any]) -> Any:
            for leaf in starting.get(path, ()):
                held[leaf] = ins[0], outs[0].shape
            leaf = ending.get(path)
            if leaf is None:
                return None
            x, shape = held.pop(leaf)
            y, states[leaf] = join(chosen[leaf], x, outs[0].reshape(shape), extras.get(leaf))
            return [y.astype(outs[0].dtype).reshape(outs[0].shape)]

        outs, states = evaluated(graph, variables, inputs, observe, watched, dict.fromkeys(chosen))
        return outs, {leaf: states[leaf] for leaf in chosen}

    return grafted


def folded(graph: Graph, chosen: Mapping[str, Site], variables: Any, *inputs: Any) -> dict[str, tuple[Any, Any]]:
    """{kernel path: (factor (n,), shift (n,))}: in evaluation mode y = factor * convolution + shift at each site.

    Read off the function itself, run with constants in place of the convolutions' results.
    """
    starting = {s.conv: leaf for leaf, s in chosen.items()}
    ending = {s.end: leaf for leaf, s in chosen.items()}
    watched: dict[str, tuple[Path, Path | None]] = {f"{k} input": (s.conv, None) for k, s in chosen.items()}
    watched |= {k: (s.end, None) for k, s in chosen.items()}

    def run(value: float) -> dict[str, Any]:
        def observe(path: Path, eqn: Any, ins: list[Any], outs: list[Any], states: dict[str, Any]) -> Any:
            if path in starting:
                held[starting[path]] = outs[0].shape
                outs = [jnp.full_like(outs[0], value)]
            if path in ending:
                leaf = ending[path]
                at = [0] * len(held[leaf])
                at[chosen[leaf].channel] = slice(None)  # pyright: ignore[reportArgumentType, reportCallIssue]
                states[leaf] = outs[0].reshape(held[leaf])[tuple(at)]
            return outs

        held: dict[str, tuple[int, ...]] = {}
        return evaluated(graph, variables, inputs, observe, watched, dict.fromkeys(chosen))[1]

    shift, both = run(0.0), run(1.0)
    return {leaf: (both[leaf] - shift[leaf], shift[leaf]) for leaf in chosen}


def evaluated(
    graph: Graph, variables: Any, inputs: Sequence[Any], observe: Any, watched: Any, states: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(outputs, states) of the traced function with an observer at the watched equations (see `Evaluator`).

    Raises:
      ValueError: the variables lack a leaf that was traced.
    """
    flat, symbols = graph.inputs.bind(inputs)
    by_path = dict(flatten(variables))
    if missing := [p for p in graph.leaves if p not in by_path]:
        raise ValueError(f"leaf {missing[0]!r} is missing from the variables: give those that were traced")
    constants = {path: [v.const for v in vals] for path, vals in graph.analysis.folded.items()}
    ev = Evaluator(graph.rules, graph.layouts_at, constants, graph.analysis.jaxprs, symbols, None,
                   graph.scan_symbols, observe, watched, states)  # fmt: skip
    arguments = graph.select_used([by_path[p] for p in graph.leaves], flat)
    outs = ev.run(graph.jaxpr.jaxpr, graph.jaxpr.consts, arguments, ())
    return jax.tree.unflatten(graph.out_tree, outs), ev.states


# -- what is read from the dataflow ------------------------------------------------------------------------------------


def _convolved(flow: Flow) -> set[int]:
    """Values (by identity) that a convolution lies before."""
    holders = {s.path[:i] for s in flow.steps.values() if s.name == CONVOLUTION for i in range(len(s.path) + 1)}
    out: set[int] = set()
    for step in flow.within(()):
        if step.path in holders or any(id(v) in out for v in step.ins):
            out.update(id(v) for v in step.outs)
    return out


def _wide(shape: Sequence[int]) -> list[int]:
    return [i for i, n in enumerate(shape) if n != 1]


def _varies(flow: Flow, v: Val) -> set[int]:
    """Axes along which the entries of a value may differ."""
    step = flow.made_by(v, ())
    if step is not None and v.shape == step.outs[0].shape:
        if step.name == "broadcast_in_dim":
            axes = step.eqn.params["broadcast_dimensions"]
            return {axes[i] for i in _varies(flow, step.ins[0]) if i < len(axes)}
        if step.name in ("convert_element_type", "copy"):
            return _varies(flow, step.ins[0])
        if step.name in CARRIED:
            before = _wide(step.ins[0].shape)
            if [step.ins[0].shape[i] for i in before] == [v.shape[i] for i in _wide(v.shape)]:
                moved = dict(zip(before, _wide(v.shape), strict=True))
                return {moved[i] for i in _varies(flow, step.ins[0]) if i in moved}
        if step.name in ELEMENTWISE:
            return {i for x in step.ins for i in _varies(flow, x)}
    return set(_wide(v.shape))


def _leaves_of(flow: Flow, v: Val) -> list[str]:
    """Leaves that a per-channel operand is computed from directly, not through statistics of the data."""
    if v.leaf is not None:
        return [v.leaf]
    step = flow.made_by(v, ())
    if step is None or step.name not in (*ELEMENTWISE, *CARRIED):
        return []
    return [p for x in step.ins for p in _leaves_of(flow, x)]


def _is_statistical(flow: Flow, step: Step, axis: int) -> bool:
    """Whether this reader only lets numbers per channel out: a reduction, or elementwise steps towards some."""
    if step.name.startswith("reduce_") and "axes" in step.eqn.params:
        left = set(_wide(step.ins[0].shape)) - set(step.eqn.params["axes"])
        return left <= {axis}
    if step.name not in ELEMENTWISE or any(flow.is_output(v) for v in step.outs):
        return False
    readers = [r for v in step.outs for r in flow.read_by(v, ())]
    return bool(readers) and all(_is_statistical(flow, r, axis) for r in readers)


def _follow(flow: Flow, convolution: Step) -> tuple[Val, list[str]]:
    """From a convolution through the per-channel arithmetic behind it: (the last such result, leaves on the way)."""
    value = end = convolution.outs[0]
    axis = convolution.eqn.params["dimension_numbers"].out_spec[1]
    leaves: list[str] = []
    while not flow.is_output(value):
        readers = [r for r in flow.read_by(value, ()) if not _is_statistical(flow, r, axis)]
        if len(readers) != 1:  # it is used elsewhere too, or twice
            break
        step = readers[0]
        out = step.outs[0]
        if step.name in AFFINE and out.shape == value.shape:
            (other,) = [v for v in step.ins if v is not value]
            if not _varies(flow, other) <= {axis} or (step.name == "div" and step.ins[0] is not value):
                break
            leaves += [p for p in _leaves_of(flow, other) if p not in leaves]
            value = end = out
        elif step.name in CARRIED and [value.shape[i] for i in _wide(value.shape)] == [
            out.shape[i] for i in _wide(out.shape)
        ]:
            if axis not in _wide(value.shape):
                break
            axis = _wide(out.shape)[_wide(value.shape).index(axis)]
            value = out
        else:
            break
    return end, leaves


def _is_shortcut(flow: Flow, end: Val, made: Mapping[int, Step]) -> bool:
    """Its input also enters another convolution, and its result is only added to what is further from that input."""
    own = made[id(end)]
    start = own.ins[0]
    shared = any(s is not own and s.name == CONVOLUTION for s in flow.read_by(start, ()))
    readers = flow.read_by(end, ())
    if not shared or len(readers) != 1 or readers[0].name not in SUMS:
        return False
    others = [made.get(id(v)) for v in readers[0].ins if v is not end]
    return all(step is None or step.ins[0] is not start for step in others)


def _reachable(flow: Flow, blocked: Sequence[Val]) -> bool:
    """Whether data gets from the inputs to a result without passing through the blocked values."""
    stopped = {id(v) for v in blocked}
    reached = {id(v) for v in flow.inputs}
    for step in flow.within(()):
        if any(id(v) in reached for v in step.ins):
            reached.update(id(v) for v in step.outs if id(v) not in stopped)
    return any(id(v) in reached for v in flow.outputs)
