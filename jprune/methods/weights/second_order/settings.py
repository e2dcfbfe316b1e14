"""Checks of the settings that several second-order methods share."""

from __future__ import annotations

import math
from typing import Any

from jprune.methods.contract import checked as check

_RULES = {
    "damp": (lambda x: 0 < x < math.inf, "above 0: without damping the matrix has no inverse"),
    "l2": (lambda x: 0 < x < math.inf, "above 0: it keeps the weights near the given ones"),
    "block": (lambda x: x is None or x >= 1, "at least 1, or None for one block of all leaves"),
    "average": (lambda x: x >= 1, "at least 1"),
    "scale": (lambda x: math.isfinite(x), "finite"),
}


def checked(config: Any, more: dict[str, tuple[bool, str]] | None = None) -> None:
    """Raise ValueError for the first setting out of its range; `more` are rules of the method's own."""
    shared = {n: (bool(holds(getattr(config, n))), must) for n, (holds, must) in _RULES.items() if hasattr(config, n)}
    check(config, shared | (more or {}))
