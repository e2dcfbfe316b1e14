"""Targets: how much may be kept, of what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jprune.graph import Graph
from jprune.tracing import cost

COUNTED = ("macs", "params", "bytes", "activation_bytes")


@dataclasses.dataclass(frozen=True)
class Target:
    """A limit on one cost: a fraction of the dense cost in (0, 1] (a float), or an absolute amount (an int).

    Attributes:
      quantity: "macs", "params", "bytes", "activation_bytes" or "latency".
      amount: the limit; float = fraction kept, int = absolute (milliseconds may be any number with `absolute`).
      absolute: whether a float amount is absolute.
      measure: for latency, the table: widths -> milliseconds.
    """

    quantity: str
    amount: float | int
    absolute: bool = False
    measure: Callable[[Mapping[str, Any]], float] | None = None

    def __post_init__(self) -> None:
        if self.quantity not in (*COUNTED, "latency"):
            raise ValueError(f"a target counts one of {(*COUNTED, 'latency')}, not {self.quantity!r}")
        if (self.quantity == "latency") != (self.measure is not None):
            raise ValueError("a latency target needs a table, and only a latency target takes one")
        if isinstance(self.amount, bool) or not self.amount > 0:
            raise ValueError(f"a target must be above 0, not {self.amount}")
        if not self.is_absolute and self.amount > 1:
            raise ValueError(f"{self.amount} is a fraction above 1; give the fraction to KEEP in (0, 1], or an int")

    @property
    def is_absolute(self) -> bool:
        """Whether the amount is in units of the quantity rather than a fraction of dense."""
        return self.absolute or isinstance(self.amount, int)

    @staticmethod
    def macs(amount: float | int) -> Target:
        """Keep this fraction (float) or number (int) of MACs."""
        return Target("macs", amount)

    @staticmethod
    def params(amount: float | int) -> Target:
        """Keep this fraction (float) or number (int) of parameters."""
        return Target("params", amount)

    @staticmethod
    def bytes(amount: float | int) -> Target:
        """Keep this fraction (float) or number (int) of the leaves' bytes."""
        return Target("bytes", amount)

    @staticmethod
    def latency(table: Callable[[Mapping[str, Any]], float], amount: float, absolute: bool = False) -> Target:
        """Keep this fraction of the table's dense latency, or (absolute) this many milliseconds."""
        return Target("latency", amount, absolute, table)

    def cost(self, graph: Graph, widths: Mapping[str, Any]) -> float:
        """The counted quantity at these widths."""
        if self.measure is not None:
            return float(self.measure(widths))
        return cost.quantities(graph, widths, [self.quantity])[self.quantity]

    def limit(self, dense: float) -> float:
        """The largest allowed cost, given the dense cost."""
        return self.amount if self.is_absolute else self.amount * dense

    def __str__(self) -> str:
        return (
            f"{self.amount:,} {self.quantity}"
            if self.is_absolute
            else f"{self.amount:.3g} of the dense {self.quantity}"
        )
