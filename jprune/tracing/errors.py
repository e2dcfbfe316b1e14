"""Errors a user can meet, each naming the offender and the remedy; all are ValueErrors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TraceError(ValueError):
    """The function could not be traced, or the parameters do not fit it."""


class NotPrunable(ValueError):
    """An axis may not be pruned; the message says why and where."""


class KeepError(ValueError):
    """A keep set does not fit the graph."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for an unknown name, or the known names where they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, known[:8]))
    return f"; known are {shown}{', ...' if len(known) > 8 else ''}" if known else ""
