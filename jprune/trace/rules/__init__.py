"""One rule per jaxpr primitive: how axes are tied, what stays zero, and which parameters hold sizes."""

from __future__ import annotations

from jprune.trace.analysis import Rule
from jprune.trace.rules import contraction, control_flow, elementwise, indexing, reduction, shaping

BUILT_IN: dict[str, Rule] = {
    **elementwise.RULES,
    **shaping.RULES,
    **contraction.RULES,
    **reduction.RULES,
    **indexing.RULES,
    **control_flow.RULES,
}
