"""Which implementation of an operation runs: named by the caller, or "auto", which takes the fastest and says what it took.

An operation is a folder with one module an implementation. A module of kernels ("tpu", "mosaic_gpu") has a function
`refusal(*problem)`: why it cannot take a problem, or None. "xla" and "reference" take every problem.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

KERNELS = {"tpu": "the TPU kernels", "mosaic_gpu": "the Hopper kernels"}
OF_DEVICE = {"tpu": "tpu", "gpu": "mosaic_gpu"}  # the kernels that "auto" asks first
_log = logging.getLogger(__name__)


class BackendError(ValueError):
    """An implementation that is not known, or cannot take the problem."""


class MiscompilationError(BackendError, RuntimeError):
    """A kernel that compiles but computes something else on this device."""


class DerivativeError(BackendError, NotImplementedError):
    """A derivative that does not exist."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation and where its implementations are.

    Attributes:
      title: its name in messages. package: the folder, as imported. kernels: those of KERNELS that it has.
      prove: called before the first use of GPU kernels on a GPU; raises MiscompilationError where they do not come out right.
    """

    title: str
    package: str
    prove: Callable[[str], None] | None = None
    kernels: tuple[str, ...] = tuple(KERNELS)

    def implementation(self, name: str) -> Any:
        """The module of an implementation, imported when it is first needed: what GPU kernels import is not everywhere."""
        return importlib.import_module(f"{self.package}.{name}")

    def choose(self, impl: str, *problem: Any, interpret: Any = False) -> str:
        """The implementation that runs `problem`, which `refusal` of its module takes. What "auto" takes is logged once.

        Args:
          impl: "auto", "xla", "reference", or a name in `kernels`. interpret: as the kernels get it; false: on the device.

        Raises:
          BackendError: an unknown name, or a named implementation that cannot take the problem, with its reason.
          MiscompilationError: as `prove`.
        """
        if impl in ("xla", "reference"):
            return impl
        if impl not in ("auto", *self.kernels):
            raise BackendError(
                f"{impl!r} is no implementation of {self.title}: auto, reference, xla, {', '.join(self.kernels)}"
            )
        name = OF_DEVICE.get(jax.default_backend()) if impl == "auto" else impl
        name = name if name in self.kernels else None
        reason = self.implementation(name).refusal(*problem) if name else None
        if impl != "auto" and reason:
            raise BackendError(f"{KERNELS[impl]} cannot run: {reason}")
        if name is None or reason:
            _say_once(self.title, "plain XLA", reason)
            return "xla"
        if impl == "auto":
            _say_once(self.title, KERNELS[name], None)
        if self.prove and name == "mosaic_gpu" and jax.default_backend() == "gpu" and not interpret:
            self.prove(name)
        return name


@functools.cache
def _say_once(title: str, took: str, reason: str | None) -> None:
    if reason:
        _log.warning("%s runs on %s: %s", title, took, reason)
    else:
        _log.info("%s runs on %s", title, took)


def compare(name: str, ours: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float = 0.02) -> None:
    """Pass if results on this device are the reference's to a part of their norm. Host-side.

    Raises:
      MiscompilationError: naming the first that is not.
    """
    for what, y in wanted.items():
        x, y = (np.asarray(z, np.float64) for z in (ours[what], y))
        if not np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y):  # so written, not-a-number fails too
            raise MiscompilationError(f"{KERNELS.get(name, name)} give other {what} than the dense reference on this device: "
                                      "use impl='xla', or another CUDA (ptxas 12.8.0 to 12.9.0 is known for this)")  # fmt: skip


def no_derivative(what: str) -> Any:
    """Decorator of f(name, static, arrays), the first two hashable: jitted; differentiating it raises DerivativeError."""

    def decorate(f: Any) -> Any:
        guarded = jax.custom_jvp(f, nondiff_argnums=(0, 1))
        guarded.defjvp(functools.partial(_refuse, what))
        return jax.jit(guarded, static_argnums=(0, 1))

    return decorate


def _refuse(what: str, *_: Any) -> Any:
    raise DerivativeError(what)
