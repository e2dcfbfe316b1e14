"""Text for people: groups with their members, unprunable axes with their reasons, the cost table."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jprune.tracing import layout as L
from jprune.tracing.cost import LayerCost
from jprune.tracing.errors import TraceError, suggest
from jprune.tracing.structure import Leaf

if TYPE_CHECKING:
    from jprune.graph import Graph


def explain(s: Graph, path: str | None = None, axis: int | None = None) -> str:
    """Everything, one leaf, or one axis of one leaf."""
    if path is not None:
        if path not in s.leaves:
            raise TraceError(f"there is no leaf {path!r}{suggest(path, s.leaves)}")
        leaf = s.leaves[path]
        if axis is not None and not 0 <= axis < len(leaf.shape):
            raise TraceError(f"leaf {path!r} has shape {leaf.shape}: there is no axis {axis}")
        axes = range(len(leaf.shape)) if axis is None else [axis]
        return "\n".join(f"{path} axis {i} ({leaf.shape[i]}): {describe_axis(s, leaf, i)}" for i in axes)
    lines = [summary(s), ""]
    for g in s.groups.values():
        how = "exact" if g.exact else "inexact"
        if g.exact and not g.reconfigure_exact:
            how = "exact in replay"
        layers = f", per layer ({g.layers} layers)" if g.layers is not None else ""
        lines.append(f"group {g.id}: {g.size} units, {how}{layers}")
        for m in g.members:
            per_unit = m.positions.shape[1]
            each = "" if per_unit == 1 else f", {per_unit} positions per unit"
            leaf = s.leaves[m.path]
            role = m.role if leaf.used else "written" if leaf.follows is None else f"unread; follows {leaf.follows}"
            lines.append(f"    {m.path} axis {m.axis} [{role}]{each}")
        lines += [f"    note: {n}" for n in g.notes if not g.exact]
    frozen = [
        (leaf, i)
        for leaf in s.leaves.values()
        for i, why in enumerate(leaf.frozen)
        if why is not None and leaf.shape[i] > 1
    ]
    if frozen:
        lines += ["", "unprunable axes:"]
        lines += [f"    {leaf.path} axis {i} ({leaf.shape[i]}): {describe_axis(s, leaf, i)}" for leaf, i in frozen]
    for name, where in s.unsupported.items():
        lines.append(
            f"no rule for primitive {name!r}, used at {', '.join(w or 'unknown line' for w in where)}; "
            "teach one with register_rule"
        )
    for where in s.loops_counted_once:
        lines.append(f"the while loop at {where or 'unknown line'} is counted once: its trip count is not known")
    return "\n".join(lines)


def describe_axis(s: Graph, leaf: Leaf, axis: int) -> str:
    """Which groups an axis belongs to, and why the rest of it is unprunable."""
    if leaf.shape[axis] == 1:
        return "size 1"
    parts = [f"group {g}" for g in dict.fromkeys(L.groups_in(leaf.layouts[axis]))]
    why = leaf.frozen[axis]
    if why is not None:
        parts.append(f"{'partly ' if parts else ''}unprunable: {why}")
    return "; ".join(parts)


def summary(s: Graph) -> str:
    """Counts of groups and units, and of unprunable axes with the parameters that lie on them."""
    units = sum(math.prod(g.shape) for g in s.groups.values())
    inexact = sum(not g.exact for g in s.groups.values())
    lines = [f"{len(s.groups)} groups with {units} prunable units; {inexact} groups inexact"]
    axes: collections.Counter[str] = collections.Counter()
    entries: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for leaf in s.leaves.values():
        for i, why in enumerate(leaf.frozen):
            if why is not None and leaf.shape[i] > 1:
                code = f"{why.code}({why.detail})" if why.code in ("UNSUPPORTED", "OPAQUE") else why.code
                axes[code] += 1
                entries[code][leaf.path] = math.prod(leaf.shape)  # a leaf with two such axes counts once
    for code, of_leaf in sorted(entries.items()):
        lines.append(f"  {code}: {axes[code]} axes of leaves with {sum(of_leaf.values())} entries")
    return "\n".join(lines)


def cost_table(s: Graph, before: Sequence[LayerCost], after: Sequence[LayerCost] | None) -> Any:
    """MACs and output widths per layer."""
    table = Table(title="cost per layer")
    table.add_column("layer")
    table.add_column("output")
    table.add_column("MACs", justify="right")
    table.add_column("share", justify="right")
    if after is not None:
        table.add_column("pruned output")
        table.add_column("pruned MACs", justify="right")
    total = max(sum(r.macs for r in before), 1)
    for i, r in enumerate(before):
        row = [r.name, "x".join(map(str, r.out_widths)), f"{r.macs:,}", f"{100 * r.macs / total:.1f} %"]
        if after is not None:
            row += ["x".join(map(str, after[i].out_widths)), f"{after[i].macs:,}"]
        table.add_row(*row)
    row = ["total", "", f"{total:,}", "100 %"]
    if after is not None:
        row += ["", f"{sum(r.macs for r in after):,}"]
    table.add_row(*row, style="bold")
    return table
