"""jprune: prune any JAX model. Trace a function once; then score, allocate, mask, compact.

Everything below is imported when it is first asked for, so that `import jprune` takes no longer than it must.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jprune.version import __version__ as __version__

if TYPE_CHECKING:
    from jprune import budget as budget
    from jprune import checkpoint as checkpoint
    from jprune import importance as importance
    from jprune import language as language
    from jprune import methods as methods
    from jprune import models as models
    from jprune import training as training
    from jprune.checkpoint import load as load
    from jprune.checkpoint import save as save
    from jprune.graph import Graph as Graph
    from jprune.graph import trace as trace
    from jprune.models import rebuild as rebuild
    from jprune.surgery.plan import Plan as Plan
    from jprune.tracing.errors import KeepError as KeepError
    from jprune.tracing.errors import NotPrunable as NotPrunable
    from jprune.tracing.errors import TraceError as TraceError
    from jprune.tracing.rules import register_rule as register_rule
    from jprune.tracing.structure import Group as Group
    from jprune.tracing.walk import Rule as Rule

_MODULES = ("budget", "checkpoint", "importance", "language", "methods", "models", "training")
_NAMES = {
    "trace": "graph",
    "Graph": "graph",
    "Group": "tracing.structure",
    "Plan": "surgery.plan",
    "Rule": "tracing.walk",
    "register_rule": "tracing.rules",
    "load": "checkpoint",
    "save": "checkpoint",
    "rebuild": "models",
    "KeepError": "tracing.errors",
    "NotPrunable": "tracing.errors",
    "TraceError": "tracing.errors",
}
__all__ = [*_MODULES, *_NAMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jprune.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'jprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jprune.{_NAMES[name]}"), name)
    globals()[name] = value  # the next look does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
