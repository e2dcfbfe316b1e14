"""One rule per jaxpr primitive: how axes are tied, what stays zero, and which parameters hold sizes; no rule knows a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jprune.tracing.rules import contraction, control_flow, elementwise, indexing, reduction, shaping, sharded
from jprune.tracing.walk import Rule, Val

BUILT_IN: dict[str, Rule] = {
    **elementwise.RULES,
    **shaping.RULES,
    **contraction.RULES,
    **reduction.RULES,
    **indexing.RULES,
    **control_flow.RULES,
    **sharded.RULES,
}

USER_RULES: dict[str, Rule] = {}


def register_rule(
    name: str,
    propagate: Callable[..., list[Val]],
    rewrite: Callable[..., dict[str, Any]] | None = None,
    evaluate: Callable[..., list[Any]] | None = None,
) -> None:
    """Teach the tracer a primitive (a custom call, one's own kernel); it applies to every later trace.

    Args:
      name: the primitive's name.
      propagate: (analysis, equation, operand values) -> result values; see `jprune.tracing.walk`.
      rewrite: (equation, sizes) -> equation parameters at the pruned sizes, where parameters hold sizes.
      evaluate: (evaluator, equation, operands, call path) -> results, where binding the primitive is not enough.
    """
    USER_RULES[name] = Rule(propagate, rewrite, evaluate)
