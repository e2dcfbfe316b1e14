"""What an optimizer's state says of each weight, found by optax's own means, and started anew for weights that regrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jprune.tracing.paths import path_str


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}; a variable of nnx is its value, which nnx.Optimizer hands over bare in training."""
    return {_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: tuple[Any, ...]) -> str:
    variable = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return path_str(path[:-1] if variable else path)


class _Parts(NamedTuple):
    paths: list[str]
    bare: list[Any]  # what the state has here without parameters; None where it has something per parameter
    treedef: Any


def _parts(tx: Any, state: Any) -> _Parts:
    """The state cut into what is per parameter and the rest, by `optax.tree_map_params`."""
    seen: list[Any] = []

    def init(mark: Any) -> Any:
        seen[:] = [type(mark), tx.init(mark)]
        return seen[1]

    optax.tree_map_params(init, lambda x: x, state, is_leaf=lambda _: True)
    kind, marked = seen
    rows, treedef = jax.tree_util.tree_flatten_with_path(marked, is_leaf=lambda x: isinstance(x, kind))
    return _Parts([path_str(p) for p, _ in rows], [None if isinstance(x, kind) else x for _, x in rows], treedef)


def check_followed(tx: Any, params: Any) -> None:
    """Raise a ValueError that names the state if it cannot be told what of it belongs to which weight.

    Each array must be a number for all parameters together, or one per parameter with the parameter's shape (perhaps
    behind further axes), or one that several of a parameter's weights share (the factors of adafactor, the axes of SM3).
    """
    state = jax.eval_shape(tx.init, params)
    try:
        parts = _parts(tx, state)
        whole = parts.treedef.flatten_up_to(state)
    except Exception as error:  # whatever an init function makes of a tree without arrays
        raise _lost(f"{_kind(state)}: optax.tree_map_params cannot tell its parts ({error})") from error
    for path, bare, part in zip(parts.paths, parts.bare, whole, strict=True):
        if bare is not None:
            if np.shape(bare) != np.shape(part):
                raise _lost(f"{path!r} of {_kind(state)} has shape {np.shape(part)}, which mixes parameters")
            continue
        try:
            own = jax.tree.structure(params).flatten_up_to(part)
        except ValueError as error:
            raise _lost(f"{path!r} of {_kind(state)} is no tree like the parameters") from error
        for (name, p), sub in zip(named(params).items(), own, strict=True):
            for x in jax.tree.leaves(sub):
                if not (_is_own(np.shape(x), np.shape(p)) or _is_shared(np.shape(x), np.shape(p))):
                    raise _lost(f"{path!r} of {_kind(state)} has shape {np.shape(x)} for {name!r}, {np.shape(p)}")


def restarted(tx: Any, state: Any, params: Any, regrown: Mapping[str, Any]) -> Any:
    """The state with what it says of these weights as `init` makes it; what weights share stays.

    Args:
      tx: the transformation that the state belongs to.
      state: its state; `check_followed` has passed.
      params: the parameters now.
      regrown: {path: bool array}, True for weights that start anew.
    """
    parts = _parts(tx, state)
    leaves = named(params).items()
    treedef = jax.tree.structure(params)

    def one(old: Any, new: Any) -> Any:
        out = []
        for (path, p), a, b in zip(leaves, treedef.flatten_up_to(old), treedef.flatten_up_to(new), strict=True):
            back = regrown.get(path)
            if back is not None:
                a = jax.tree.map(
                    lambda x, y, p=p, back=back: jnp.where(back, y, x) if _is_own(x.shape, p.shape) else x, a, b
                )
            out.append(a)
        return jax.tree.unflatten(treedef, out)

    old, new = (parts.treedef.flatten_up_to(s) for s in (state, tx.init(params)))
    return parts.treedef.unflatten(
        [a if bare is not None else one(a, b) for bare, a, b in zip(parts.bare, old, new, strict=True)]
    )


def _is_own(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    return shape[len(shape) - len(of) :] == of if len(shape) >= len(of) else False


def _is_shared(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """One number, or some of the parameter's axes in their order."""
    axes = iter(of)
    return all(n == 1 for n in shape) or all(n in axes for n in shape)


def _kind(state: Any) -> str:
    names = [type(x).__name__ for x in state if type(x).__name__ != "EmptyState"] if type(state) is tuple else []
    return ", ".join(names) or type(state).__name__


def _lost(what: str) -> ValueError:
    return ValueError(
        f"the state of this optimizer cannot be started anew for single weights: {what}; take a method by which no weight "
        "regrows (Magnitude, Saliency, Random, Static), or another optimizer"
    )
