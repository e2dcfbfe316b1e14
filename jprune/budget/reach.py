"""The sparsity at which a method's own decision meets a target: a method says who goes, this says how many must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jprune.budget.target import Target
from jprune.graph import Graph
from jprune.surgery.decision import decide as checked

STEPS = 20  # halvings of the interval of sparsities: a millionth


def sparsity_for(graph: Graph, decide: Callable[[float], Mapping[str, Any]], target: Target) -> float:
    """The smallest sparsity, to a millionth, whose decision costs no more than the target (host-side).

    Args:
      graph: of the model.
      decide: sparsity in [0, 1) -> keep set; more sparsity never costs more; ValueError where it is out of reach.
      target: what to meet.

    Raises:
      ValueError: no sparsity meets it (with the least that was reached), or what `decide` says of a sparsity of 0.
    """
    limit = target.limit(target.cost(graph, {}))

    def cost(sparsity: float) -> float:
        return target.cost(graph, checked(graph, decide(sparsity), True, True).widths("pad"))

    if (least := cost(0.0)) <= limit:
        return 0.0
    low, high, met, why = 0.0, 1.0, None, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            found = cost(middle)
        except ValueError as error:
            high, why = middle, error
            continue
        if found <= limit:
            high = met = middle
        else:
            low, least = middle, found
    if met is None:
        beyond = "" if why is None else f" (beyond: {why})"
        raise ValueError(
            f"the target of {target} ({limit:,.6g}) is out of reach; {least:,.6g} is the least this method reaches{beyond}: "
            "raise --keep"
        ) from why
    return met
