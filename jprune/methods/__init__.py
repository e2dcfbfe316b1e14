"""What removes something, one folder for each kind of thing; a method sees a task, never a job.

    from jprune import methods
    outcome = methods.method("taylor").find(task, methods.method("taylor").config())

`methods.METHODS` is the table of all of them; `Task` says what a method sees, `Outcome` what it gives back.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jprune.methods.contract import Amount as Amount
    from jprune.methods.contract import ClassifierTask as ClassifierTask
    from jprune.methods.contract import DecoderTask as DecoderTask
    from jprune.methods.contract import Method as Method
    from jprune.methods.contract import Outcome as Outcome
    from jprune.methods.contract import Task as Task
    from jprune.methods.names import METHODS as METHODS
    from jprune.methods.names import method as method

_NAMES: dict[str, str] = dict.fromkeys(
    ("Amount", "ClassifierTask", "DecoderTask", "Method", "Outcome", "Task"), "contract"
)
_NAMES |= dict.fromkeys(("METHODS", "method"), "names")
__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'jprune.methods' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jprune.methods.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
