"""State that goes with a layer though the traced function does not read it: what is written, and what mirrors a read leaf.

A function in training mode writes running statistics that it may not read; one in evaluation mode reads some of them
and leaves others alone. All of them have to be cut with their layer. An output that only happens to carry a leaf's
name and shape is an activation, which keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jprune.tracing import tags as T
from jprune.tracing.walk import Val


def updated_leaf(path: str, out: Val, outputs: Sequence[str], leaves: Sequence[Val], read: set[str]) -> Val | None:
    """The leaf whose new value an output is, or None.

    It has the leaf's path at the end of its own, its shape and its type. Besides, one of these holds: the function does
    not read the leaf; the value has the leaf's own axes (it is computed from the old value entry by entry, or by an
    update in place); the whole collection that the leaf is in is returned.

    Args:
      path: '/'-joined keys of the output.
      out: the output.
      outputs: paths of all outputs.
      leaves: all leaves of the variables.
      read: paths of those that the function reads.
    """
    named = [v for v in leaves if any(k != "." and not k.isdigit() for k in str(v.leaf).split("/"))]
    own = max(
        (v for v in named if path == v.leaf or path.endswith(f"/{v.leaf}")),
        key=lambda v: len(str(v.leaf)),
        default=None,
    )
    if own is None or own.shape != out.shape or own.dtype != out.dtype:
        return None
    pairs = list(zip(out.tags, own.tags, strict=True))
    if any(_different_inputs(t, u) for t, u in pairs):
        return None
    if own.leaf not in read or all(T.norm(t) == T.norm(u) for t, u in pairs):
        return own
    prefix = path[: len(path) - len(str(own.leaf))]
    for collection in ("", str(own.leaf).split("/")[0] + "/"):
        inside = {str(v.leaf) for v in leaves if str(v.leaf).startswith(collection)}
        if inside == {p[len(prefix) :] for p in outputs if p.startswith(prefix + collection)} and len(inside) > 1:
            return own
    return None


def _different_inputs(a: T.Tag, b: T.Tag) -> bool:
    """Whether one axis is that of one input and the other that of another."""
    found = [t[0] for t in map(T.norm, (a, b)) if len(t) == 1 and isinstance(t[0], T.Atom)]
    return len(found) == 2 and found[0] is not found[1] and all(x.input_dim is not None for x in found)


def mirrored_leaf(leaf: Val, known: Sequence[Val], collections: bool) -> Val | None:
    """The leaf that one nothing reads or writes has to be cut along with, or None.

    The nearest of these places that holds leaves of this shape decides, if all of them there have the same axes:
    the same path among the parameters (an average of the weights); for a vector, the same node (a biased average
    beside the unbiased one), and then the same module in another collection (statistics beside the scale). Without
    collections only the same node: two parts of a model may be built alike and have nothing to do with each other.

    Args:
      leaf: the leaf in question; state, not a parameter, where the tree tells.
      known: those that the function reads or writes.
      collections: whether the tree's first keys are collections, the parameters' being "params".
    """
    parts = str(leaf.leaf).split("/")
    vector = sum(n > 1 for n in leaf.shape) == 1

    def places() -> Iterator[list[Val]]:
        keys = [(v, str(v.leaf).split("/")) for v in known if v.shape == leaf.shape]
        if collections and len(parts) > 1:
            yield [v for v, k in keys if k[0] == "params" and k[1:] == parts[1:]]
        if vector and len(parts) > 1:
            yield [v for v, k in keys if k[:-1] == parts[:-1]]
        if vector and collections and len(parts) > 2:
            yield [v for v, k in keys if k[1:-1] == parts[1:-1]]

    for found in places():
        if found:
            same = all(T.norm(t) == T.norm(u) for v in found[1:] for t, u in zip(v.tags, found[0].tags, strict=True))
            return found[0] if same else None
    return None
