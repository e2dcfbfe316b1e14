"""A weight leaf as matrices (outputs, inputs), whatever its layout: the protocol, and the view by convention.

`jprune.surgery.products.Product` is a view that a traced function tells; the one here knows only where layers of flax,
Equinox or PyTorch keep their axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class View(Protocol):
    """A leaf as matrices (outputs, inputs), whatever its layout; `jprune.surgery.products.Product` is one."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the axes before the matrix's own: stacked layers and the like."""
        ...

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the axes that are summed over; their product is the number of columns."""
        ...

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the axes that are new in the result; their product is the number of rows."""
        ...

    def matrix(self, leaf: Any) -> Any:
        """(*lead, out, in) of an array of the leaf's shape."""
        ...

    def leaf_like(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """The array of the leaf's shape whose matrix this is."""
        ...


@dataclasses.dataclass(frozen=True)
class Conventional:
    """A leaf as matrices by convention, where there is no graph that says how it is used.

    Attributes:
      shape: of the leaf.
      output, input: axes of the output and of the input channels; further axes (kernel positions) belong to the inputs
        and come before the channels.
      stacked: number of leading axes that only stack matrices (layers of a scan).
    """

    shape: tuple[int, ...]
    output: int = -1
    input: int = -2
    stacked: int = 0

    @property
    def _order(self) -> tuple[int, ...]:
        rank = len(self.shape)
        out, channel = self.output % rank, self.input % rank
        lead = tuple(range(self.stacked))
        rest = [a for a in range(rank) if a not in (*lead, out, channel)]
        return (*lead, out, *rest, channel)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self.shape[: self.stacked]

    @property
    def outputs(self) -> tuple[int, ...]:
        """(output channels,)."""
        return (self.shape[self.output],)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the kernel's axes, then input channels."""
        return tuple(self.shape[a] for a in self._order[self.stacked + 1 :])

    def matrix(self, leaf: Any) -> Any:
        """(*lead, out, in)."""
        return leaf.transpose(self._order).reshape(*self.lead, *self.outputs, math.prod(self.inputs))

    def leaf_like(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """The array of the leaf's shape whose matrix this is."""
        x = matrix.reshape(*self.lead, *self.outputs, *self.inputs)
        return x.transpose(sorted(range(len(shape)), key=self._order.__getitem__))


def conventional(shape: tuple[int, ...], output: int = -1, input: int = -2, stacked: int = 0) -> Conventional:
    """A view of a leaf by convention: as flax stores kernels, outputs last and input channels before them.

    For layers that are stored the other way round (Equinox, PyTorch) say `output=0, input=1`.

    >>> conventional((3, 3, 16, 32)).inputs
    (3, 3, 16)

    Raises:
      ValueError: fewer than two axes besides the stacked ones, or axes that are not two different ones of them.
    """
    rank = len(shape)
    if not 0 <= stacked <= rank - 2:
        raise ValueError(f"a leaf of shape {shape} with {stacked} stacked axes is no matrix: it needs two axes more")
    own = {a % rank for a in (output, input) if -rank <= a < rank}
    if len(own) != 2 or min(own) < stacked:
        raise ValueError(f"outputs on axis {output} and inputs on axis {input} are not two axes of {shape}")
    return Conventional(tuple(shape), output, input, stacked)
